"""Attention: rotary positions, which keys a query sees, the kernels, the cache. Shape legend: `transformer.py`."""
import dataclasses
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.models import layers


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

  def mask(self, queries: slice, keys: slice) -> jax.Array:
    """Boolean [B or 1, 1, T, S] of a block of queries and keys."""
    first = 0 if self.start is None else self.start
    mask = jnp.arange(keys.start, keys.stop)[None] <= jnp.arange(queries.start, queries.stop)[:, None] + first
    mask = mask[None, None]
    if self.bidirectional_BS is not None:
      mask = mask | self.bidirectional_BS[:, None, None, keys]
    if self.segments_BT is not None:
      mask = mask & (self.segments_BT[:, None, queries, None] == self.key_segments_BS[:, None, None, keys])
    return mask


def attend(q_BTNH: jax.Array, k: jax.Array, v: jax.Array, visible: Visible) -> jax.Array:
  """softmax(q k / sqrt(H)) v over the visible keys; each shard attends its own rows and heads.

  Keys and values are [B, T, K, H], or those of a cache, [B, K, S, H], where `visible` has a start.
  """
  local, keys = (_attend, 'BTKH') if visible.start is None else (_attend_cached, 'BKSH')
  if sharding.spec('B') is None:
    return local(q_BTNH, k, v, visible)
  heads, keys, rows = sharding.spec('BTNH'), sharding.spec(keys), sharding.spec('BT')
  return jax.shard_map(local, in_specs=(heads, keys, keys, Visible(rows, rows, rows, P())), out_specs=heads,
                       check_vma=False)(q_BTNH, k, v, visible)


def _attend_cached(q_BTNH, k_BKSH, v_BKSH, visible):
  batch, time, heads, size = q_BTNH.shape
  groups, slots = k_BKSH.shape[1:3]
  q = (q_BTNH * size ** -0.5).reshape(batch, time, groups, heads // groups, size).transpose(0, 2, 3, 1, 4)
  weights = jax.nn.softmax(_scores(q.astype(k_BKSH.dtype), k_BKSH, visible, slice(0, time), slice(0, slots)))
  y = jnp.einsum('BKGTS,BKSH->BKGTH', weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
  return y.astype(q_BTNH.dtype).transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _attend(q, k, v, visible):
  fused = sharding.platform() in ('gpu', 'cuda') and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] % 8 == 0
  if not fused:
    return blockwise(q, k, v, visible)
  plain = all(field is None for field in visible)
  mask = None if plain else visible.mask(slice(0, q.shape[1]), slice(0, k.shape[1]))
  y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=plain, implementation='cudnn')
  return checkpoint_name(y, 'attended')


def blockwise(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, visible: Visible) -> jax.Array:
  """Attention a block of queries at a time, whose scores are never kept and never computed above the diagonal.

  The backward pass computes them again from the outputs and the logarithms of the softmax's denominators (Dao et al.
  2022), in float32.
  """
  batch, time, heads, size = q_BTNH.shape
  groups = k_BTKH.shape[2]
  q = (q_BTNH * size ** -0.5).astype(q_BTNH.dtype).reshape(batch, time, groups, heads // groups, size)
  y = _blockwise(q.transpose(0, 2, 3, 1, 4), k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), visible)
  return y.transpose(0, 3, 1, 2, 4).reshape(q_BTNH.shape)


