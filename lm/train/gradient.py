"""How the gradient of a step is computed: `gradient(loss, params, batch, key, parts) -> (sums, gradients)`.

`loss(params, batch, key)` returns (loss_sum, (weight_sum, sums)), and so does `gradient` in its `sums`, added over the
batch. The step divides the gradients, and the loss, by the sum of weights. `parts` is how many parts of the batch are
computed one after the other, so that the memory of one is enough.
"""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm import sharding

Gradient = Callable[[Callable[..., Any], Any, Any, jax.Array, int], tuple[Any, Any]]


def accumulated(loss: Callable[..., Any], params: Any, batch: Any, key: jax.Array, parts: int) -> tuple[Any, Any]:
  """The gradient of the sum of the losses of all parts."""
  return accumulate(jax.value_and_grad(loss, has_aux=True), params, batch, key, parts)


def accumulate(function: Callable[..., Any], params: Any, batch: Any, key: jax.Array, parts: int) -> Any:
  """Sums of `function(params, part, key)` over the parts of a batch, one part at a time."""
  if parts == 1:
    return function(params, batch, key)

  def split(x):   # row i goes to part i % parts, so that each device keeps its rows
    return jnp.moveaxis(sharding.split_axis(x, 0, (x.shape[0] // parts, parts)), 1, 0)

  def add(total, xs):
    part, key = xs
    return jax.tree.map(jnp.add, total, function(params, part, key)), None

  stacked = jax.tree.map(split, batch), jax.random.split(key, parts)
  zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(function, params, *jax.tree.map(lambda x: x[0], stacked)))
  return jax.lax.scan(add, zero, stacked)[0]


@dataclasses.dataclass(frozen=True)
class ClippedByRow:
  """The sum of the gradients of rows, each of its mean loss, clipped to a norm of `bound` (Abadi et al. 2016).

  A row counts the same whatever its weights sum to, and has its own key. Each device computes its rows at once, by
  `vmap`, from parameters that it holds whole, and keeps a gradient for each: `parts` bounds the memory. Noise, for
  privacy, is the optimizer's to add.

  Raises:
    ValueError: the bound is not positive.
  """
  bound: float

  def __post_init__(self):
    if not self.bound > 0:
      raise ValueError(f'bound={self.bound} of the norm of a gradient is not positive')

  def __call__(self, loss: Callable[..., Any], params: Any, batch: Any, key: jax.Array, parts: int) -> tuple[Any, Any]:
    return accumulate(functools.partial(self._of_part, loss), params, batch, key, parts)

  def _of_part(self, loss, params, rows, key):
    keys = jax.random.split(key, jax.tree.leaves(rows)[0].shape[0])
    return sharding.sum_over_devices(functools.partial(self._of_rows, loss), params, (rows, keys))

  def _of_rows(self, loss, params, rows, keys):
    def of_row(row, key):
      def mean(params):
        loss_sum, (weight, sums) = loss(params, jax.tree.map(lambda x: x[None], row), key)
        return loss_sum / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny), sums

      (value, sums), grads = jax.value_and_grad(mean, has_aux=True)(params)
      factor = jnp.minimum(1, self.bound / jnp.maximum(optax.tree.norm(grads), jnp.finfo(jnp.float32).tiny))
      return (value, (jnp.float32(1), sums)), jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(of_row)(rows, keys))
