"""Llama 4 (Meta 2025): experts, and attention within chunks.

Every fourth layer attends to the whole context and has no rotary positions (Yang et al. 2025, RNoPE). Of multimodal
files, only the language model is read.
"""
from typing import Any

import numpy as np

from lm.hf import names
from lm.hf.config import Config, Sizes
from lm.hf.rope import rope, rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import moe, stack, transformer
from lm.models.rotary import Rotary

_TYPES = 'full_attention', 'chunked_attention'
# Multimodal files omit fields with these values.
_DEFAULTS = {
    'vocab_size': 202_048, 'hidden_size': 5120, 'intermediate_size': 8192, 'intermediate_size_mlp': 16_384,
    'num_hidden_layers': 48, 'num_attention_heads': 40, 'num_key_value_heads': 8, 'head_dim': 128,
    'max_position_embeddings': 131_072, 'rms_norm_eps': 1e-5, 'num_local_experts': 16, 'num_experts_per_tok': 1,
    'attention_chunk_size': 8192, 'floor_scale': 8192, 'attn_scale': 0.1}


def model(c: Config) -> transformer.Transformer:
  c.defaults(_DEFAULTS)
  s = Sizes.read(c)
  c.only('hidden_act', 'silu')
  c.get('for_llm_compressor', bool, None)   # of Meta's own tools
  has_rotary, sparse, k = _has_rotary(c, s.layers), _sparse(c, s.layers), c.size('num_experts_per_tok')
  experts = moe.Experts(moe.SigmoidRouter(k), c.size('num_local_experts'), s.hidden, weight_inputs=True,
                        shared=parts.FeedForward(s.hidden))
  if k > experts.experts:
    c.refuse('num_experts_per_tok', k, f'at most num_local_experts={experts.experts}')
  dense = parts.FeedForward(c.size('intermediate_size_mlp'))
  attention = attend.Attention(s.heads, s.kv_heads, s.head_size, bias=c.get('attention_bias', bool, False))
  with_rotary = attention.clone(rotary=rope(c, s.max_length, s.head_size, 500_000., interleaved=True))
  if c.get('use_qk_norm', bool, True):
    with_rotary = with_rotary.clone(query_norm=parts.RMSNorm(s.eps, learned=False),
                                    key_norm=parts.RMSNorm(s.eps, learned=False), norms_last=True)
  temperature = attend.Temperature(c.size('floor_scale'), c.get('attn_scale', float))
  if c.choice('attn_temperature_tuning', {True: True, False: False, 4: True}, True):   # 4 in Meta's first files
    attention = attention.clone(temperature=temperature)
  blocks = [parts.Block((with_rotary if has_rotary[i] else attention).clone(scores=attend.AttentionScores(chunk=chunk)),
                        experts if i in sparse else dense, parts.RMSNorm(s.eps), parts.RMSNorm(s.eps))
            for i, chunk in enumerate(_chunks(c, has_rotary[:s.layers]))]
  return transformer.Transformer(s.vocab, s.width, stack.stacks(blocks), parts.RMSNorm(s.eps), s.max_length,
                                 tied=s.tied)


def _has_rotary(c: Config, layers: int) -> list[int]:
  """Reads which layers have rotary positions, as 0 or 1."""
  interval = c.size('no_rope_layer_interval', 4)
  # Despite the name of the field, 1 stands for a layer with rotary positions.
  has_rotary = c.get('no_rope_layers', list, None) or [int((i + 1) % interval != 0) for i in range(layers)]
  if len(has_rotary) < layers or not all(value in (0, 1) for value in has_rotary):
    c.refuse('no_rope_layers', has_rotary, f'0 or 1 for each of {layers} layers')
  return has_rotary


def _sparse(c: Config, layers: int) -> list[int]:
  """Reads the indices of the layers that have experts."""
  step = c.size('interleave_moe_layer_step', 1)
  routed = c.get('moe_layers', list, list(range(step - 1, layers, step)))
  if not all(type(i) is int and 0 <= i < layers for i in routed):
    c.refuse('moe_layers', routed, f'numbers from 0 to {layers - 1}')
  return routed


def _chunks(c: Config, has_rotary: list[int]) -> list[int | None]:
  """Reads the size of the chunks within which each layer attends; None for layers without chunks."""
  chunk = c.size('attention_chunk_size', None)
  types = c.get('layer_types', list, [_TYPES[value] for value in has_rotary])
  if len(types) != len(has_rotary) or not all(t in _TYPES for t in types):
    c.refuse('layer_types', types, f'{len(has_rotary)} of {" or ".join(_TYPES)}')
  if chunk is None and _TYPES[1] in types:
    c.refuse('attention_chunk_size', chunk, f'a number, for layer_types has {_TYPES[1]}')
  return [chunk if t == _TYPES[1] else None for t in types]


def config(model: transformer.Transformer) -> dict[str, Any]:
  attentions, layers = [b.attention for b in model.layers], [b.feed_forward for b in model.layers]
  sparse = [i for i, f in enumerate(layers) if isinstance(f, moe.Experts)]
  dense = next((f for f in layers if not isinstance(f, moe.Experts)), None)
  experts = layers[sparse[0]] if sparse else moe.Experts(moe.SigmoidRouter(), 1, 1)   # stands for none
  rotating = next((a for a in attentions if a.rotary), attentions[0])
  temperature = next((a.temperature for a in attentions if a.temperature), None)
  tuned = {'floor_scale': temperature.floor, 'attn_scale': temperature.scale} if temperature else {}
  chunks = [a.scores.chunk for a in attentions]
  return {**Sizes.of(model).config(), 'intermediate_size': experts.hidden,
          'intermediate_size_mlp': dense.hidden if dense else experts.hidden, 'hidden_act': 'silu',
          'num_local_experts': experts.experts, 'num_experts_per_tok': experts.router.top_k, 'moe_layers': sparse,
          'no_rope_layers': [int(a.rotary is not None) for a in attentions],
          'use_qk_norm': rotating.query_norm is not None, 'attention_bias': rotating.bias,
          'attn_temperature_tuning': temperature is not None, **tuned,
          'attention_chunk_size': next(filter(None, chunks), None),
          'layer_types': [_TYPES[chunk is not None] for chunk in chunks],
          **rope_config(rotating.rotary or Rotary(), rotating.head_size)}


def layer(block: parts.Block) -> list[names.Map]:
  maps = [*names.llama_attention(block.attention), names.same('input_layernorm.weight', 'attention_norm/scale'),
          names.same('post_attention_layernorm.weight', 'feed_forward_norm/scale')]
  if not isinstance(block.feed_forward, moe.Experts):
    return [*maps, *names.llama_feed_forward(block.feed_forward, 'feed_forward.')]
  gate_up = names.Map(('feed_forward.experts.gate_up_proj',), ('feed_forward/gate', 'feed_forward/up'),
                      lambda w: tuple(np.split(w, 2, axis=2)), lambda *w: (np.concatenate(w, axis=2),), by_expert=True)
  return [*maps, names.linear('feed_forward.router.weight', 'feed_forward/router/router'), gate_up,
          names.same('feed_forward.experts.down_proj', 'feed_forward/down'),
          *names.llama_feed_forward(block.feed_forward.shared, 'feed_forward.shared_expert.', 'feed_forward/shared')]


FAMILY = names.Family('Llama4ForCausalLM', 'llama4_text', model, config, layer, names.llama_outer)

WITH_IMAGES = names.with_images(
    FAMILY, 'Llama4ForConditionalGeneration', 'llama4',
    ('vision_config', 'boi_token_index', 'eoi_token_index', 'image_token_index'), 'vision_model.', tied=False)
