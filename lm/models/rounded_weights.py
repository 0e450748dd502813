"""Weights that are stored as int8 or int4 and read as such by each product, for models that are not trained any more.

Decoding on CPU is bound by reading weights. XLA on CPU has no fast product of floats with integers: to convert a matrix
in the program writes all of it to memory as floats, at each token. Products here go over blocks of a few rows of the
matrix, which stay in the cache of a core as floats. On other platforms the compiler joins conversion and product.
"""
import dataclasses
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from lm import sharding

GROUP = 32   # the most inputs that share a scale in int4: these scales are a quarter of the memory of the values

_BLOCK = 2 ** 16   # entries of a block: 256 KiB as floats, a part of the second level of a core's cache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedWeight:
  """The weight values * scale.

  In int8, each output, which is an output channel of a matrix or a row of a table, has one scale. In int4, which is for
  matrices alone, it has a scale for each group of consecutive inputs. Two values of int4 are in a byte.

  It replaces the weight in a model's parameters. It is for one device without a mesh, and has no gradient.
  """
  values: jax.Array   # the first field, because Flax compares its shape with the declared one
  scale: jax.Array    # float32, with the axes of the values; those of inputs have size 1, or the number of groups

  def product(self, x: jax.Array) -> jax.Array:
    """Returns the product of x [..., I] with a matrix [I, *outputs], in float32."""
    rows, matrix = x.reshape(-1, x.shape[-1]), self.values.reshape(len(self.values), -1)
    scale = self.scale.reshape(len(self.scale), -1)
    if matrix.dtype == jnp.int4:
      sums = _sum_over_groups(rows, matrix, scale)
    elif sharding.platform() == 'cpu':
      rows = rows.astype(jnp.float32)

      def add(sums, first, block):
        return sums + jax.lax.dynamic_slice_in_dim(rows, first, len(block), 1) @ block

      sums = _over_blocks(add, jnp.zeros((len(rows), matrix.shape[1])), matrix) * scale
    else:
      sums = jnp.dot(rows, matrix.astype(rows.dtype), preferred_element_type=jnp.float32) * scale
    return sums.reshape(*x.shape[:-1], *self.values.shape[1:])

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

  def merge_inputs(self) -> 'RoundedWeight':
    """Returns a matrix whose first two axes, which are inputs, are one."""
    return RoundedWeight(*(x.reshape(-1, *x.shape[2:]) for x in (self.values, self.scale)))

  def floats(self) -> jax.Array:
    """Returns the weight in float32."""
    shape = self.values.shape
    groups = [n for size, count in zip(shape, self.scale.shape) for n in (count, size // count)]   # two for each axis
    scale = self.scale.reshape([n for count in self.scale.shape for n in (count, 1)])
    return (self.values.astype(jnp.float32).reshape(groups) * scale).reshape(shape)


def group_size(inputs: int) -> int:
  """Returns the number of inputs that share a scale in int4, of a matrix whose last axis of inputs has this size."""
  return math.gcd(inputs, GROUP)


def rounded_weight(weight: jax.Array, inputs: Sequence[int]) -> RoundedWeight:
  """Returns a weight rounded to int8, symmetrically. `inputs` are its axes over which an output has one scale."""
  weight = weight.astype(jnp.float32)
  largest = jnp.max(jnp.abs(weight), axis=inputs, keepdims=True)
  scale = jnp.where(largest > 0, largest, 1.) / 127
  return RoundedWeight(jnp.round(weight / scale).astype(jnp.int8), scale)


def grouped_weight(weight: jax.Array, axis: int) -> RoundedWeight:
  """Returns a matrix rounded to int4, symmetrically. `axis` is its last one of inputs, which is divided into groups.

  As in Qwix, the largest magnitude of a group is 7.5 steps, which become 7 or -8, so that steps are small.
  """
  weight = weight.astype(jnp.float32)
  size = group_size(weight.shape[axis])
  groups = weight.reshape(*weight.shape[:axis], -1, size, *weight.shape[axis + 1:])
  largest = jnp.max(jnp.abs(groups), axis=axis + 1, keepdims=True)
  scale = jnp.where(largest > 0, largest, 1.) / 7.5
  values = jnp.clip(jnp.round(groups / scale), -8, 7).astype(jnp.int4)
  return RoundedWeight(values.reshape(weight.shape), scale.squeeze(axis + 1))


def _sum_over_groups(rows: jax.Array, matrix: jax.Array, scale: jax.Array) -> jax.Array:
  """Returns the product of rows [R, I] with an int4 matrix [I, O] whose groups of inputs have scales [G, O].

  On CPU, a block is a group. Two neighbouring outputs are taken from each byte by shifts, because XLA converts values
  of int4 one by one, which takes more than twice as long.
  """
  if sharding.platform() != 'cpu':
    weight = RoundedWeight(matrix, scale).floats().astype(rows.dtype)
    return jnp.dot(rows, weight, preferred_element_type=jnp.float32)
  rows = rows.astype(jnp.float32)
  size = len(matrix) // len(scale)
  pairs = jax.lax.bitcast_convert_type(matrix.reshape(len(matrix), -1, 2), jnp.int8)

  def add(i, sums):
    inputs = jax.lax.dynamic_slice_in_dim(rows, i * size, size, 1)
    block = jax.lax.dynamic_slice_in_dim(pairs, i * size, size)
    even, odd = (inputs @ half.astype(jnp.float32) for half in (jnp.left_shift(block, 4) >> 4, block >> 4))
    return sums + jnp.stack([even, odd], -1).reshape(sums.shape) * scale[i][None]

  return jax.lax.fori_loop(0, len(scale), add, jnp.zeros((len(rows), matrix.shape[1])))


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
