"""Wrappers that add to an optimizer: penalties in its gradient, and an update of the corrections of routers."""
import math

import jax
import jax.numpy as jnp
import optax

from lm.declarations import Role
from lm.optim import groups
from lm.optim.groups import Optimizer


def with_penalty(optimizer: Optimizer, l1: float = 0., l2: float = 0., decays: groups.Mask = groups.decay_mask
                 ) -> Optimizer:
  """Adds the penalty l1 sum |p| + l2 / 2 sum p^2 to the loss, over the parameters p that the mask is true for.

  The gradient of the penalty, l1 sign(p) + l2 p, is added before the optimizer clips and transforms gradients: unlike
  weight decay, it is part of the mean square that Adam divides by. The loss in the log and the curvature of Sophia are
  without the penalty.

  Raises:
    ValueError: a coefficient is negative or not finite.
  """
  for name, value in {'l1': l1, 'l2': l2}.items():
    if not 0 <= value < math.inf:
      raise ValueError(f'{name}={value} is negative or not finite')

  def bind(weights):
    mask = decays(weights)

    def penalty(updates, params):
      return jax.tree.map(lambda g, p, match: g + l1 * jnp.sign(p) + l2 * p if match else g, updates, params, mask)
    return optax.chain(optax.stateless(penalty), groups.bind(optimizer, weights))
  return bind


def with_router_balance(optimizer: Optimizer, rate: float = 1e-3) -> Optimizer:
  """Updates the corrections of routers by `rate` against the sign of their gradient, other parameters by the optimizer.

  With `moe.BiasBalance` this is the balancing without an auxiliary loss of Wang et al. 2024 (arXiv:2408.15664). The
  optimizer neither clips the gradients of corrections nor decays them.

  Raises:
    ValueError: no weight is declared as a correction; it is raised when the optimizer is given the weights.
  """
  def bind(weights):
    labels = jax.tree.map(lambda weight: 'correction' if weight.role is Role.CORRECTION else 'other', weights)
    if 'correction' not in jax.tree.leaves(labels):
      raise ValueError('no router of this model has a correction to balance experts with; take SigmoidGroupRouter, or '
                       'leave out `with_router_balance`')
    # The optimizer gets the parameters without the corrections, so it gets the declarations without them, too.
    others = jax.tree.map(lambda weight, label: weight if label == 'other' else optax.MaskedNode(), weights, labels)
    inner = groups.bind(optimizer, others)
    return optax.partition({'other': inner, 'correction': optax.sign_sgd(rate)}, labels)
  return bind
