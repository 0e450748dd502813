"""Mixtral (Jiang et al. 2024): Mistral with mixtures of experts as feed-forward layers."""
from collections.abc import Iterator
from typing import Any

from lm.hf import experts, names
from lm.hf.config import Config, Sizes
from lm.hf.rope import rope, rope_config
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import moe, stack, transformer


def model(c: Config) -> transformer.Transformer:
  c.defaults({'num_key_value_heads': 8})
  s = Sizes.read(c, eps=1e-5)
  c.only('hidden_act', 'silu')
  attention = attend.Attention(s.heads, s.kv_heads, s.head_size, rope(c, s.max_length, s.head_size, 1e6),
                               scores=attend.AttentionScores(window=c.size('sliding_window', None)))
  count = experts.count(c, 8)
  mixture = moe.Experts(moe.SoftmaxRouter(experts.top_k(c, count, 2)), count, s.hidden)
  block = parts.Block(attention, mixture, parts.RMSNorm(s.eps), parts.RMSNorm(s.eps))
  return transformer.Transformer(s.vocab, s.width, stack.stacks([block] * s.layers), parts.RMSNorm(s.eps),
                                 s.max_length, tied=s.tied)


def config(model: transformer.Transformer) -> dict[str, Any]:
  attention, mixture = model.layers[0].attention, experts.first(model)
  return {**Sizes.of(model).config(), 'hidden_act': 'silu', 'sliding_window': attention.scores.window,
          'num_local_experts': mixture.experts, 'num_experts_per_tok': mixture.router.top_k,
          **rope_config(attention.rotary, attention.head_size)}


def feed_forward(mixture: moe.Experts) -> Iterator[names.Map]:
  return experts.tensors(mixture, 'block_sparse_moe.', gate='w1', up='w3', down='w2')


def layer(block: parts.Block) -> list[names.Map]:
  return names.llama_layer(block, feed_forward)


FAMILY = names.Family('MixtralForCausalLM', 'mixtral', model, config, layer, names.llama_outer)
