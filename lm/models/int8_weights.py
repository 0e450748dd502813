"""Weights that are stored as int8 and read as int8 by each product, for models that are not trained any more.

Decoding on CPU is bound by reading weights. XLA on CPU has no fast product of floats with int8: to convert a matrix in
the program writes all of it to memory as floats, at each token. Products here go over blocks of a few rows of the
matrix, which stay in the cache of a core as floats. On other platforms the compiler joins conversion and product.
"""
import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lm import sharding

_BLOCK = 2 ** 16   # entries of a block: 256 KiB as floats, a part of the second level of a core's cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight:
  """The weight values * scale, with one scale for each output: an output channel of a matrix, a row of a table.

  It replaces the weight in a model's parameters. It is for one device without a mesh, and has no gradient.
  """
  values: jax.Array   # the first field, because Flax compares its shape with the declared one
  scale: jax.Array    # float32, with the axes of the values, where those of the inputs have size 1

  def product(self, x: jax.Array) -> jax.Array:
    """Returns the product of x [..., I] with a matrix [I, *outputs], in float32."""
    rows, matrix = x.reshape(-1, x.shape[-1]), self.values.reshape(len(self.values), -1)
    if sharding.platform() == 'cpu':
      rows = rows.astype(jnp.float32)

      def add(sums, first, block):
        return sums + jax.lax.dynamic_slice_in_dim(rows, first, len(block), 1) @ block

      sums = _over_blocks(add, jnp.zeros((len(rows), matrix.shape[1])), matrix)
    else:
      sums = jnp.dot(rows, matrix.astype(rows.dtype), preferred_element_type=jnp.float32)
    return (sums * self.scale.reshape(1, -1)).reshape(*x.shape[:-1], *self.values.shape[1:])

  def logits(self, hidden_BTD: jax.Array) -> jax.Array:
    """Returns the products of hidden states with the rows of a table [V, D], [B, T, V] in float32."""
    rows = hidden_BTD.reshape(-1, hidden_BTD.shape[-1])
    if sharding.platform() == 'cpu':
      rows = rows.astype(jnp.float32)

      def write(table, first, block):
        return jax.lax.dynamic_update_slice_in_dim(table, block @ rows.T, first, 0)

      table = _over_blocks(write, jnp.zeros((len(self.values), len(rows))), self.values).T
    else:
      table = jnp.dot(rows, self.values.astype(rows.dtype).T, preferred_element_type=jnp.float32)
    return (table * self.scale.reshape(1, -1)).reshape(*hidden_BTD.shape[:-1], len(self.values))

  def rows(self, ids: jax.Array) -> jax.Array:
    """Returns the rows of a table [V, D] for ids, [..., D] in float32."""
    return self.values[ids].astype(jnp.float32) * self.scale[ids]

  def merge_inputs(self) -> 'Int8Weight':
    """Returns a matrix whose first two axes, which are inputs, are one."""
    return Int8Weight(*(x.reshape(-1, *x.shape[2:]) for x in (self.values, self.scale)))

  def floats(self) -> jax.Array:
    """Returns the weight in float32."""
    return self.values.astype(jnp.float32) * self.scale


def rounded_weight(weight: jax.Array, inputs: Sequence[int]) -> Int8Weight:
  """Returns a weight rounded to int8, symmetrically. `inputs` are its axes over which an output has one scale."""
  weight = weight.astype(jnp.float32)
  largest = jnp.max(jnp.abs(weight), axis=inputs, keepdims=True)
  scale = jnp.where(largest > 0, largest, 1.) / 127
  return Int8Weight(jnp.round(weight / scale).astype(jnp.int8), scale)


def _over_blocks(function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array], result: jax.Array,
                 matrix: jax.Array) -> jax.Array:
  """Folds `function(result, first, block)` over blocks of the rows of a matrix, as float32, from row `first` on."""
  size = max(1, min(len(matrix), _BLOCK // matrix.shape[1]))
  count, remainder = divmod(len(matrix), size)

  def step(i, result):
    block = jax.lax.dynamic_slice_in_dim(matrix, i * size, size)
    return function(result, i * size, block.astype(jnp.float32))

  result = jax.lax.fori_loop(0, count, step, result)
  if not remainder:
    return result
  return function(result, jnp.int32(count * size), matrix[count * size:].astype(jnp.float32))
