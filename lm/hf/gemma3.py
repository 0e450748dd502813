"""Gemma 3 (Gemma Team 2025): Gemma 2 with norms of queries and keys instead of soft caps.

Every sixth layer has no window, and rotary positions with a larger theta. Of multimodal files, only the language model
is read.
"""
from typing import Any

from lm.hf import names
from lm.hf.config import Config, Sizes, windows, windows_config
from lm.hf.rope import rope, typed_rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack, transformer

# Multimodal files omit fields with these values.
_DEFAULTS = {
    'vocab_size': 262_208, 'hidden_size': 2304, 'intermediate_size': 9216, 'num_hidden_layers': 26,
    'num_attention_heads': 8, 'num_key_value_heads': 4, 'head_dim': 256, 'max_position_embeddings': 131_072,
    'tie_word_embeddings': True, 'sliding_window': 4096, 'query_pre_attn_scalar': 256}


def model(c: Config) -> transformer.Transformer:
  c.defaults(_DEFAULTS)
  s = Sizes.read(c)
  c.only('hidden_activation', 'gelu_pytorch_tanh')
  c.only('use_bidirectional_attention', False)
  c.only('attn_logit_softcapping')
  full = rope(c, s.max_length, s.head_size, 1e6, 'full_attention')
  local = rope(c, s.max_length, s.head_size, c.get('rope_local_base_freq', float, 1e4), 'sliding_attention')
  scale = c.size('query_pre_attn_scalar') ** -0.5
  period = c.size('_sliding_window_pattern', c.size('sliding_window_pattern', 6))
  def norm():
    return parts.RMSNorm(s.eps, offset=1.)
  def block(window):
    attention = attend.Attention(s.heads, s.kv_heads, s.head_size, full if window is None else local,
                                 bias=c.get('attention_bias', bool, False), query_norm=norm(), key_norm=norm(),
                                 scores=attend.AttentionScores(scale, window=window))
    return parts.Block(attention, parts.FeedForward(s.hidden, parts.gelu_gated), norm(), norm(), norm(), norm())
  blocks = [block(window) for window in windows(c, s.layers, lambda i: (i + 1) % period != 0)]
  return transformer.Transformer(s.vocab, s.width, stack.stacks(blocks), norm(), s.max_length, tied=s.tied,
                                 embedding_scale=s.width ** 0.5,
                                 softcap=c.get('final_logit_softcapping', float, None))


def config(model: transformer.Transformer) -> dict[str, Any]:
  attention = model.layers[0].attention
  return {**Sizes.of(model).config(), **windows_config(model), 'hidden_activation': 'gelu_pytorch_tanh',
          'attention_bias': attention.bias, 'query_pre_attn_scalar': round(attention.scores.scale ** -2),
          'final_logit_softcapping': model.softcap, **typed_rope_config(model, 'rope_local_base_freq')}


FAMILY = names.Family('Gemma3ForCausalLM', 'gemma3_text', model, config, names.llama_layer, names.llama_outer)

WITH_IMAGES = names.with_images(
    FAMILY, 'Gemma3ForConditionalGeneration', 'gemma3',
    ('vision_config', 'mm_tokens_per_image', 'boi_token_index', 'eoi_token_index', 'image_token_index'),
    'vision_tower.', tied=True)
