"""Llama 1 to 3 (Touvron et al. 2023; Grattafiori et al. 2024)."""
from typing import Any

from lm.hf import names
from lm.hf.config import Config, Sizes
from lm.hf.rope import rope, rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack, transformer


def model(c: Config) -> transformer.Transformer:
  s = Sizes.read(c)
  c.only('hidden_act', 'silu')
  c.unread('is_llama_config', True)   # a field of SmolLM 2, from nanotron
  c.unread('rope_interleaved', False)
  c.unread('activation', 'swiglu')   # a field of Falcon 3
  attention = attend.Attention(s.heads, s.kv_heads, s.head_size, rope(c, s.max_length, s.head_size),
                               bias=c.get('attention_bias', bool, False))
  feed_forward = parts.FeedForward(s.hidden, bias=c.get('mlp_bias', bool, False))
  block = parts.Block(attention, feed_forward, parts.RMSNorm(s.eps), parts.RMSNorm(s.eps))
  return transformer.Transformer(s.vocab, s.width, stack.stacks([block] * s.layers), parts.RMSNorm(s.eps),
                                 s.max_length, tied=s.tied)


def config(model: transformer.Transformer) -> dict[str, Any]:
  block = model.layers[0]
  return {**Sizes.of(model).config(), 'hidden_act': 'silu', 'attention_bias': block.attention.bias,
          'mlp_bias': block.feed_forward.bias,
          **rope_config(block.attention.rotary, block.attention.head_size)}


FAMILY = names.Family('LlamaForCausalLM', 'llama', model, config, names.llama_layer, names.llama_outer)
