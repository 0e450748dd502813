"""T5 1.0 and 1.1 (Raffel et al. 2020), and models that were trained from them, such as Flan-T5."""
from collections.abc import Iterator
from typing import Any

import jax

from lm.hf import names
from lm.hf.config import Config
from lm.models import attention as attend
from lm.models import encoder_decoder, stack
from lm.models import layers as parts

# By `feed_forward_proj`: the activation, whether it is gated, and its name in the field `dense_act_fn`.
_FEED_FORWARD = {'relu': (jax.nn.relu, False, 'relu'), 'gated-gelu': (parts.gelu_gated, True, 'gelu_new'),
                 'gated-silu': (parts.silu_gated, True, 'silu')}


def model(c: Config) -> encoder_decoder.EncoderDecoder:
  heads, size, eps = c.size('num_heads'), c.size('d_kv'), c.get('layer_norm_epsilon', float, 1e-6)
  activation, gated, name = c.choice('feed_forward_proj', _FEED_FORWARD, 'relu')
  c.only('dense_act_fn', name)
  c.only('is_gated_act', gated)
  c.only('is_encoder_decoder', True)
  c.only('is_decoder', False)
  for name, kind in (('n_positions', int), ('output_past', bool)):   # fields of older files, which have no effect
    c.get(name, kind, None)
  # Transformers 5 writes that every model is tied. For those that are not, `scale_decoder_outputs` is false.
  tied = c.get('tie_word_embeddings', bool, True)
  if tied:
    tied = c.get('scale_decoder_outputs', bool, True)
  c.only('scale_decoder_outputs', tied)
  relative = encoder_decoder.RelativePositions(c.size('relative_attention_num_buckets', 32),
                                               c.size('relative_attention_max_distance', 128))

  def attention(causal):
    return attend.Attention(heads, heads, size, scores=attend.AttentionScores(1., causal=causal))

  def norm():
    return parts.RMSNorm(eps)
  feed_forward = parts.FeedForward(c.size('d_ff'), activation, gated)
  encoder = parts.Block(attention(False), feed_forward, norm(), norm())
  decoder = encoder_decoder.DecoderBlock(attention(True), encoder_decoder.CrossAttention(heads, size), feed_forward,
                                         norm(), norm(), norm())
  layers = c.size('num_layers')
  return encoder_decoder.EncoderDecoder(
      c.size('vocab_size'), c.size('d_model'), stack.stacks([encoder] * layers),
      stack.stacks([decoder] * c.size('num_decoder_layers', layers)), norm(), norm(), relative, tied)


def config(model: encoder_decoder.EncoderDecoder) -> dict[str, Any]:
  layers = stack.layers(model.encoder)
  block = layers[0]
  activation = block.feed_forward.activation
  named = {function: name for name, (function, _, _) in _FEED_FORWARD.items()}
  if activation not in named:
    raise ValueError(f'T5 has no activation {activation}')
  return {'d_model': model.width, 'd_kv': block.attention.head_size, 'd_ff': block.feed_forward.hidden,
          'num_layers': len(layers), 'num_decoder_layers': len(stack.layers(model.decoder)),
          'num_heads': block.attention.heads, 'vocab_size': model.vocab, 'feed_forward_proj': named[activation],
          'relative_attention_num_buckets': model.relative.buckets,
          'relative_attention_max_distance': model.relative.max_distance, 'layer_norm_epsilon': model.encoder_norm.eps,
          'is_encoder_decoder': True, 'tie_word_embeddings': model.tied}


def _attention(prefix: str, leaf: str, size: int) -> Iterator[names.Map]:
  for tensor, name in (('q', 'query'), ('k', 'key'), ('v', 'value')):
    yield names.to_heads(f'{prefix}.{tensor}.weight', f'{leaf}/{name}', size)
  yield names.from_heads(f'{prefix}.o.weight', f'{leaf}/out', size)


def layer(block: Any) -> list[names.Map]:
  parts, size = ['attention', 'feed_forward'], block.attention.head_size
  maps = [*_attention('layer.0.SelfAttention', 'attention', size)]
  if isinstance(block, encoder_decoder.DecoderBlock):
    parts.insert(1, 'cross_attention')
    maps += _attention('layer.1.EncDecAttention', 'cross_attention', size)
  up = {'wi_0': 'gate', 'wi_1': 'up'} if block.feed_forward.gated else {'wi': 'up'}
  return [*maps, *(names.same(f'layer.{i}.layer_norm.weight', f'{part}_norm/scale') for i, part in enumerate(parts)),
          *(names.linear(f'layer.{len(parts) - 1}.DenseReluDense.{tensor}.weight', f'feed_forward/{leaf}')
            for tensor, leaf in (up | {'wo': 'down'}).items())]


def outer(model: encoder_decoder.EncoderDecoder) -> list[names.Map]:
  head = [] if model.tied else [names.same('lm_head.weight', 'head')]
  return [names.same('shared.weight', 'embedding'), *head, *(
      names.same(f'{name}.{tensor}.weight', f'{name}_{leaf}') for name in ('encoder', 'decoder') for tensor, leaf in (
          ('final_layer_norm', 'norm/scale'), ('block.0.layer.0.SelfAttention.relative_attention_bias', 'bias')))]


FAMILY = names.Family(
    'T5ForConditionalGeneration', 't5', model, config, layer, outer, 'encoder.block.{}.',
    # Older files have this tensor, which has no effect.
    ignored=lambda name: name == 'decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight',
    copies=lambda model: dict.fromkeys(
        ('encoder.embed_tokens.weight', 'decoder.embed_tokens.weight', 'lm_head.weight'), 'shared.weight'),
    # If the two tables of an untied model are equal, Transformers 5 writes only one.
    older=lambda name: 'shared.weight' if name == 'lm_head.weight' else name,
    stacks=lambda model: [(f'{name}.block.{{}}.', ('blocks', name), getattr(model, name))
                          for name in ('encoder', 'decoder')])
