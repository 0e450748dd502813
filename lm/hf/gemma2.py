"""Gemma 2 (Gemma Team 2024): soft caps, norms before and after modules, a window in every other layer.

The scale of a norm is 1 + w, where w is the tensor in the file.
"""
from typing import Any

from lm.hf import names
from lm.hf.config import Config, Sizes, windows, windows_config
from lm.hf.rope import rope, rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack, transformer


def model(c: Config) -> transformer.Transformer:
  c.defaults({'num_key_value_heads': 4, 'head_dim': 256, 'tie_word_embeddings': True, 'sliding_window': 4096,
              'query_pre_attn_scalar': 256, 'attn_logit_softcapping': 50., 'final_logit_softcapping': 30.})
  s = Sizes.read(c)
  c.only('hidden_activation', 'gelu_pytorch_tanh')
  c.only('hidden_act', 'gelu_pytorch_tanh')
  c.only('use_bidirectional_attention', False)
  c.unread('sliding_window_size', c.get('sliding_window', int, None))   # of the larger models
  rotary, scale = rope(c, s.max_length, s.head_size), c.size('query_pre_attn_scalar') ** -0.5
  def norm():
    return parts.RMSNorm(s.eps, offset=1.)
  def block(window):
    scores = attend.AttentionScores(scale, c.get('attn_logit_softcapping', float, None), window)
    attention = attend.Attention(s.heads, s.kv_heads, s.head_size, rotary, bias=c.get('attention_bias', bool, False),
                                 scores=scores)
    return parts.Block(attention, parts.FeedForward(s.hidden, parts.gelu_gated), norm(), norm(), norm(), norm())
  blocks = [block(window) for window in windows(c, s.layers, lambda i: i % 2 == 0)]
  return transformer.Transformer(s.vocab, s.width, stack.stacks(blocks), norm(), s.max_length, tied=s.tied,
                                 embedding_scale=s.width ** 0.5,
                                 softcap=c.get('final_logit_softcapping', float, None))


def config(model: transformer.Transformer) -> dict[str, Any]:
  attention = model.layers[0].attention
  return {**Sizes.of(model).config(), **windows_config(model), 'hidden_activation': 'gelu_pytorch_tanh',
          'attention_bias': attention.bias, 'query_pre_attn_scalar': round(attention.scores.scale ** -2),
          'attn_logit_softcapping': attention.scores.softcap, 'final_logit_softcapping': model.softcap,
          **rope_config(attention.rotary, attention.head_size)}


FAMILY = names.Family('Gemma2ForCausalLM', 'gemma2', model, config, names.llama_layer, names.llama_outer)
