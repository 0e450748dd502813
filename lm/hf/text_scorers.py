"""Encoders that score a pair of texts: BERT and RemBERT with a regression head, and the PyTorch port of BLEURT.

The port is `bleurt_pytorch` (github.com/lucadiliello/bleurt-pytorch), whose checkpoints are `lucadiliello/BLEURT-20`
and others. Its tensors are named as those of BERT, with 'bleurt.' in place of 'bert.'.
"""
import dataclasses
import functools
from typing import Any

import jax

from lm.hf import bert, names
from lm.hf.config import Config
from lm.models import attention as attend
from lm.models import encoder, stack
from lm.models import layers as parts

ACTIVATIONS = {'gelu': encoder.gelu, 'gelu_new': jax.nn.gelu, 'gelu_pytorch_tanh': jax.nn.gelu}


@dataclasses.dataclass(frozen=True)
class Kind:
  """What the families differ in: the name of the root of all tensors, and of the projection of embeddings."""
  root: str
  projection: str | None = None       # its tensor; None: embeddings have the width of the model
  embedding_field: str | None = None  # the config's field with the size of embeddings
  required: bool = False              # whether there always is a projection


BERT = Kind('bert')
REMBERT = Kind('rembert', 'embedding_hidden_mapping_in', 'input_embedding_size', required=True)
PORT = Kind('bleurt', 'embedding_projection', 'embedding_size')


def model(kind: Kind, c: Config) -> encoder.TextScorer:
  width, heads, eps = c.size('hidden_size'), c.size('num_attention_heads'), c.get('layer_norm_eps', float, 1e-12)
  if width % heads:
    c.refuse('num_attention_heads', heads, f'a divisor of hidden_size={width}')
  for name, supported in (('position_embedding_type', 'absolute'), ('is_decoder', False),
                          ('add_cross_attention', False), ('directionality', 'bidi')):
    c.only(name, supported)
  for name in ('tie_word_embeddings', 'output_embedding_size', 'classifier_dropout_prob', 'pooler_fc_size',
               'pooler_num_attention_heads', 'pooler_num_fc_layers', 'pooler_size_per_head', 'pooler_type'):
    c.get(name, (bool, int, float, str), None)   # fields of other heads, and of training
  size = None
  if kind.embedding_field:
    size = c.size(kind.embedding_field, *(() if kind.required else (None,)))
  activation = c.choice('hidden_act', ACTIVATIONS, 'gelu')
  attention = attend.Attention(heads, heads, width // heads, bias=True, scores=attend.AttentionScores(causal=False))
  feed_forward = parts.FeedForward(c.size('intermediate_size'), activation, gated=False, bias=True)
  block = encoder.PostNormBlock(attention, feed_forward, parts.LayerNorm(eps), parts.LayerNorm(eps))
  return encoder.TextScorer(
      c.size('vocab_size'), width, stack.stacks([block] * c.size('num_hidden_layers')), parts.LayerNorm(eps),
      c.size('max_position_embeddings'), c.size('type_vocab_size', 2), embedding_size=size)


def config(kind: Kind, model: encoder.TextScorer) -> dict[str, Any]:
  if model.embedding_size is None and kind.required or model.embedding_size is not None and not kind.projection:
    raise ValueError(f'a model of root {kind.root} has no embeddings of size {model.embedding_size}')
  block = model.layers[0]
  named = {function: name for name, function in reversed(ACTIVATIONS.items())}
  values = {'hidden_size': model.width, 'num_hidden_layers': len(model.layers),
            'num_attention_heads': block.attention.heads, 'intermediate_size': block.feed_forward.hidden,
            'vocab_size': model.vocab, 'max_position_embeddings': model.max_length, 'type_vocab_size': model.types,
            'hidden_act': named[block.feed_forward.activation], 'layer_norm_eps': model.norm.eps,
            'id2label': {'0': 'LABEL_0'}, 'label2id': {'LABEL_0': 0}}
  return values | ({kind.embedding_field: model.embedding_size} if model.embedding_size is not None else {})


def outer(kind: Kind, model: encoder.TextScorer) -> list[names.Map]:
  maps = [*bert.embeddings(kind.root), names.linear(f'{kind.root}.pooler.dense.weight', 'pooler'),
          names.same(f'{kind.root}.pooler.dense.bias', 'pooler_bias'),
          names.Map(('classifier.weight',), ('score',), lambda w: (w.reshape(-1),), lambda w: (w.reshape(1, -1),)),
          names.same('classifier.bias', 'score_bias')]
  if model.embedding_size is not None:
    tensor = f'{kind.root}.encoder.{kind.projection}'
    maps += [names.linear(f'{tensor}.weight', 'projection'), names.same(f'{tensor}.bias', 'projection_bias')]
  return maps


def family(architecture: str, model_type: str, kind: Kind) -> names.Family:
  prefix = kind.root + '.encoder.layer.{}.'
  return names.Family(
      architecture, model_type, functools.partial(model, kind), functools.partial(config, kind), bert.layer,
      functools.partial(outer, kind), prefix,
      ignored=lambda name: name == f'{kind.root}.embeddings.position_ids', copies=lambda model: {}, older=bert.older,
      stacks=lambda model: [(prefix, ('blocks',), model.blocks)])


FAMILIES = (family('BertForSequenceClassification', 'bert', BERT),
            family('RemBertForSequenceClassification', 'rembert', REMBERT),
            family('BleurtForSequenceClassification', 'bleurt', PORT))
