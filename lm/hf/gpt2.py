"""GPT-2 (Radford et al. 2019)."""
from typing import Any

import jax
import numpy as np

from lm.hf import names
from lm.hf.config import Config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack, transformer

_ACTIVATIONS = {'gelu_new': jax.nn.gelu, 'gelu_pytorch_tanh': jax.nn.gelu}


def model(c: Config) -> transformer.Transformer:
  width, layers, heads = c.size('n_embd'), c.size('n_layer'), c.size('n_head')
  if width % heads:
    c.refuse('n_head', heads, f'a divisor of n_embd={width}')
  c.choice('activation_function', _ACTIVATIONS, 'gelu_new')
  for name, supported in (('scale_attn_weights', True), ('scale_attn_by_inverse_layer_idx', False),
                          ('reorder_and_upcast_attn', False), ('add_cross_attention', False)):
    c.only(name, supported)
  c.unread('n_special', 0)   # a field of the first files
  c.unread('predict_special_tokens', True)
  def norm():
    return parts.LayerNorm(c.get('layer_norm_epsilon', float, 1e-5))
  block = parts.Block(attend.Attention(heads, heads, width // heads, bias=True),
                      parts.FeedForward(c.size('n_inner', 4 * width), jax.nn.gelu, gated=False, bias=True),
                      norm(), norm())
  return transformer.Transformer(c.size('vocab_size'), width, stack.stacks([block] * layers), norm(),
                                 c.size('n_positions'), positions=True,
                                 tied=c.get('tie_word_embeddings', bool, True))


def config(model: transformer.Transformer) -> dict[str, Any]:
  block = model.layers[0]
  return {'n_embd': model.width, 'n_layer': len(model.layers), 'n_head': block.attention.heads,
          'n_inner': block.feed_forward.hidden, 'n_positions': model.max_length, 'vocab_size': model.vocab,
          'activation_function': 'gelu_new', 'layer_norm_epsilon': model.norm.eps, 'tie_word_embeddings': model.tied}


def _matrix(tensor: str, leaf: str) -> names.Map:
  return names.same(tensor, leaf)   # GPT-2's files have matrices as [in, out]


def layer(block: parts.Block) -> list[names.Map]:
  size, leaves = block.attention.head_size, ('attention/query', 'attention/key', 'attention/value')
  qkv = names.Map(
      ('attn.c_attn.weight',), leaves, lambda w: tuple(x.reshape(len(w), -1, size) for x in np.split(w, 3, axis=1)),
      lambda *w: (np.concatenate([np.reshape(x, (len(x), -1)) for x in w], axis=1),))
  biases = names.Map(
      ('attn.c_attn.bias',), tuple(leaf + '_bias' for leaf in leaves),
      lambda b: tuple(x.reshape(-1, size) for x in np.split(b, 3)),
      lambda *b: (np.concatenate([np.reshape(x, -1) for x in b]),))
  out = names.Map(('attn.c_proj.weight',), ('attention/out',), lambda w: (w.reshape(-1, size, w.shape[1]),),
                  lambda w: (np.reshape(w, (-1, w.shape[-1])),))
  return [qkv, biases, out, names.same('attn.c_proj.bias', 'attention/out_bias'),
          _matrix('mlp.c_fc.weight', 'feed_forward/up'), names.same('mlp.c_fc.bias', 'feed_forward/up_bias'),
          _matrix('mlp.c_proj.weight', 'feed_forward/down'), names.same('mlp.c_proj.bias', 'feed_forward/down_bias'),
          *(names.same(f'{tensor}.{theirs}', f'{leaf}/{ours}')
            for tensor, leaf in (('ln_1', 'attention_norm'), ('ln_2', 'feed_forward_norm'))
            for theirs, ours in (('weight', 'scale'), ('bias', 'bias')))]


def outer(model: transformer.Transformer) -> list[names.Map]:
  head = [] if model.tied else [names.same('lm_head.weight', 'head')]
  return [names.same('transformer.wte.weight', 'embedding'), names.same('transformer.wpe.weight', 'positions'),
          names.same('transformer.ln_f.weight', 'norm/scale'), names.same('transformer.ln_f.bias', 'norm/bias'), *head]


FAMILY = names.Family('GPT2LMHeadModel', 'gpt2', model, config, layer, outer, 'transformer.h.{}.',
                      lambda name: name.endswith(('attn.bias', 'attn.masked_bias')),
                      lambda model: {'lm_head.weight': 'transformer.wte.weight'})
