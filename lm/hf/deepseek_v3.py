"""DeepSeek-V3 and R1 (DeepSeek-AI 2024), and Kimi K2: latent attention, and many small experts in groups.

The layers that predict further tokens, for training and speculation, are not read.
"""
import math
from typing import Any

import numpy as np

from lm.hf import experts, names
from lm.hf.config import Config
from lm.hf.rope import mscale, older_fields, parameters, rope
from lm.models import attention as attend
from lm.models import latent, moe, stack, transformer
from lm.models import layers as parts
from lm.models.rotary import Yarn

_DEFAULTS = {
    'num_key_value_heads': 128, 'q_lora_rank': 1536, 'kv_lora_rank': 512, 'qk_nope_head_dim': 128,
    'qk_rope_head_dim': 64, 'v_head_dim': 128, 'moe_intermediate_size': 2048, 'n_routed_experts': 256,
    'n_shared_experts': 1, 'num_experts_per_tok': 8, 'n_group': 8, 'topk_group': 4, 'first_k_dense_replace': 3}
# Fields for which DeepSeek's own code supports no other value.
_FIXED = {'hidden_act': 'silu', 'scoring_func': 'sigmoid', 'topk_method': 'noaux_tc', 'moe_layer_freq': 1}
# Fields of training, which may have any value.
_ASIDE = {'num_nextn_predict_layers': int, 'aux_loss_alpha': float, 'seq_aux': bool}


def model(c: Config) -> transformer.Transformer:
  c.defaults(_DEFAULTS)
  for name, supported in _FIXED.items():
    c.only(name, supported)
  for name, kind in _ASIDE.items():
    c.get(name, kind, None)
  width, eps, first = c.size('hidden_size'), c.get('rms_norm_eps', float, 1e-6), c.get('first_k_dense_replace', int)
  attention, max_length = _attention(c), c.size('max_position_embeddings')
  dense, sparse = parts.FeedForward(c.size('intermediate_size')), _experts(c)
  blocks = [parts.Block(attention, dense if i < first else sparse, parts.RMSNorm(eps), parts.RMSNorm(eps))
            for i in range(c.size('num_hidden_layers'))]
  return transformer.Transformer(c.size('vocab_size'), width, stack.stacks(blocks), parts.RMSNorm(eps), max_length,
                                 tied=c.get('tie_word_embeddings', bool, False))


def _attention(c: Config) -> latent.LatentAttention:
  heads, rank = c.size('num_attention_heads'), c.size('q_lora_rank', None)
  nope_size, rope_size = c.size('qk_nope_head_dim'), c.size('qk_rope_head_dim')
  max_length, size = c.size('max_position_embeddings'), nope_size + rope_size
  for name, value in {'num_key_value_heads': heads, 'head_dim': rope_size, 'qk_head_dim': size}.items():
    c.only(name, value)   # they follow from others
  rotary = rope(c, max_length, rope_size, interleaved=c.get('rope_interleave', bool, True))
  scale, r = None, c.inner('rope_parameters') or c.inner('rope_scaling')
  score_scale = r.get('mscale_all_dim', float, 0.) if r else 0.
  if score_scale and isinstance(rotary.scaling, Yarn) and rotary.scaling.factor > 1:
    factor = mscale(rotary.scaling.factor, score_scale)
    scale = size ** -0.5 * factor * factor
    if not 0 < scale < math.inf:
      c.refuse('mscale_all_dim', score_scale, 'a number near 1')
  return latent.LatentAttention(heads, rank, c.size('kv_lora_rank'), nope_size, rope_size, c.size('v_head_dim'), rotary,
                                query_norm=None if rank is None else parts.RMSNorm(),
                                scores=attend.AttentionScores(scale),
                                bias=c.get('attention_bias', bool, False))


def _experts(c: Config) -> moe.Experts:
  count, hidden, k = c.size('n_routed_experts'), c.size('moe_intermediate_size'), c.size('num_experts_per_tok')
  groups, best = c.size('n_group'), c.size('topk_group')
  if count % groups:
    c.refuse('n_group', groups, f'a divisor of n_routed_experts={count}')
  if best > groups:
    c.refuse('topk_group', best, f'at most n_group={groups}')
  if k > count // groups * best:
    c.refuse('num_experts_per_tok', k, f'at most the {count // groups * best} experts of topk_group={best} groups')
  router = moe.SigmoidGroupRouter(k, groups, best, c.get('routed_scaling_factor', float, 2.5),
                                  c.get('norm_topk_prob', bool, True))
  return moe.Experts(router, count, hidden, shared=parts.FeedForward(hidden * c.size('n_shared_experts')))


