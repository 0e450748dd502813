"""BERT (Devlin et al. 2019), with the head that predicts masked words."""
from typing import Any

from lm.hf import names
from lm.hf.config import Config
from lm.models import attention as attend
from lm.models import encoder, stack
from lm.models import layers as parts


def model(c: Config) -> encoder.Encoder:
  width, heads, eps = c.size('hidden_size'), c.size('num_attention_heads'), c.get('layer_norm_eps', float, 1e-12)
  if width % heads:
    c.refuse('num_attention_heads', heads, f'a divisor of hidden_size={width}')
  for name, supported in (('hidden_act', 'gelu'), ('position_embedding_type', 'absolute'), ('is_decoder', False),
                          ('add_cross_attention', False), ('tie_word_embeddings', True), ('directionality', 'bidi')):
    c.only(name, supported)
  for name in ('fc_size', 'num_attention_heads', 'num_fc_layers', 'size_per_head', 'type'):
    c.get('pooler_' + name, (int, str), None)   # fields of the pooler, which is not read
  attention = attend.Attention(heads, heads, width // heads, bias=True, scores=attend.AttentionScores(causal=False))
  feed_forward = parts.FeedForward(c.size('intermediate_size'), encoder.gelu, gated=False, bias=True)
  block = encoder.PostNormBlock(attention, feed_forward, parts.LayerNorm(eps), parts.LayerNorm(eps))
  return encoder.Encoder(c.size('vocab_size'), width, stack.stacks([block] * c.size('num_hidden_layers')),
                         parts.LayerNorm(eps), c.size('max_position_embeddings'), c.size('type_vocab_size', 2))


def config(model: encoder.Encoder) -> dict[str, Any]:
  block = model.layers[0]
  return {'hidden_size': model.width, 'num_hidden_layers': len(model.layers),
          'num_attention_heads': block.attention.heads, 'intermediate_size': block.feed_forward.hidden,
          'vocab_size': model.vocab, 'max_position_embeddings': model.max_length, 'type_vocab_size': model.types,
          'hidden_act': 'gelu', 'layer_norm_eps': model.norm.eps, 'tie_word_embeddings': True}


def _norm(tensor: str, leaf: str, by: str = '/') -> list[names.Map]:
  return [names.same(f'{tensor}.weight', f'{leaf}{by}scale'), names.same(f'{tensor}.bias', f'{leaf}{by}bias')]


def layer(block: encoder.PostNormBlock) -> list[names.Map]:
  size = block.attention.head_size
  projections = [make(f'attention.self.{name}.{tensor}', f'attention/{name}{leaf}', size)
                 for name in ('query', 'key', 'value')
                 for make, tensor, leaf in ((names.to_heads, 'weight', ''), (names.by_heads, 'bias', '_bias'))]
  return [*projections, names.from_heads('attention.output.dense.weight', 'attention/out', size),
          names.same('attention.output.dense.bias', 'attention/out_bias'),
          *_norm('attention.output.LayerNorm', 'attention_norm'),
          names.linear('intermediate.dense.weight', 'feed_forward/up'),
          names.same('intermediate.dense.bias', 'feed_forward/up_bias'),
          names.linear('output.dense.weight', 'feed_forward/down'),
          names.same('output.dense.bias', 'feed_forward/down_bias'), *_norm('output.LayerNorm', 'feed_forward_norm')]


def embeddings(root: str) -> list[names.Map]:
  """Returns the maps of the embeddings and their norm; the names of all tensors begin with `root`."""
  tables = {'word': 'embedding', 'position': 'positions', 'token_type': 'types'}
  return [*(names.same(f'{root}.embeddings.{name}_embeddings.weight', leaf) for name, leaf in tables.items()),
          *_norm(f'{root}.embeddings.LayerNorm', 'norm')]


def older(name: str) -> str:
  """Returns the name that a tensor has in older files."""
  return name.replace('LayerNorm.weight', 'LayerNorm.gamma').replace('LayerNorm.bias', 'LayerNorm.beta')


def outer(model: encoder.Encoder) -> list[names.Map]:
  del model
  return [*embeddings('bert'),
          names.linear('cls.predictions.transform.dense.weight', 'transform'),
          names.same('cls.predictions.transform.dense.bias', 'transform_bias'),
          *_norm('cls.predictions.transform.LayerNorm', 'transform_norm', '_'),
          names.same('cls.predictions.bias', 'head_bias')]


# Checkpoints of pretraining also have a pooler, which summarises a text, and a head for next-sentence prediction.
_IGNORED = ('bert.pooler.', 'cls.seq_relationship.', 'bert.embeddings.position_ids')

FAMILY = names.Family(
    'BertForMaskedLM', 'bert', model, config, layer, outer, 'bert.encoder.layer.{}.',
    ignored=lambda name: name.startswith(_IGNORED),
    copies=lambda model: {'cls.predictions.decoder.weight': 'bert.embeddings.word_embeddings.weight',
                          'cls.predictions.decoder.bias': 'cls.predictions.bias'},
    older=older,
    stacks=lambda model: [('bert.encoder.layer.{}.', ('blocks',), model.blocks)])
