"""Optimizers around another: penalties in its gradient; corrections of routers apart from it."""
import math

import jax
import jax.numpy as jnp
import optax

from lm.declarations import Role
from lm.optim import groups
from lm.optim.groups import Optimizer


def penalised(optimizer: Optimizer, l1: float = 0., l2: float = 0., decays: groups.Mask = groups.decayed
              ) -> Optimizer:
  """The optimizer of loss + l1 sum |p| + l2 / 2 sum p^2, over the parameters that the mask is true for.

  Its gradient, l1 sign(p) + l2 p, is added before all that the optimizer does, clipping included: unlike weight decay,
  it is a part of what Adam divides by. The loss that is told is without it, and so is Sophia's curvature.
  """
  for name, value in {'l1': l1, 'l2': l2}.items():
    if not 0 <= value < math.inf:
      raise ValueError(f'{name}={value} is negative or not finite')

  def bind(weights):
    mask = decays(weights)

    def penalty(updates, params):
      return jax.tree.map(lambda g, p, match: g + l1 * jnp.sign(p) + l2 * p if match else g, updates, params, mask)
    return optax.chain(optax.stateless(penalty), groups.bound(optimizer, weights))
  return bind


def balanced(optimizer: Optimizer, rate: float = 1e-3) -> Optimizer:
  """The optimizer, but for the corrections of routers, which move by `rate` against the sign of their gradient.

  With `moe.BiasBalance` this is the balancing without a loss of Wang et al. 2024 (arXiv:2408.15664). Corrections count
  neither for the clipping of the optimizer nor for its decay.

  Raises:
    ValueError: no weight is declared as a correction; it is raised when the optimizer is given the weights.
  """
  def bind(weights):
    labels = jax.tree.map(lambda weight: 'correction' if weight.role is Role.CORRECTION else 'other', weights)
    if 'correction' not in jax.tree.leaves(labels):
      raise ValueError('no router of this model has a correction to balance experts with; take SigmoidGroupRouter, or '
                       'leave out `balanced`')
    # The optimizer is given the parameters without the corrections, so the declarations too.
    others = jax.tree.map(lambda weight, label: weight if label == 'other' else optax.MaskedNode(), weights, labels)
    inner = groups.bound(optimizer, others)
    return optax.partition({'other': inner, 'correction': optax.sign_sgd(rate)}, labels)
  return bind
