"""Muon (Jordan et al. 2024): orthogonalised momentum for the matrices of layers, NAdam for other parameters."""
from typing import Any

import jax
import optax

from lm.declarations import Weight
from lm.optim import groups


def scale_by_muon(weights: Any, b1: float, b2: float, other_rate: float) -> optax.GradientTransformation:
  """Returns a transformation to orthogonalised Nesterov momentum, and to NAdam times `other_rate` for other parameters.

  `weights` are the declarations of the parameters. Both kinds of updates have a root mean square of about 0.2. Each
  device holds whole copies of the matrices' momentum.
  """
  # Optax negates the rate, so -1 leaves the update as it is. The schedule is applied later in the chain.
  axes = jax.tree.map(_dimension_numbers, weights)
  inner = optax.contrib.muon(-1., adam_learning_rate=-other_rate, adam_b1=b1, adam_b2=b2, consistent_rms=0.2,
                             muon_weight_dimension_numbers=lambda params: axes)

  def replicate(tree):
    return jax.tree.map(groups.replicated, tree)

  def update(updates, state, params):
    updates, state = inner.update(replicate(updates), state, replicate(params))
    return jax.tree.map(groups.laid_out_like, updates, params), state

  return optax.GradientTransformation(lambda params: inner.init(replicate(params)), update)


def _dimension_numbers(weight: Weight) -> optax.contrib.MuonDimensionNumbers | None:
  """Returns which axes of a matrix are inputs and which are outputs; None for other parameters."""
  if not groups.is_hidden(weight):
    return None
  first, output = weight.matrix_axes
  return optax.contrib.MuonDimensionNumbers(tuple(range(first, output)), tuple(range(output, weight.array.ndim)))
