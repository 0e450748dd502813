"""Next-token prediction: L = -sum_j log p(token_j | tokens before j)."""
from collections.abc import Callable

import jax
import numpy as np

from lm.data.batches import Batch, Example
from lm.objectives.objective import Objective, cross_entropy, over_vocabulary, token_mean


def _example(tokens: np.ndarray, rng: np.random.Generator) -> Example:
  del rng
  return Example(tokens[:-1], tokens[1:], np.ones(len(tokens) - 1, np.float32))


def next_token(denominator: Callable[[Batch], jax.Array] = token_mean) -> Objective:
  """The cross-entropy of each token given those before it in its document.

  `denominator` is `token_mean` or `sequence_mean` (see `objective`).
  """
  def loss(apply, params, batch, key):
    outputs = apply(params, batch, key=key)
    loss_sum, sums = over_vocabulary(cross_entropy, outputs.hidden, outputs.head, (batch.targets, batch.weights))
    return loss_sum, denominator(batch), sums

  return Objective(_example, loss)
