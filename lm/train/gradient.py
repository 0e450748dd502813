"""Ways to compute the gradient of a step. Each is a function `(loss, params, batch, key, parts) -> (sums, gradients)`.

`loss(params, batch, key)` returns (loss_sum, (weight_sum, sums)). The `sums` of the gradient have the same form, added
over the batch. The step divides the gradients and the loss by the sum of the weights. The batch is computed in `parts`,
one after the other, so that only one part needs memory for its activations.
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


def accumulate_gradients(loss: Callable[..., Any], params: Any, batch: Any, key: jax.Array, parts: int
                         ) -> tuple[Any, Any]:
  """Returns the gradient of the sum of the losses of all parts.

  On a mesh with stages, the loss is that of the whole batch, and its layers are a pipeline, whose microbatches are the
  rows of a part on each stage. They have as many rows on a device as a part has on a mesh without stages.
  """
  gradient = jax.value_and_grad(loss, has_aux=True)
  if sharding.number_of_stages() == 1:
    return accumulate(gradient, params, batch, key, parts)
  with sharding.pipelined(parts):
    return gradient(params, batch, key)


def accumulate(function: Callable[..., Any], params: Any, batch: Any, key: jax.Array, parts: int) -> Any:
  """Returns the sum of `function(params, part, key)` over the parts of a batch, computed one after the other."""
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
  """Sums the gradients of rows, each clipped to a norm of `bound` (Abadi et al. 2016).

  The gradient of a row is that of its mean loss, so that all rows count the same. Each row has its own key. A device
  computes all its rows of a part at once, by `vmap`, from a whole copy of the parameters, and keeps a gradient for
  each, so that more parts need less memory. Private training also needs noise, which the optimizer has to add.

  Raises:
    ValueError: the bound is not positive.
  """
  bound: float

  def __post_init__(self):
    if not self.bound > 0:
      raise ValueError(f'bound={self.bound} of the norm of a gradient is not positive; take one such as 1.0')

  def __call__(self, loss: Callable[..., Any], params: Any, batch: Any, key: jax.Array, parts: int) -> tuple[Any, Any]:
    return accumulate(functools.partial(self._part_gradient, loss), params, batch, key, parts)

  def _part_gradient(self, loss, params, rows, key):
    keys = jax.random.split(key, jax.tree.leaves(rows)[0].shape[0])
    return sharding.sum_over_devices(functools.partial(self._row_gradients, loss), params, (rows, keys))

  def _row_gradients(self, loss, params, rows, keys):
    def row_gradient(row, key):
      def mean(params):
        loss_sum, (weight, sums) = loss(params, jax.tree.map(lambda x: x[None], row), key)
        return loss_sum / jnp.maximum(weight, jnp.finfo(jnp.float32).tiny), sums

      (value, sums), grads = jax.value_and_grad(mean, has_aux=True)(params)
      factor = jnp.minimum(1, self.bound / jnp.maximum(optax.tree.norm(grads), jnp.finfo(jnp.float32).tiny))
      return (value, (jnp.float32(1), sums)), jax.tree.map(lambda g: g * factor.astype(g.dtype), grads)

    return jax.tree.map(lambda x: jnp.sum(x, axis=0), jax.vmap(row_gradient)(rows, keys))
