"""SmolLM 3 (Bakouch et al. 2025): Llama, where every fourth layer has no rotary positions (Yang et al. 2025, RNoPE)."""
from typing import Any

from lm.hf import names
from lm.hf.config import Config, Sizes, optional_windows, windows_config
from lm.hf.rope import rope, rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack, transformer
from lm.models.rotary import Rotary


def model(c: Config) -> transformer.Transformer:
  c.defaults({'num_key_value_heads': 4, 'tie_word_embeddings': True})
  s = Sizes.read(c)
  c.only('hidden_act', 'silu')
  rotary, interval = rope(c, s.max_length, s.head_size, 2e6), c.size('no_rope_layer_interval', 4)
  # Despite the name of the field, 1 stands for a layer with rotary positions.
  has_rotary = c.get('no_rope_layers', list, [(i + 1) % interval != 0 for i in range(s.layers)])
  if len(has_rotary) < s.layers or not all(value in (0, 1) for value in has_rotary):
    c.refuse('no_rope_layers', has_rotary, f'0 or 1 for each of {s.layers} layers')
  if not c.get('use_sliding_window', bool, False):
    c.size('max_window_layers', None)   # it has no effect without windows
  def block(rotates, window):
    attention = attend.Attention(s.heads, s.kv_heads, s.head_size, rotary if rotates else None,
                                 bias=c.get('attention_bias', bool, False),
                                 scores=attend.AttentionScores(window=window))
    feed_forward = parts.FeedForward(s.hidden, bias=c.get('mlp_bias', bool, False))
    return parts.Block(attention, feed_forward, parts.RMSNorm(s.eps), parts.RMSNorm(s.eps))
  windows = optional_windows(c, s.layers, lambda i: not has_rotary[i])
  blocks = [block(rotates, window) for rotates, window in zip(has_rotary, windows)]
  return transformer.Transformer(s.vocab, s.width, stack.stacks(blocks), parts.RMSNorm(s.eps), s.max_length,
                                 tied=s.tied)


def config(model: transformer.Transformer) -> dict[str, Any]:
  block, windows = model.layers[0], windows_config(model)
  rotaries = [b.attention.rotary for b in model.layers]
  rotary = next((r for r in rotaries if r is not None), Rotary())
  return {**Sizes.of(model).config(), **windows, 'use_sliding_window': windows['sliding_window'] is not None,
          'hidden_act': 'silu', 'attention_bias': block.attention.bias, 'mlp_bias': block.feed_forward.bias,
          'no_rope_layers': [int(r is not None) for r in rotaries],
          **rope_config(rotary, block.attention.head_size)}


FAMILY = names.Family('SmolLM3ForCausalLM', 'smollm3', model, config, names.llama_layer, names.llama_outer)
