"""Phi 3 and 4 (Abdin et al. 2024): Llama with fused projections, and LongRoPE."""
from typing import Any

import numpy as np

from lm.hf import names
from lm.hf.config import Config, Sizes
from lm.hf.rope import longrope_attention, older_fields, parameters, rope
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import rotary, stack, transformer


def model(c: Config) -> transformer.Transformer:
  c.defaults({'original_max_position_embeddings': 4096, 'rms_norm_eps': 1e-5})
  s = Sizes.read(c)
  c.only('hidden_act', 'silu')
  for name, supported in (('attention_bias', False), ('mlp_bias', False), ('lm_head_bias', False), ('full_attn_mod', 1),
                          ('interpolate_factor', 1)):   # fields of Microsoft's own code
    c.only(name, supported)
  rotary_positions = rope(c, s.max_length, s.head_size, part=1.)
  if not isinstance(rotary_positions.scaling, rotary.LongRope | None):
    c.refuse('rope_parameters', rotary_positions.scaling, 'default or longrope')
  attention = attend.Attention(s.heads, s.kv_heads, s.head_size, rotary_positions,
                               scores=attend.AttentionScores(window=c.size('sliding_window', None)))
  block = parts.Block(attention, parts.FeedForward(s.hidden), parts.RMSNorm(s.eps), parts.RMSNorm(s.eps))
  return transformer.Transformer(s.vocab, s.width, stack.stacks([block] * s.layers), parts.RMSNorm(s.eps),
                                 s.max_length, tied=s.tied)


def config(model: transformer.Transformer) -> dict[str, Any]:
  attention = model.layers[0].attention
  return {**Sizes.of(model).config(), 'hidden_act': 'silu', 'sliding_window': attention.scores.window,
          'original_max_position_embeddings': model.max_length, **_rope_config(attention, model.max_length)}


def _rope_config(attention: attend.Attention, max_length: int) -> dict[str, Any]:
  """Returns the fields of rotary positions.

  Older versions of transformers read three fields of the scaling and derive the factor of attention. If the model has
  another factor, there is no `rope_scaling`.
  """
  values, scaling = older_fields(parameters(attention.rotary, attention.head_size)), attention.rotary.scaling
  if isinstance(scaling, rotary.LongRope):
    values['rope_scaling'] = None
    if scaling.attention == longrope_attention(max_length / scaling.original, scaling.original):
      values['rope_scaling'] = {'type': 'longrope', 'short_factor': list(scaling.short),
                               'long_factor': list(scaling.long)}
  return values


def layer(block: parts.Block) -> list[names.Map]:
  a = block.attention
  ends = np.cumsum([a.heads, a.kv_heads])
  qkv = names.Map(
      ('self_attn.qkv_proj.weight',), ('attention/query', 'attention/key', 'attention/value'),
      lambda w: tuple(np.split(w.T.reshape(w.shape[1], -1, a.head_size), ends, axis=1)),
      lambda *w: (np.concatenate([np.reshape(x, (len(x), -1)) for x in w], axis=1).T,))
  gate_up = names.Map(('mlp.gate_up_proj.weight',), ('feed_forward/gate', 'feed_forward/up'),
                      lambda w: tuple(np.split(w.T, 2, axis=1)), lambda *w: (np.concatenate(w, axis=1).T,))
  return [qkv, names.from_heads('self_attn.o_proj.weight', 'attention/out', a.head_size), gate_up,
          names.linear('mlp.down_proj.weight', 'feed_forward/down'),
          names.same('input_layernorm.weight', 'attention_norm/scale'),
          names.same('post_attention_layernorm.weight', 'feed_forward_norm/scale')]


FAMILY = names.Family('Phi3ForCausalLM', 'phi3', model, config, layer, names.llama_outer)