def _blocks(time: int, visible: Visible) -> list[tuple[slice, slice]]:
  """Blocks of queries, each with the keys that it may see."""
  block = max(128, -(-time // 16))   # so that a long row is not a long program
  ends = [(start, min(start + block, time)) for start in range(0, time, block)]
  return [(slice(a, b), slice(0, b if visible.bidirectional_BS is None else time)) for a, b in ends]


def _scores(q, k, visible, queries, keys):
  scores = jnp.einsum('BKGTH,BKSH->BKGTS', q[:, :, :, queries], k[:, :, keys], preferred_element_type=jnp.float32)
  return jnp.where(visible.mask(queries, keys)[:, :, None], scores, -1e30)   # finite: padding sees no key


def _forward(q_BKGTH, k_BKTH, v_BKTH, visible):
  outputs, logs = [], []
  for queries, keys in _blocks(q_BKGTH.shape[3], visible):
    scores = _scores(q_BKGTH, k_BKTH, visible, queries, keys)
    highest = jnp.max(scores, axis=-1, keepdims=True)
    weights = jnp.exp(scores - highest)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    y = jnp.einsum('BKGTS,BKSH->BKGTH', weights.astype(v_BKTH.dtype), v_BKTH[:, :, keys],
                   preferred_element_type=jnp.float32)
    outputs.append((y / total).astype(v_BKTH.dtype))
    logs.append(highest + jnp.log(total))
  y = checkpoint_name(jnp.concatenate(outputs, axis=3), 'attended')
  log = checkpoint_name(jnp.concatenate(logs, axis=3), 'attended')
  return y, (q_BKGTH, k_BKTH, v_BKTH, visible, y, log)


def _backward(kept, dy):
  q, k, v, visible, y, log = kept
  correction = jnp.sum((y * dy).astype(jnp.float32), axis=-1, keepdims=True)
  dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  for queries, keys in _blocks(q.shape[3], visible):
    scores = _scores(q, k, visible, queries, keys)
    weights = jnp.exp(scores - log[:, :, :, queries])
    block = dy[:, :, :, queries]
    f32 = {'preferred_element_type': jnp.float32}
    dv = dv.at[:, :, keys].add(jnp.einsum('BKGTS,BKGTH->BKSH', weights.astype(dy.dtype), block, **f32))
    dweights = jnp.einsum('BKGTH,BKSH->BKGTS', block, v[:, :, keys], **f32)
    dscores = (weights * (dweights - correction[:, :, :, queries])).astype(q.dtype)
    dq.append(jnp.einsum('BKGTS,BKSH->BKGTH', dscores, k[:, :, keys]))
    dk = dk.at[:, :, keys].add(jnp.einsum('BKGTS,BKGTH->BKSH', dscores, q[:, :, :, queries], **f32))
  return jnp.concatenate(dq, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), None


@jax.custom_vjp
def _blockwise(q, k, v, visible):
  return _forward(q, k, v, visible)[0]


_blockwise.defvjp(_forward, _backward)


class LayerCache(NamedTuple):
  """Keys and values of one layer, heads first, so that a step reads them as they lie."""
  k_BKSH: jax.Array
  v_BKSH: jax.Array

  def append(self, index: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array) -> 'LayerCache':
    """With T new keys and values from slot `index` on."""
    def put(old, new):
      return jax.lax.dynamic_update_slice(old, new.swapaxes(1, 2).astype(old.dtype), (0, 0, index, 0))
    return LayerCache(put(self.k_BKSH, k_BTKH), put(self.v_BKSH, v_BTKH))


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
      init, shape = nn.initializers.normal(self.std), (heads, self.head_size)
      w = layers.weight(self, name, 'D' + axes, (width, *shape), init, x_BTD.dtype)
      y = layers.einsum(f'BTD,D{axes}->BT{axes}', x_BTD, w)
      return layers.add_bias(self, name + '_bias', axes, y) if self.bias else y

    q, k = project('query', 'NH', self.heads), project('key', 'KH', self.kv_heads)
    v = project('value', 'KH', self.kv_heads)
    if self.rotary is not None:
      q, k = self.rotary(q, positions_BT), self.rotary(k, positions_BT)
    q, k, v = checkpoint_name(q, 'query'), checkpoint_name(k, 'key'), checkpoint_name(v, 'value')
    if cache is not None:
      cache = cache.append(visible.start, k, v)
    y = attend(q, k, v, visible) if cache is None else attend(q, *cache, visible)
    init = nn.initializers.normal(self.out_std)
    out = layers.weight(self, 'out', 'NHD', (self.heads, self.head_size, width), init, y.dtype)
    # As one axis: XLA on CPU would copy the weights at every token to contract the two in its own order.
    y = layers.einsum('BTF,FD->BTD', sharding.reshape(y, 'BTF'), sharding.reshape(out, 'F-'))
    return layers.add_bias(self, 'out_bias', '-', y) if self.bias else y, cache
