"""Weights with a change of low rank, as adapters have them (see `lora`)."""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding


@functools.partial(jax.tree_util.register_dataclass, data_fields=['weight', 'a', 'b'], meta_fields=['scale'])
@dataclasses.dataclass(frozen=True)
class LowRank:
  """A weight with a change of low rank, weight + scale * a b. It replaces the weight in a model's parameters.

  The weight is [*leading, *inputs, *outputs], a is [*leading, *inputs, r], and b is [*leading, r, *outputs]; the
  leading axes are those of layers and experts. The sum is computed where the weight is used: of stacked layers, only
  the sum and the gradient of one layer exist at a time.
  """
  weight: jax.Array   # the first field, because Flax compares its shape with the declared one
  a: jax.Array
  b: jax.Array
  scale: float

  def merged(self) -> jax.Array:
    """Returns the sum in float32, sharded like the weight."""
    letters, leading = 'abcdefghijkl', self.a.ndim + self.b.ndim - self.weight.ndim - 2
    axes, inputs = letters[:self.weight.ndim], self.a.ndim - 1
    formula = f'{axes[:inputs]}r,{axes[:leading]}r{axes[inputs:]}->{axes}'
    layout = None if sharding.spec('') is None else jax.typeof(self.weight).sharding
    change = jnp.einsum(formula, self.a, self.b, out_sharding=layout, preferred_element_type=jnp.float32)
    return self.weight.astype(jnp.float32) + self.scale * change


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RowLowRank:
  """A weight with the changes of several adapters, of which each row of a batch has one or none.

  It replaces the weight in a model's parameters. The matrices of all adapters are beside one another: for a weight
  [*layers, *inputs, *outputs], a is [*layers, *inputs, R] and b is [*layers, R, *outputs], and b includes the scale.
  `adapter_R` is the number, from 1 on, of the adapter that has a column of a and the row of b. Row i of a batch is
  multiplied by the weight and by the columns of its own adapter, `adapter_B[i]`; 0 stands for none, and an `adapter_B`
  of None says that no row has an adapter.
  """
  weight: Any   # the first field, because Flax compares its shape with the declared one; an array or rounded
  a: jax.Array
  b: jax.Array
  adapter_R: jax.Array   # [*layers, R], int32
  adapter_B: jax.Array | None = None

  def product(self, einsum: Callable[..., jax.Array], formula: str, x: jax.Array) -> jax.Array:
    """Returns the product of x [B, ...] with the weight of each row, in float32.

    `einsum(formula, x, weight, dtype)` multiplies. In formulas, r is the axis of R.
    """
    y = einsum(formula, x, self.weight, jnp.float32)
    if self.adapter_B is None:
      return y
    operands, y_axes = formula.split('->')
    x_axes, axes = operands.split(',')
    inputs = axes[:self.a.ndim - 1]
    factors = [(inputs + 'r', self.a), ('r' + axes[len(inputs):], self.b)]
    if set(inputs) <= set(y_axes):   # latent attention multiplies by the transpose, from outputs to inputs
      factors.reverse()
    (first_axes, first), (second_axes, second) = factors
    hidden_axes = ''.join(axis for axis in x_axes if axis in y_axes) + 'r'
    hidden = sharding.constrain(einsum(f'{x_axes},{first_axes}->{hidden_axes}', x, first), hidden_axes)
    own_BR = self.adapter_R[None] == self.adapter_B[:, None]
    hidden = jnp.where(own_BR.reshape(len(own_BR), *[1] * (hidden.ndim - 2), -1), hidden, 0)
    return y + einsum(f'{hidden_axes},{second_axes}->{y_axes}', hidden, second, jnp.float32)


def choose_adapters(params: Any, adapter_B: jax.Array) -> Any:
  """Returns parameters with which row i of a batch has the adapter `adapter_B[i]`; 0 is none."""
  def change(leaf):
    return dataclasses.replace(leaf, adapter_B=adapter_B) if _has_rows(leaf) else leaf
  return jax.tree.map(change, params, is_leaf=_has_rows)


def count_adapters(params: Any) -> int:
  """Returns the number of adapters from which rows can choose."""
  leaves = filter(_has_rows, jax.tree.leaves(params, is_leaf=_has_rows))
  return max((int(np.max(leaf.adapter_R)) for leaf in leaves), default=0)


def _has_rows(leaf: Any) -> bool:
  return isinstance(leaf, RowLowRank)
