"""Multi-head latent attention, whose cache is one small vector per token. Shape legend: `transformer.py`."""
import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import sharding
from lm.models import attention, layers
from lm.models.context import Context
from lm.models.rotary import Rotary


class LatentCache(NamedTuple):
  """The latent of keys and values, then the rotated key that all heads share: C = `key_value_rank + rope_size`."""
  latent_BSC: jax.Array

  def attend(self, q_BTNC: jax.Array, latent_BTC: jax.Array, visible: attention.Visible,
             scores: attention.AttentionScores
             ) -> tuple[jax.Array, 'LatentCache']:
    """Writes T latents from slot `visible.start` on. Returns attention over all slots [B, T, N, C], and the cache."""
    cache = LatentCache(attention.write(self.latent_BSC, latent_BTC, visible.start))
    latents_B1SC = cache.latent_BSC[:, None]   # all heads share them, as keys and as values
    return attention.attend(q_BTNC, latents_B1SC, latents_B1SC, visible, scores), cache


class LatentAttention(nn.Module):
  """Multi-head latent attention (DeepSeek-AI 2024, DeepSeek-V2): keys and values are projections of a small latent.

  The query and key of a head have `nope_size` entries without positions and `rope_size` rotated entries; the rotated
  key is the same for all heads. Queries are projections of a latent too, unless `query_rank` is None. With a cache,
  `key_up` is applied to the query, and `value_up` to the output of attention, so that all heads share one key and
  value, the latent. A `scores.scale` of None means 1 / sqrt(nope_size + rope_size). With `bias`, the projections from
  and to the model's width have biases, except the one that computes queries without a latent.
  """
  heads: int
  query_rank: int | None
  key_value_rank: int
  nope_size: int
  rope_size: int
  value_size: int
  rotary: Rotary = Rotary(interleaved=True)
  query_norm: nn.Module | None = layers.RMSNorm()
  key_value_norm: nn.Module | None = layers.RMSNorm()
  scores: attention.AttentionScores = attention.AttentionScores()
  bias: bool = False
  std: float = 0.02
  out_std: float = 0.02

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: LatentCache | None = None):
    positions_BT, visible, x_BTD = context.positions_BT, context.visible, sharding.enter(x_BTD)
    scores = self.scores
    if scores.scale is None:
      scores = dataclasses.replace(scores, scale=(self.nope_size + self.rope_size) ** -0.5)
    q = self._query(x_BTD)
    q, q_rope = q[..., :self.nope_size], self.rotary(q[..., self.nope_size:], positions_BT, visible.segments_BT)
    latent = self._down('key_value_down', x_BTD, self.key_value_rank)
    latent = latent if self.key_value_norm is None else self.key_value_norm(latent)
    k_rope = self._down('key_rope', x_BTD, self.rope_size)[:, :, None]
    k_rope = self.rotary(k_rope, positions_BT, visible.segments_BT)
    # Here and below, the letter D stands for the rank, so that it is sharded like the model's width.
    key_up = self._up('key_up', self.nope_size, x_BTD.dtype)
    value_up = self._up('value_up', self.value_size, x_BTD.dtype)
    if cache is None:
      k = layers.einsum('BTD,DNH->BTNH', latent, key_up)
      v = context.name('value', layers.einsum('BTD,DNH->BTNH', latent, value_up))
      q = context.name('query', jnp.concatenate([q, q_rope], axis=-1))
      shared = sharding.constrain(jnp.broadcast_to(k_rope, q_rope.shape), 'BTNH')
      k = context.name('key', jnp.concatenate([k, shared], axis=-1))
      y = attention.attend(q, k, v, visible, scores, key=context.key)
    else:
      q = jnp.concatenate([layers.einsum('BTNH,RNH->BTNR', q, key_up), q_rope], axis=-1)
      y, cache = cache.attend(q, jnp.concatenate([latent, k_rope[:, :, 0]], axis=-1), visible, scores)
      y = layers.einsum('BTNR,RNH->BTNH', y[..., :self.key_value_rank], value_up)
    y = context.tap('attended', y)
    return attention.output(self, y, x_BTD.shape[-1], self.bias, self.out_std), cache

  def _query(self, x):
    """Returns queries [B, T, heads, nope_size + rope_size] before the rotation."""
    size = self.nope_size + self.rope_size
    if self.query_rank is None:
      return attention.project(self, 'query', x, 'NH', self.heads, size, False, self.std)
    x = self._down('query_down', x, self.query_rank)
    x = x if self.query_norm is None else self.query_norm(x)
    return attention.project(self, 'query_up', x, 'NH', self.heads, size, False, self.std)

  def _down(self, name, x, rank):
    """Declares and applies a projection to a latent, which is not split over heads' mesh axis."""
    w = layers.weight(self, name, 'DR', (x.shape[-1], rank), nn.initializers.normal(self.std), x.dtype)
    y = layers.einsum('BTD,DR->BTR', x, w)
    return layers.add_bias(self, name + '_bias', '-', y) if self.bias else y

  def _up(self, name, size, dtype):
    return layers.weight(self, name, 'DNH', (self.key_value_rank, self.heads, size),
                         nn.initializers.normal(self.std), dtype, inputs='D')

  @nn.nowrap
  def init_cache(self, batch_size: int, slots: int, dtype) -> LatentCache:
    shape = batch_size, slots, self.key_value_rank + self.rope_size
    return LatentCache(sharding.constrain(jnp.zeros(shape, dtype), 'BSC'))
