"""Grouped matrix products: R rows, sorted by group; each of the E groups is multiplied by a matrix of its own.

XLA has an operation for this. On CPU, however, it multiplies every row by every matrix (measured: 30 times slower at
E = 16), so a loop over blocks of rows is used there.
"""
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm import sharding


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(dtype: Any, x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """Multiplies the first sizes[0] rows by w[0], the next sizes[1] rows by w[1], and so on. Returns [R, F].

  Rows after the last group have undefined values, which the caller must mask. All three products, forward and backward,
  accumulate in float32.
  """
  return _rows(x_RD, w_EDF, sizes_E, 1).astype(dtype)


def _rows(x, w, sizes, axis):
  """Multiplies each row by the matrix of its group, of which it contracts `axis`, in float32."""
  if sharding.platform() != 'cpu':
    return _ragged(x, w, sizes, ((1,), (axis,)), [0])
  size, count, block = _blocks(x, sizes)
  padded = jnp.pad(x, ((0, size), (0, 0)))

  def multiply(i, y):   # blocks go in the order of rows: the next block overwrites rows beyond the end of a group
    expert, start, _ = block(i)
    matrix = jax.lax.dynamic_index_in_dim(w, expert, keepdims=False)
    y_block = jax.lax.dot_general(jax.lax.dynamic_slice_in_dim(padded, start, size), matrix,
                                  (((1,), (axis - 1,)), ((), ())), preferred_element_type=jnp.float32)
    return jax.lax.dynamic_update_slice_in_dim(y, y_block, start, 0)

  return jax.lax.fori_loop(0, count, multiply, zeros(padded.shape[0], w.shape[3 - axis]))[:x.shape[0]]


def _matrices(x, dy, sizes):
  """Returns x^T dy over the rows of each group, [E, D, F], in float32."""
  if sharding.platform() != 'cpu':
    return _ragged(x, dy, sizes, ((0,), (0,)), [])
  size, count, block = _blocks(x, sizes)
  x, dy = jnp.pad(x, ((0, size), (0, 0))), jnp.pad(dy, ((0, size), (0, 0)))

  def add(i, dw):
    expert, start, own = block(i)
    rows = jnp.where(own[:, None], jax.lax.dynamic_slice_in_dim(x, start, size), 0)
    dw_block = jnp.einsum('RD,RF->DF', rows, jax.lax.dynamic_slice_in_dim(dy, start, size),
                         preferred_element_type=jnp.float32)
    return dw.at[expert].add(dw_block)

  return jax.lax.fori_loop(0, count, add, zeros(sizes.shape[0], x.shape[1], dy.shape[1]))


def _ragged(a, b, sizes, contracting, groups):
  numbers = jax.lax.RaggedDotDimensionNumbers((contracting, ((), ())), [0], groups)
  return jax.lax.ragged_dot_general(a, b, sizes, numbers, preferred_element_type=jnp.float32)


def _blocks(x, sizes):
  """Cuts the rows of each group into blocks of one size.

  Returns the size, the number of blocks, and a function from the index of a block to its group, its first row, and
  which of its rows belong to the group.
  """
  rows, experts = x.shape[0], sizes.shape[0]
  size = min(rows, max(8, min(256, rows // experts)))
  counts = -(-sizes // size)
  last, ends = jnp.cumsum(counts), jnp.cumsum(sizes)

  def block(i):
    expert = jnp.sum(last <= i)
    start = ends[expert] - sizes[expert] + (i - last[expert] + counts[expert]) * size
    return expert, start, start + jnp.arange(size) < ends[expert]

  return size, last[-1], block


def zeros(*shape):
  """Returns float32 zeros, which differ on the devices that split activations inside a `shard_map`."""
  return sharding.mark_varying(jnp.zeros(shape, jnp.float32), 'BTF')


def _forward(dtype, x, w, sizes):
  return product(dtype, x, w, sizes), (x, w, sizes)


def _backward(dtype, residuals, dy):
  x, w, sizes = residuals
  dy = dy.astype(x.dtype)
  return _rows(dy, w, sizes, 2).astype(x.dtype), _matrices(x, dy, sizes).astype(w.dtype), None


product.defvjp(_forward, _backward)
