"""Qwen 1.5 and 2 with experts (Yang et al. 2024): Qwen 2 with mixtures of experts in some layers or all.

Each mixture has a shared expert for all tokens. Every other layer below `max_window_layers` has a window.
"""
from typing import Any

from lm.hf import experts, names
from lm.hf.config import Config, Sizes, optional_windows, windows_config
from lm.hf.rope import rope, rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import moe, stack, transformer


def model(c: Config) -> transformer.Transformer:
  c.defaults({'num_key_value_heads': 16, 'sliding_window': 4096, 'max_window_layers': 28})
  s = Sizes.read(c)
  c.only('hidden_act', 'silu')
  rotary, below, count = rope(c, s.max_length, s.head_size), c.get('max_window_layers', int), c.size('num_experts', 60)
  router = moe.SoftmaxRouter(experts.top_k(c, count, 4), c.get('norm_topk_prob', bool, False))
  mixture = moe.Experts(router, count, c.size('moe_intermediate_size', 1408), shared_gate=True,
                        shared=parts.FeedForward(c.size('shared_expert_intermediate_size', 5632)))
  def block(window, sparse):
    attention = attend.Attention(s.heads, s.kv_heads, s.head_size, rotary, bias=c.get('qkv_bias', bool, True),
                                 out_bias=False, scores=attend.AttentionScores(window=window))
    return parts.Block(attention, mixture if sparse else parts.FeedForward(s.hidden), parts.RMSNorm(s.eps),
                       parts.RMSNorm(s.eps))
  windows = optional_windows(c, s.layers, lambda i: i % 2 == 0 and i < below)
  blocks = [block(window, sparse) for window, sparse in zip(windows, experts.sparse(c, s.layers))]
  return transformer.Transformer(s.vocab, s.width, stack.stacks(blocks), parts.RMSNorm(s.eps), s.max_length,
                                 tied=s.tied)


def config(model: transformer.Transformer) -> dict[str, Any]:
  attention, mixture, windows = model.layers[0].attention, experts.first(model), windows_config(model)
  return {**Sizes.of(model).config(), **experts.sparse_config(model), **windows, 'hidden_act': 'silu',
          'use_sliding_window': windows['sliding_window'] is not None, 'qkv_bias': attention.bias,
          'num_experts': mixture.experts, 'num_experts_per_tok': mixture.router.top_k,
          'norm_topk_prob': mixture.router.renormalize, 'moe_intermediate_size': mixture.hidden,
          'shared_expert_intermediate_size': mixture.shared.hidden,
          **rope_config(attention.rotary, attention.head_size)}


FAMILY = names.Family('Qwen2MoeForCausalLM', 'qwen2_moe', model, config, experts.qwen_layer, names.llama_outer)
