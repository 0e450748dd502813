"""OLMo 2 (OLMo et al. 2025): norms after modules instead of before, and of queries and keys over all heads."""
from typing import Any

from lm.hf import names
from lm.hf.config import Config, Sizes
from lm.hf.rope import rope, rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack, transformer


def model(c: Config) -> transformer.Transformer:
  c.defaults({'rms_norm_eps': 1e-5})
  s = Sizes.read(c)
  c.only('hidden_act', 'silu')
  attention = attend.Attention(s.heads, s.kv_heads, s.head_size, rope(c, s.max_length, s.head_size),
                               bias=c.get('attention_bias', bool, False),
                               query_norm=parts.RMSNorm(s.eps, axes='NH'), key_norm=parts.RMSNorm(s.eps, axes='KH'))
  block = parts.Block(attention, parts.FeedForward(s.hidden), None, None, parts.RMSNorm(s.eps), parts.RMSNorm(s.eps))
  return transformer.Transformer(s.vocab, s.width, stack.stacks([block] * s.layers), parts.RMSNorm(s.eps),
                                 s.max_length, tied=s.tied)


def config(model: transformer.Transformer) -> dict[str, Any]:
  attention = model.layers[0].attention
  return {**Sizes.of(model).config(), 'hidden_act': 'silu', 'attention_bias': attention.bias,
          **rope_config(attention.rotary, attention.head_size)}


FAMILY = names.Family('Olmo2ForCausalLM', 'olmo2', model, config, names.llama_layer, names.llama_outer)
