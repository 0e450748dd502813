"""Sophia, an optimizer that scales by the curvature of the loss, and Hutchinson's estimate of that curvature."""
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm.optim import groups, optimizers
from lm.optim.groups import Optimizer


def sophia(rate: optimizers.Rate, weight_decay: float = 0.1, b1: float = 0.965, b2: float = 0.99, gamma: float = 0.01,
           curvature_every: int = 10, clip: float | None = 1., decays: groups.Mask = groups.decay_mask
           ) -> Optimizer:
  """Sophia-H (Liu et al. 2023): clip(m / max(gamma h, eps), 1), with m the momentum, h the diagonal of the Hessian.

  Every `curvature_every` steps h is estimated (see `hutchinson`), at the cost of a backward pass through the backward
  pass; its running mean of decay b2 is used from the next step on. `update` needs `obj_fn`, the loss as a function of
  the parameters.
  """
  inner = optax.contrib.sophia(-1., b1, b2, weight_decay=0., gamma=gamma, update_interval=curvature_every,
                               hessian_diagonal_fn=hutchinson())
  return optimizers.chain(rate, clip, inner, weight_decay=weight_decay, decays=decays)


def hutchinson() -> optax.GradientTransformationExtraArgs:
  """Returns Hutchinson's estimate of the diagonal of the Hessian of `obj_fn`: z * (Hessian z), for random signs z.

  Its mean over z is the diagonal. Both derivatives are in reverse mode: the estimate of Optax takes the second one in
  forward mode, which functions with a custom gradient do not have.
  """
  def update(updates, count, params=None, *, obj_fn=None, **unused):
    del updates, unused
    if obj_fn is None:
      raise ValueError('sophia needs the loss as a function of the parameters, update(..., obj_fn=...)')
    signs = random_signs(params, count)

    def slope(params):
      """Returns the derivative of the loss in the direction of the signs."""
      products = jax.tree.map(lambda g, z: jnp.sum(g * z), jax.grad(obj_fn)(params), signs)
      return sum(jax.tree.leaves(products))

    return jax.tree.map(jnp.multiply, signs, jax.grad(slope)(params)), count + 1

  return optax.GradientTransformationExtraArgs(lambda params: jnp.int32(0), update)


def random_signs(params: Any, count: jax.Array) -> Any:
  """Returns a tree of 1 and -1 with the shapes of the parameters, which differs for each count."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))
  return tree.unflatten([groups.laid_out_like(jax.random.rademacher(key, x.shape, x.dtype), x)
                         for key, x in zip(keys, leaves)])
