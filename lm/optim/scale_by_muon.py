"""Muon (Jordan et al. 2024): momentum, orthogonalised, for the matrices of layers; NAdam for all else."""
from typing import Any

import jax
import optax

from lm.declarations import Weight
from lm.optim import groups


def scale_by_muon(weights: Any, b1: float, b2: float, rest: float) -> optax.GradientTransformation:
  """Nesterov's momentum of the matrices, orthogonalised; NAdam, times `rest`, for all else.

  `weights` are the declarations of the parameters. Both have updates of about the same root mean square, 0.2. A matrix
  is whole on each device, and so is its momentum.
  """
  # The rate -1 is undone by the sign that Optax gives it; the schedule comes after.
  axes = jax.tree.map(_dimension_numbers, weights)
  inner = optax.contrib.muon(-1., adam_learning_rate=-rest, adam_b1=b1, adam_b2=b2, consistent_rms=0.2,
                             muon_weight_dimension_numbers=lambda params: axes)

  def update(updates, state, params):
    updates, state = inner.update(jax.tree.map(groups.whole, updates), state, jax.tree.map(groups.whole, params))
    return jax.tree.map(groups.laid_out_like, updates, params), state

  return optax.GradientTransformation(lambda params: inner.init(jax.tree.map(groups.whole, params)), update)


def _dimension_numbers(weight: Weight) -> optax.contrib.MuonDimensionNumbers | None:
  """Which axes of a matrix are the inputs' and the outputs'; None for all else."""
  if not groups.is_hidden(weight):
    return None
  first, output = weight.matrix_axes
  return optax.contrib.MuonDimensionNumbers(tuple(range(first, output)), tuple(range(output, weight.array.ndim)))
