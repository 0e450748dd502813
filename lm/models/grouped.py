"""Products of groups of rows, each group with a matrix of its own: R rows, sorted by group; E groups.

XLA on TPU has an instruction for these; on CPU it would multiply every row with every matrix (measured: 30 times the
time at E = 16), so there a loop goes over blocks of rows.
"""
import functools
from typing import Any

import jax
import jax.numpy as jnp

from lm import sharding


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(dtype: Any, x_RD: jax.Array, w_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
  """The first sizes[0] rows times w[0], the next sizes[1] times w[1], and so on: [R, F]; what rows are left is void.

  All three products, forward and backward, add in float32. The void rows must have no say in what follows.
  """
  return _rows(x_RD, w_EDF, sizes_E, 1).astype(dtype)


def _rows(x, w, sizes, axis):
  """Each row times the matrix of its expert, of which it contracts `axis`, in float32."""
  if sharding.platform() != 'cpu':
    return _ragged(x, w, sizes, ((1,), (axis,)), [0])
  size, count, block = _blocks(x, sizes)   # XLA on CPU would multiply every row with every expert
  padded = jnp.pad(x, ((0, size), (0, 0)))

  def multiply(i, y):   # in the order of the rows: what a block has too many, the next one overwrites
    expert, start, _ = block(i)
    matrix = jax.lax.dynamic_index_in_dim(w, expert, keepdims=False)
    y_block = jax.lax.dot_general(jax.lax.dynamic_slice_in_dim(padded, start, size), matrix,
                                  (((1,), (axis - 1,)), ((), ())), preferred_element_type=jnp.float32)
    return jax.lax.dynamic_update_slice_in_dim(y, y_block, start, 0)

  return jax.lax.fori_loop(0, count, multiply, zeros(padded.shape[0], w.shape[3 - axis]))[:x.shape[0]]


def _matrices(x, dy, sizes):
  """x^T dy over the rows of each expert, [E, D, F], in float32."""
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
  """Cuts each expert's rows into blocks: their size, their number, and of the i-th the expert, start and own rows."""
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
  """Returns float32 zeros; inside a `shard_map` over rows and experts, each shard has its own."""
  return sharding.varying(jnp.zeros(shape, jnp.float32), 'BE')


def _forward(dtype, x, w, sizes):
  return product(dtype, x, w, sizes), (x, w, sizes)


def _backward(dtype, kept, dy):
  x, w, sizes = kept
  dy = dy.astype(x.dtype)
  return _rows(dy, w, sizes, 2).astype(x.dtype), _matrices(x, dy, sizes).astype(w.dtype), None


product.defvjp(_forward, _backward)