def config(model: transformer.Transformer) -> dict[str, Any]:
  attention, layers = model.layers[0].attention, [block.feed_forward for block in model.layers]
  dense = [f for f in layers if not isinstance(f, moe.Experts)]
  sparse = next((f for f in layers if isinstance(f, moe.Experts)), None)
  return {'hidden_size': model.width, 'num_hidden_layers': len(layers), 'num_attention_heads': attention.heads,
          'num_key_value_heads': attention.heads, 'q_lora_rank': attention.query_rank,
          'kv_lora_rank': attention.key_value_rank, 'qk_nope_head_dim': attention.nope_size,
          'qk_rope_head_dim': attention.rope_size, 'v_head_dim': attention.value_size, 'attention_bias': attention.bias,
          'intermediate_size': dense[0].hidden if dense else sparse.hidden, 'vocab_size': model.vocab,
          'max_position_embeddings': model.max_length, 'rms_norm_eps': model.norm.eps,
          'tie_word_embeddings': model.tied, 'first_k_dense_replace': len(dense), 'num_nextn_predict_layers': 0,
          'hidden_act': 'silu', 'rope_interleave': attention.rotary.interleaved,
          **older_fields(_parameters(attention)), **(_experts_config(sparse) if sparse else {})}


def _experts_config(sparse: moe.Experts) -> dict[str, Any]:
  router = sparse.router
  return {'moe_intermediate_size': sparse.hidden, 'n_routed_experts': sparse.experts,
          'n_shared_experts': sparse.shared.hidden // sparse.hidden, 'num_experts_per_tok': router.top_k,
          'n_group': router.groups, 'topk_group': router.top_groups, 'routed_scaling_factor': router.scale,
          'norm_topk_prob': router.renormalize}


def _parameters(attention: latent.LatentAttention) -> dict[str, Any]:
  """Returns `rope_parameters`, with the `mscale_all_dim` that gives the scale of the scores, rounded to nine digits."""
  values, scale = parameters(attention.rotary, attention.rope_size), attention.scores.scale
  if scale is None or not isinstance(attention.rotary.scaling, Yarn) or attention.rotary.scaling.factor <= 1:
    return values
  score_scale = math.sqrt(scale * (attention.nope_size + attention.rope_size) ** 0.5) - 1
  return values | {'mscale_all_dim': float(f'{score_scale / (0.1 * math.log(attention.rotary.scaling.factor)):.9g}')}


def attention(a: latent.LatentAttention) -> list[names.Map]:
  size = a.nope_size + a.rope_size
  down = names.Map(('self_attn.kv_a_proj_with_mqa.weight',), ('attention/key_value_down', 'attention/key_rope'),
                   lambda w: tuple(np.split(w.T, [a.key_value_rank], axis=1)),
                   lambda *w: (np.concatenate(w, axis=1).T,))
  up = names.Map(('self_attn.kv_b_proj.weight',), ('attention/key_up', 'attention/value_up'),
                 lambda w: tuple(np.split(w.T.reshape(w.shape[1], a.heads, -1), [a.nope_size], axis=2)),
                 lambda *w: (np.reshape(np.concatenate(w, axis=2), (len(w[0]), -1)).T,))
  maps = [down, names.same('self_attn.kv_a_layernorm.weight', 'attention/key_value_norm/scale'), up,
          names.from_heads('self_attn.o_proj.weight', 'attention/out', a.value_size)]
  if a.query_rank is None:
    maps.append(names.to_heads('self_attn.q_proj.weight', 'attention/query', size))
  else:
    maps += [names.linear('self_attn.q_a_proj.weight', 'attention/query_down'),
             names.same('self_attn.q_a_layernorm.weight', 'attention/query_norm/scale'),
             names.to_heads('self_attn.q_b_proj.weight', 'attention/query_up', size)]
  if a.bias:
    maps += [names.Map(('self_attn.kv_a_proj_with_mqa.bias',),
                       ('attention/key_value_down_bias', 'attention/key_rope_bias'),
                       lambda b: tuple(np.split(b, [a.key_value_rank])), lambda *b: (np.concatenate(b),)),
             names.same('self_attn.o_proj.bias', 'attention/out_bias')]
    if a.query_rank is not None:
      maps.append(names.same('self_attn.q_a_proj.bias', 'attention/query_down_bias'))
  return maps


def layer(block: parts.Block) -> list[names.Map]:
  maps = [*attention(block.attention), names.same('input_layernorm.weight', 'attention_norm/scale'),
          names.same('post_attention_layernorm.weight', 'feed_forward_norm/scale')]
  if not isinstance(block.feed_forward, moe.Experts):
    return [*maps, *names.llama_feed_forward(block.feed_forward)]
  return [*maps, names.same('mlp.gate.e_score_correction_bias', 'feed_forward/router/correction'),
          *experts.tensors(block.feed_forward, 'mlp.', gate='gate_proj', up='up_proj', down='down_proj'),
          *names.llama_feed_forward(block.feed_forward.shared, 'mlp.shared_experts.', 'feed_forward/shared')]


# In V3 and R1, layer 61, counted from 0, predicts a further token. It is read if it is a layer of the model's own.
FAMILY = names.Family('DeepseekV3ForCausalLM', 'deepseek_v3', model, config, layer, names.llama_outer,
                      ignored=lambda name: name.startswith('model.layers.61.') or name.endswith('rotary_emb.inv_freq'))
