"""gpt-oss (OpenAI 2025): experts with biases and a clamped activation, attention with sinks and biases.

Every other layer has a window. In the published files, the experts are quantised as MXFP4; see `quantized`.
"""
from collections.abc import Iterator
from typing import Any

import numpy as np

from lm.hf import experts, names
from lm.hf.config import Config, Sizes, windows, windows_config
from lm.hf.rope import rope, rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import moe, rotary, stack, transformer

_ROPE = {'rope_type': 'yarn', 'factor': 32., 'beta_fast': 32., 'beta_slow': 1., 'truncate': False,
         'original_max_position_embeddings': 4096}


def model(c: Config) -> transformer.Transformer:
  c.defaults({'num_key_value_heads': 8, 'head_dim': 64, 'sliding_window': 128})
  s = Sizes.read(c, eps=1e-5)
  c.only('hidden_act', 'silu')
  if not c.has('rope_scaling'):   # the field of older files
    c.defaults({'rope_parameters': _ROPE})
    c.get('rope_parameters', dict)
  rotary_positions, count = rope(c, s.max_length, s.head_size, 150_000.), experts.count(c, 128)
  top_k = experts.top_k(c, count, 4)
  c.only('experts_per_token', top_k)   # OpenAI's own names of two fields
  if isinstance(rotary_positions.scaling, rotary.Yarn):
    c.only('initial_context_length', rotary_positions.scaling.original)
  activation = moe.ClampedGated(c.get('swiglu_limit', float, 7.), c.get('swiglu_alpha', float, 1.702))
  if activation.limit <= 0:
    c.refuse('swiglu_limit', activation.limit, 'a positive number')
  mixture = moe.Experts(moe.SoftmaxRouter(top_k, bias=True), count, s.hidden, activation, bias=True)
  def block(window):
    attention = attend.Attention(s.heads, s.kv_heads, s.head_size, rotary_positions,
                                 bias=c.get('attention_bias', bool, True),
                                 scores=attend.AttentionScores(window=window), sinks=True)
    return parts.Block(attention, mixture, parts.RMSNorm(s.eps), parts.RMSNorm(s.eps))
  blocks = [block(window) for window in windows(c, s.layers, lambda i: i % 2 == 0)]
  return transformer.Transformer(s.vocab, s.width, stack.stacks(blocks), parts.RMSNorm(s.eps), s.max_length,
                                 tied=s.tied)


def config(model: transformer.Transformer) -> dict[str, Any]:
  attention, mixture = model.layers[0].attention, experts.first(model)
  return {**Sizes.of(model).config(), **windows_config(model), 'hidden_act': 'silu', 'attention_bias': attention.bias,
          'num_local_experts': mixture.experts, 'num_experts_per_tok': mixture.router.top_k,
          'swiglu_limit': mixture.activation.limit, 'swiglu_alpha': mixture.activation.alpha,
          **_rope_config(attention)}


def _rope_config(attention: attend.Attention) -> dict[str, Any]:
  """Returns the fields of rotary positions. Without scaling, they say so, because the default of this family scales."""
  values = rope_config(attention.rotary, attention.head_size)
  return values | {'rope_scaling': values['rope_scaling'] or {'rope_type': 'default'}}


def feed_forward(mixture: moe.Experts) -> Iterator[names.Map]:
  """Yields the maps of all experts in one tensor, [E, in, out]; gate and up alternate along its last axis."""
  yield names.linear('mlp.router.weight', 'feed_forward/router/router')
  yield names.same('mlp.router.bias', 'feed_forward/router/router_bias')
  for kind in ('', '_bias'):
    yield names.Map((f'mlp.experts.gate_up_proj{kind}',), (f'feed_forward/gate{kind}', f'feed_forward/up{kind}'),
                    lambda w: (w[..., ::2], w[..., 1::2]),
                    lambda *w: (np.stack(w, axis=-1).reshape(*w[0].shape[:-1], -1),), by_expert=True)
    yield names.Map((f'mlp.experts.down_proj{kind}',), (f'feed_forward/down{kind}',), lambda w: (w,), lambda w: (w,),
                    by_expert=True)


def layer(block: parts.Block) -> list[names.Map]:
  return [*names.llama_layer(block, feed_forward), names.same('self_attn.sinks', 'attention/sinks')]


FAMILY = names.Family('GptOssForCausalLM', 'gpt_oss', model, config, layer, names.llama_outer)
