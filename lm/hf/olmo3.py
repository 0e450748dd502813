"""OLMo 3 (Team OLMo 2025): OLMo 2, where three of four layers have a window and rotary positions without scaling."""
from typing import Any

from lm.hf import names
from lm.hf.config import Config, Sizes, windows, windows_config
from lm.hf.rope import rope, typed_rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack, transformer

_THETA = 500_000.


def model(c: Config) -> transformer.Transformer:
  c.defaults({'rms_norm_eps': 1e-5, 'sliding_window': 4096})
  s = Sizes.read(c)
  c.only('hidden_act', 'silu')
  if not c.has('rope_parameters'):   # versions of transformers differ in the theta of layers with windows
    c.only('rope_theta', _THETA, int(_THETA))
  full, local = (rope(c, s.max_length, s.head_size, _THETA, kind) for kind in ('full_attention', 'sliding_attention'))
  def block(window):
    attention = attend.Attention(s.heads, s.kv_heads, s.head_size, full if window is None else local,
                                 bias=c.get('attention_bias', bool, False), query_norm=parts.RMSNorm(s.eps, axes='NH'),
                                 key_norm=parts.RMSNorm(s.eps, axes='KH'), scores=attend.AttentionScores(window=window))
    return parts.Block(attention, parts.FeedForward(s.hidden), None, None, parts.RMSNorm(s.eps), parts.RMSNorm(s.eps))
  blocks = [block(window) for window in windows(c, s.layers, lambda i: (i + 1) % 4 != 0)]
  return transformer.Transformer(s.vocab, s.width, stack.stacks(blocks), parts.RMSNorm(s.eps), s.max_length,
                                 tied=s.tied)


def config(model: transformer.Transformer) -> dict[str, Any]:
  return {**Sizes.of(model).config(), **windows_config(model), 'hidden_act': 'silu',
          'attention_bias': model.layers[0].attention.bias, **typed_rope_config(model)}


FAMILY = names.Family('Olmo3ForCausalLM', 'olmo3', model, config, names.llama_layer, names.llama_outer)
