"""Qwen 2 and 2.5 (Yang et al. 2024): Llama with biases of queries, keys and values; windows on the upper layers."""
from typing import Any

from lm.hf import names
from lm.hf.config import Config, Sizes, optional_windows, windows_config
from lm.hf.rope import rope, rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack, transformer


def model(c: Config) -> transformer.Transformer:
  c.defaults({'num_key_value_heads': 32, 'sliding_window': 4096, 'max_window_layers': 28})
  s = Sizes.read(c)
  c.only('hidden_act', 'silu')
  c.unread('use_mrope', False)   # of Qwen 2.5's base models
  rotary, first = rope(c, s.max_length, s.head_size), c.get('max_window_layers', int)
  def block(window):
    attention = attend.Attention(s.heads, s.kv_heads, s.head_size, rotary, bias=True, out_bias=False,
                                 scores=attend.AttentionScores(window=window))
    return parts.Block(attention, parts.FeedForward(s.hidden), parts.RMSNorm(s.eps), parts.RMSNorm(s.eps))
  blocks = [block(window) for window in optional_windows(c, s.layers, lambda i: i >= first)]
  return transformer.Transformer(s.vocab, s.width, stack.stacks(blocks), parts.RMSNorm(s.eps), s.max_length,
                                 tied=s.tied)


def config(model: transformer.Transformer) -> dict[str, Any]:
  attention, windows = model.layers[0].attention, windows_config(model)
  return {**Sizes.of(model).config(), **windows, 'use_sliding_window': windows['sliding_window'] is not None,
          'hidden_act': 'silu', **rope_config(attention.rotary, attention.head_size)}


FAMILY = names.Family('Qwen2ForCausalLM', 'qwen2', model, config, names.llama_layer, names.llama_outer)
