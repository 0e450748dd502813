"""The parts of models: weights, norms, positions, attention, feed-forward. Shape legend: `transformer.py`."""
import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm import sharding

Initializer = Callable[..., jax.Array]


def weight(module: nn.Module, name: str, axes: str, shape: tuple[int, ...], init: Initializer, dtype=None) -> jax.Array:
  """Declares a float32 parameter, split over the mesh at rest; returns it gathered for use, in the compute `dtype`."""
  sharding.check(axes, shape, name)
  value = module.param(name, lambda key: sharding.constrain(init(key, shape, jnp.float32), axes))
  return sharding.gather(value if dtype is None else value.astype(dtype), axes)


def einsum(formula: str, x: jax.Array, w: jax.Array) -> jax.Array:
  """An einsum whose letters also say how the result is split over the mesh."""
  return jnp.einsum(formula, x, w, out_sharding=sharding.spec(formula.split('->')[1]))


def lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
  """Rows of a table whose V axis may be split over `model`: each shard gives the rows that it holds."""
  if sharding.spec('V') is None:
    return table_VD[tokens_BT]

  def local(table, tokens):
    tokens = tokens - jax.lax.axis_index('model') * table.shape[0]
    held = (tokens >= 0) & (tokens < table.shape[0])
    return jax.lax.psum(jnp.where(held[..., None], table[jnp.where(held, tokens, 0)], 0), 'model')

  return jax.shard_map(local, in_specs=(P('model', None), P('data', None)), out_specs=P('data', None, None))(
      table_VD, tokens_BT)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes a share `rate` of the entries and scales the rest (Srivastava et al. 2014); without a key, the identity."""
  if key is None or rate == 0:
    return x
  layout = None if sharding.spec('') is None else jax.typeof(x).sharding
  keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=layout)
  return jnp.where(keep, x / (1 - rate), 0)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32 (Zhang and Sennrich 2019)."""
  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = weight(self, 'scale', '-', x.shape[-1:], nn.initializers.ones)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps)
    return (y * _row(scale, y)).astype(x.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / std * scale + bias, in float32 (Ba et al. 2016)."""
  eps: float = 1e-5
  bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = weight(self, 'scale', '-', x.shape[-1:], nn.initializers.ones)
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps) * _row(scale, y)
    if self.bias:
      y = y + _row(weight(self, 'bias', '-', x.shape[-1:], nn.initializers.zeros), y)
    return y.astype(x.dtype)


def _row(vector: jax.Array, like: jax.Array) -> jax.Array:
  """Broadcasts explicitly, so that no rank promotion happens by accident."""
  return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


@dataclasses.dataclass(frozen=True)
class Rotary:
  """Rotary positions, half-rotation layout (Su et al. 2021): pairs (i, i + H/2) turn by position * theta^(-2i/H)."""
  theta: float = 10_000.

  def __call__(self, x_BTNH: jax.Array, positions_BT: jax.Array) -> jax.Array:
    half = x_BTNH.shape[-1] // 2
    frequency = self.theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency[None, None, None, :]
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    a, b = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x_BTNH.dtype)


class Visible(NamedTuple):
  """Which keys a query sees: those of its own segment that are not later, or that are marked bidirectional.

  Fields are None where they do not restrict. `start` is the slot of the first query among the keys (cached decoding).
  """
  segments_BT: jax.Array | None = None
  key_segments_BS: jax.Array | None = None
  bidirectional_BS: jax.Array | None = None
  start: jax.Array | None = None

  def mask(self, queries: int, keys: int) -> jax.Array | None:
    """Boolean [B or 1, 1, T, S], or None where plain causal order is the whole story."""
    if all(field is None for field in self):
      return None
    first = 0 if self.start is None else self.start
    mask = (jnp.arange(keys)[None, :] <= jnp.arange(queries)[:, None] + first)[None, None]
    if self.bidirectional_BS is not None:
      mask = mask | self.bidirectional_BS[:, None, None, :]
    if self.segments_BT is not None:
      mask = mask & (self.segments_BT[:, None, :, None] == self.key_segments_BS[:, None, None, :])
    return mask


def attend(q_BTNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, visible: Visible) -> jax.Array:
  """Scaled dot-product attention; each shard attends its own rows and heads, so that fused kernels apply."""
  def local(q, k, v, visible):
    mask = visible.mask(q.shape[1], k.shape[1])
    return jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=mask is None)

  if sharding.spec('B') is None:
    return local(q_BTNH, k_BSKH, v_BSKH, visible)
  heads, keys, rows = (P('data', None, 'model', None),) * 2 + (P('data', None),)
  specs = Visible(rows, rows, rows, P())
  return jax.shard_map(local, in_specs=(heads, keys, keys, specs), out_specs=heads, check_vma=False)(
      q_BTNH, k_BSKH, v_BSKH, visible)


class LayerCache(NamedTuple):
  """Keys and values of all layers, and which layer this is: updated in place, one layer at a time."""
  k_LBSKH: jax.Array
  v_LBSKH: jax.Array
  layer: jax.Array
  index: jax.Array     # the slot of the first new token

  def append(self, k_BTKH: jax.Array, v_BTKH: jax.Array) -> tuple['LayerCache', jax.Array, jax.Array]:
    """Writes T new keys and values; returns the cache and this layer's keys and values, [B, S, K, H]."""
    at = (self.layer, 0, self.index, 0, 0)
    k = jax.lax.dynamic_update_slice(self.k_LBSKH, k_BTKH.astype(self.k_LBSKH.dtype)[None], at)
    v = jax.lax.dynamic_update_slice(self.v_LBSKH, v_BTKH.astype(self.v_LBSKH.dtype)[None], at)
    layer = functools.partial(jax.lax.dynamic_index_in_dim, index=self.layer, keepdims=False)
    return self._replace(k_LBSKH=k, v_LBSKH=v), layer(k), layer(v)


class Attention(nn.Module):
  """Multi-head attention (Vaswani et al. 2017), grouped-query where `kv_heads < heads` (Ainslie et al. 2023)."""
  heads: int
  kv_heads: int
  head_size: int
  rotary: Rotary | None = None
  bias: bool = False
  std: float = 0.02
  out_std: float = 0.02

  @nn.compact
  def __call__(self, x_BTD, positions_BT, visible: Visible, cache: LayerCache | None = None):
    width = x_BTD.shape[-1]

    def project(name, axes, heads):
      w = weight(self, name, 'D' + axes, (width, heads, self.head_size), nn.initializers.normal(self.std), x_BTD.dtype)
      y = einsum(f'BTD,D{axes}->BT{axes}', x_BTD, w)
      if self.bias:
        y = y + _row(weight(self, name + '_bias', axes, (heads, self.head_size), nn.initializers.zeros, x_BTD.dtype), y)
      return y

    q, k = project('query', 'NH', self.heads), project('key', 'KH', self.kv_heads)
    v = project('value', 'KH', self.kv_heads)
    if self.rotary is not None:
      q, k = self.rotary(q, positions_BT), self.rotary(k, positions_BT)
    if cache is not None:
      cache, k, v = cache.append(k, v)
    y = attend(q, k.astype(q.dtype), v.astype(q.dtype), visible)
    out = weight(self, 'out', 'NHD', (self.heads, self.head_size, width), nn.initializers.normal(self.out_std), y.dtype)
    y = einsum('BTNH,NHD->BTD', y, out)
    if self.bias:
      y = y + _row(weight(self, 'out_bias', '-', (width,), nn.initializers.zeros, y.dtype), y)
    return y, cache


class FeedForward(nn.Module):
  """down(activation(up(x))); gated, down(activation(gate(x)) * up(x)) (Shazeer 2020)."""
  hidden: int
  activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
  gated: bool = True
  bias: bool = False
  std: float = 0.02
  out_std: float = 0.02

  @nn.compact
  def __call__(self, x_BTD: jax.Array) -> jax.Array:
    width = x_BTD.shape[-1]

    def up(name):
      w = weight(self, name, 'DF', (width, self.hidden), nn.initializers.normal(self.std), x_BTD.dtype)
      y = einsum('BTD,DF->BTF', x_BTD, w)
      if self.bias:
        y = y + _row(weight(self, name + '_bias', 'F', (self.hidden,), nn.initializers.zeros, y.dtype), y)
      return y

    y = self.activation(up('gate')) * up('up') if self.gated else self.activation(up('up'))
    down = weight(self, 'down', 'FD', (self.hidden, width), nn.initializers.normal(self.out_std), y.dtype)
    y = einsum('BTF,FD->BTD', y, down)
    if self.bias:
      y = y + _row(weight(self, 'down_bias', '-', (width,), nn.initializers.zeros, y.dtype), y)
    return y


class Block(nn.Module):
  """Pre-norm residual block: x + attention(norm(x)), then x + feed_forward(norm(x))."""
  attention: nn.Module
  feed_forward: nn.Module
  attention_norm: nn.Module
  feed_forward_norm: nn.Module
  dropout: float = 0.

  @nn.compact
  def __call__(self, x_BTD, positions_BT, visible: Visible, cache: LayerCache | None = None, key=None):
    keys = (None, None) if key is None else jax.random.split(key)
    y, cache = self.attention(self.attention_norm(x_BTD), positions_BT, visible, cache)
    x_BTD = x_BTD + dropout(y, self.dropout, keys[0])
    y = self.feed_forward(self.feed_forward_norm(x_BTD))
    return x_BTD + dropout(y, self.dropout, keys[1]), cache
