"""Attention modules and their cache; `kernel_choice` has the computation. Shape legend: `transformer.py`."""
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import sharding
from lm.models import layers
from lm.models.context import Context
from lm.models.kernel_choice import attend
from lm.models.kernels import AttentionScores, Visible
from lm.models.rotary import Rotary


@dataclasses.dataclass(frozen=True)
class Temperature:
  """1 + scale * log(1 + floor((position + 1) / floor)), so that scores stay sharp over long contexts (Llama 4 2025)."""
  floor: int
  scale: float

  def __call__(self, positions_BT: jax.Array) -> jax.Array:
    return 1 + self.scale * jnp.log1p(jnp.floor((positions_BT.astype(jnp.float32) + 1) / self.floor))


def write(slots: jax.Array, new: jax.Array, index: jax.Array, axis: int = 1) -> jax.Array:
  """Returns `slots` with `new` written from slot `index` of `axis` on. `index` is a scalar, or has one entry a row."""
  new = new.astype(slots.dtype)
  if index.ndim == 0:
    return jax.lax.dynamic_update_slice_in_dim(slots, new, index, axis)
  write_rows = jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=axis - 1))
  rows = sharding.spec('B')
  if rows is None:
    return write_rows(slots, new, index)
  layout = jax.typeof(slots).sharding.spec
  sharded = jax.shard_map(write_rows, in_specs=(layout, layout, rows), out_specs=layout, check_vma=False)
  return sharded(slots, new, index)


class LayerCache(NamedTuple):
  """Keys and values of one layer. The axis of heads comes before that of slots, so that a step reads contiguously."""
  k_BKSH: jax.Array
  v_BKSH: jax.Array

  def attend(self, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, visible: Visible, scores: AttentionScores,
             sinks_N: jax.Array | None = None) -> tuple[jax.Array, 'LayerCache']:
    """Writes T keys and values from slot `visible.start` on. Returns attention over all slots, and the new cache."""
    cache = LayerCache(*(write(old, new.swapaxes(1, 2), visible.start, 2) for old, new in zip(self, (k_BTKH, v_BTKH))))
    return attend(q_BTNH, *cache, visible, scores, sinks_N), cache


def project(module: nn.Module, name: str, x_BTD: jax.Array, axes: str, heads: int, size: int, bias: bool,
            std: float) -> jax.Array:
  """Declares and applies a projection to heads. Returns [B, T, heads, size]; `axes` is 'NH' or 'KH'."""
  w = layers.weight(module, name, 'D' + axes, (x_BTD.shape[-1], heads, size), nn.initializers.normal(std), x_BTD.dtype,
                    inputs='D')
  y = layers.einsum(f'BTD,D{axes}->BT{axes}', x_BTD, w)
  return layers.add_bias(module, name + '_bias', axes, y) if bias else y


def output(module: nn.Module, y_BTNH: jax.Array, width: int, bias: bool, std: float) -> jax.Array:
  """Declares and applies the projection from heads to the model's width."""
  shape = (*y_BTNH.shape[2:], width)
  out = layers.weight(module, 'out', 'NHD', shape, nn.initializers.normal(std), y_BTNH.dtype, inputs='NH')
  # Heads and their entries are merged into one axis. To contract two axes, XLA on CPU copies the weights at each token.
  y = layers.einsum('BTN,ND->BTD', sharding.merge_axes(y_BTNH, 2), layers.merge_inputs(out))
  return layers.add_bias(module, 'out_bias', '-', y) if bias else y


class Attention(nn.Module):
  """Multi-head attention (Vaswani et al. 2017); grouped-query if `kv_heads < heads` (Ainslie et al. 2023).

  `query_norm` and `key_norm` are applied before the rotation, or after it if `norms_last` is true. Queries are
  multiplied by `temperature(positions)`. With `sinks`, each head has a learned score for attending to nothing.
  """
  heads: int
  kv_heads: int
  head_size: int
  rotary: Rotary | None = None
  bias: bool = False
  out_bias: bool | None = None   # None: the same as `bias`
  query_norm: nn.Module | None = None
  key_norm: nn.Module | None = None
  norms_last: bool = False
  temperature: Callable[[jax.Array], jax.Array] | None = None
  scores: AttentionScores = AttentionScores()
  sinks: bool = False
  std: float = 0.02
  out_std: float = 0.02
  query_std: float | None = None   # None: the same as `std`

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: LayerCache | None = None):
    """Returns the output [B, T, D] and the new cache, if any. All attention modules have this signature."""
    positions_BT, visible, x_BTD = context.positions_BT, context.visible, sharding.enter(x_BTD)
    std = self.std if self.query_std is None else self.query_std
    q = project(self, 'query', x_BTD, 'NH', self.heads, self.head_size, self.bias, std)
    k = project(self, 'key', x_BTD, 'KH', self.kv_heads, self.head_size, self.bias, self.std)
    v = project(self, 'value', x_BTD, 'KH', self.kv_heads, self.head_size, self.bias, self.std)

    def normalise(q, k):
      q = q if self.query_norm is None else self.query_norm(q)
      k = k if self.key_norm is None else self.key_norm(k)
      return q, k

    if not self.norms_last:
      q, k = normalise(q, k)
    if self.rotary is not None:
      q, k = (self.rotary(x, positions_BT, visible.segments_BT) for x in (q, k))
    if self.norms_last:
      q, k = normalise(q, k)
    if self.temperature is not None:
      q = (q * self.temperature(positions_BT)[:, :, None, None]).astype(q.dtype)
    q, k, v = context.name('query', q), context.name('key', k), context.name('value', v)
    sinks = layers.weight(self, 'sinks', 'N', (self.heads,), nn.initializers.zeros) if self.sinks else None
    if cache is None:
      y = attend(q, k, v, visible, self.scores, sinks, context.key)
    else:
      y, cache = cache.attend(q, k, v, visible, self.scores, sinks)
    y = context.tap('attended', y)
    return output(self, y, x_BTD.shape[-1], self.bias if self.out_bias is None else self.out_bias, self.out_std), cache

  @nn.nowrap
  def init_cache(self, batch_size: int, slots: int, dtype) -> LayerCache:
    shape = batch_size, self.kv_heads, slots, self.head_size
    return LayerCache(*(sharding.constrain(jnp.zeros(shape, dtype), 'BKSH') for _ in 'kv'))
