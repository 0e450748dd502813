"""GPT-NeoX (Black et al. 2022) and Pythia (Biderman et al. 2023): attention and feed-forward side by side."""
from typing import Any

import jax
import numpy as np

from lm.hf import names
from lm.hf.config import Config
from lm.hf.rope import older_fields, parameters, rope
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack, transformer


def erf_gelu(x: jax.Array) -> jax.Array:
  return jax.nn.gelu(x, approximate=False)


_ACTIVATIONS = {'gelu': erf_gelu, 'gelu_new': jax.nn.gelu, 'gelu_fast': jax.nn.gelu, 'gelu_pytorch_tanh': jax.nn.gelu}


def model(c: Config) -> transformer.Transformer:
  width, layers, heads = c.size('hidden_size'), c.size('num_hidden_layers'), c.size('num_attention_heads')
  if width % heads:
    c.refuse('num_attention_heads', heads, f'a divisor of hidden_size={width}')
  length, size = c.size('max_position_embeddings'), width // heads
  rotary = rope(c, length, size, c.get('rotary_emb_base', float, 1e4), part=c.get('rotary_pct', float, 0.25))
  c.only('is_decoder', True, False)   # both mean the same here
  def norm():
    return parts.LayerNorm(c.get('layer_norm_eps', float, 1e-5))
  attention = attend.Attention(heads, heads, size, rotary, bias=c.get('attention_bias', bool, True))
  feed_forward = parts.FeedForward(c.size('intermediate_size'), c.choice('hidden_act', _ACTIVATIONS, 'gelu'),
                                   gated=False, bias=True)
  block = parts.ParallelBlock if c.get('use_parallel_residual', bool, True) else parts.Block
  return transformer.Transformer(
      c.size('vocab_size'), width, stack.stacks([block(attention, feed_forward, norm(), norm())] * layers),
      norm(), length, tied=c.get('tie_word_embeddings', bool, False))


def config(model: transformer.Transformer) -> dict[str, Any]:
  block = model.layers[0]
  names_of = {function: name for name, function in reversed(_ACTIVATIONS.items())}
  if block.feed_forward.activation not in names_of:
    raise ValueError(f'GPT-NeoX has no activation {block.feed_forward.activation}')
  return {'hidden_size': model.width, 'num_hidden_layers': len(model.layers), 'vocab_size': model.vocab,
          'num_attention_heads': block.attention.heads, 'intermediate_size': block.feed_forward.hidden,
          'max_position_embeddings': model.max_length, 'hidden_act': names_of[block.feed_forward.activation],
          'layer_norm_eps': model.norm.eps, 'attention_bias': block.attention.bias,
          'use_parallel_residual': isinstance(block, parts.ParallelBlock), 'tie_word_embeddings': model.tied,
          **_rope_config(block.attention)}


def _rope_config(attention: attend.Attention) -> dict[str, Any]:
  """Returns the fields of rotary positions, also under the older names of this family.

  They have the rotated share of a head, because its default in this family is a quarter.
  """
  r = {'partial_rotary_factor': 1., **parameters(attention.rotary, attention.head_size)}
  return {'rope_parameters': r, 'rotary_emb_base': r['rope_theta'], 'rotary_pct': r['partial_rotary_factor'],
          'rope_scaling': older_fields(r)['rope_scaling']}


def layer(block: parts.Block | parts.ParallelBlock) -> list[names.Map]:
  a, leaves = block.attention, ('attention/query', 'attention/key', 'attention/value')
  heads = a.heads, 3, a.head_size   # a head's query, key and value lie together
  qkv = names.Map(
      ('attention.query_key_value.weight',), leaves,
      lambda w: tuple(w.reshape(*heads, -1)[:, i].transpose(2, 0, 1) for i in range(3)),
      lambda *w: (np.stack([np.transpose(x, (1, 2, 0)) for x in w], axis=1).reshape(-1, len(w[0])),))
  biases = names.Map(
      ('attention.query_key_value.bias',), tuple(leaf + '_bias' for leaf in leaves),
      lambda b: tuple(b.reshape(heads)[:, i] for i in range(3)), lambda *b: (np.stack(b, axis=1).reshape(-1),))
  return [qkv, names.from_heads('attention.dense.weight', 'attention/out', a.head_size),
          *([biases, names.same('attention.dense.bias', 'attention/out_bias')] if a.bias else []),
          *(make(f'mlp.{tensor}.{kind}', f'feed_forward/{leaf}')
            for tensor, name in (('dense_h_to_4h', 'up'), ('dense_4h_to_h', 'down'))
            for make, kind, leaf in ((names.linear, 'weight', name), (names.same, 'bias', name + '_bias'))),
          *(names.same(f'{tensor}.{theirs}', f'{leaf}/{ours}')
            for tensor, leaf in (('input_layernorm', 'attention_norm'),
                                 ('post_attention_layernorm', 'feed_forward_norm'))
            for theirs, ours in (('weight', 'scale'), ('bias', 'bias')))]


def outer(model: transformer.Transformer) -> list[names.Map]:
  head = [] if model.tied else [names.same('embed_out.weight', 'head')]
  return [names.same('gpt_neox.embed_in.weight', 'embedding'),
          names.same('gpt_neox.final_layer_norm.weight', 'norm/scale'),
          names.same('gpt_neox.final_layer_norm.bias', 'norm/bias'), *head]


FAMILY = names.Family('GPTNeoXForCausalLM', 'gpt_neox', model, config, layer, outer, 'gpt_neox.layers.{}.',
                      lambda name: name.endswith(('attention.bias', 'attention.masked_bias', 'rotary_emb.inv_freq')),
                      lambda model: {'embed_out.weight': 'gpt_neox.embed_in.weight'})
