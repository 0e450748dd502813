"""Qwen 3 with experts (Yang et al. 2025): experts in some layers or all; all layers have a window, or none."""
from typing import Any

from lm.hf import experts, names
from lm.hf.config import Config, Sizes
from lm.hf.rope import rope, rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import moe, stack, transformer


def model(c: Config) -> transformer.Transformer:
  c.defaults({'num_key_value_heads': 4, 'sliding_window': 4096})
  s = Sizes.read(c)
  c.only('hidden_act', 'silu')
  c.unread('shared_expert_intermediate_size', 0)   # of Qwen 3 Coder
  c.unread('qkv_bias', False)
  c.unread('use_qk_norm', True)
  window = c.size('sliding_window', None)
  if not c.get('use_sliding_window', bool, False):
    window = None
    c.size('max_window_layers', None)   # it has no effect without windows
  attention = attend.Attention(s.heads, s.kv_heads, s.head_size, rope(c, s.max_length, s.head_size),
                               bias=c.get('attention_bias', bool, False), query_norm=parts.RMSNorm(s.eps),
                               key_norm=parts.RMSNorm(s.eps), scores=attend.AttentionScores(window=window))
  count = experts.count(c, 128)
  router = moe.SoftmaxRouter(experts.top_k(c, count, 8), c.get('norm_topk_prob', bool, False))
  dense, mixture = parts.FeedForward(s.hidden), moe.Experts(router, count, c.size('moe_intermediate_size', 768))
  blocks = [parts.Block(attention, mixture if sparse else dense, parts.RMSNorm(s.eps), parts.RMSNorm(s.eps))
            for sparse in experts.sparse(c, s.layers)]
  return transformer.Transformer(s.vocab, s.width, stack.stacks(blocks), parts.RMSNorm(s.eps), s.max_length,
                                 tied=s.tied)


def config(model: transformer.Transformer) -> dict[str, Any]:
  attention, mixture = model.layers[0].attention, experts.first(model)
  return {**Sizes.of(model).config(), **experts.sparse_config(model), 'hidden_act': 'silu',
          'sliding_window': attention.scores.window, 'use_sliding_window': attention.scores.window is not None,
          'attention_bias': attention.bias, 'num_experts': mixture.experts,
          'num_experts_per_tok': mixture.router.top_k, 'norm_topk_prob': mixture.router.renormalize,
          'moe_intermediate_size': mixture.hidden,
          **rope_config(attention.rotary, attention.head_size)}


FAMILY = names.Family('Qwen3MoeForCausalLM', 'qwen3_moe', model, config, experts.qwen_layer, names.llama_outer)
