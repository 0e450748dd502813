"""Mistral (Jiang et al. 2023): Llama with a window in all layers or in none."""
from typing import Any

from lm.hf import names
from lm.hf.config import Config, Sizes
from lm.hf.rope import rope, rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack, transformer


def model(c: Config) -> transformer.Transformer:
  c.defaults({'num_key_value_heads': 8, 'sliding_window': 4096})
  s = Sizes.read(c)
  c.only('hidden_act', 'silu')
  attention = attend.Attention(s.heads, s.kv_heads, s.head_size, rope(c, s.max_length, s.head_size),
                               scores=attend.AttentionScores(window=c.size('sliding_window', None)))
  block = parts.Block(attention, parts.FeedForward(s.hidden), parts.RMSNorm(s.eps), parts.RMSNorm(s.eps))
  return transformer.Transformer(s.vocab, s.width, stack.stacks([block] * s.layers), parts.RMSNorm(s.eps),
                                 s.max_length, tied=s.tied)


def config(model: transformer.Transformer) -> dict[str, Any]:
  attention = model.layers[0].attention
  return {**Sizes.of(model).config(), 'hidden_act': 'silu', 'sliding_window': attention.scores.window,
          **rope_config(attention.rotary, attention.head_size)}


FAMILY = names.Family('MistralForCausalLM', 'mistral', model, config, names.llama_layer, names.llama_outer)
