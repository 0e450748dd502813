"""Next-token prediction: L = -sum_j log p(token_j | tokens before j)."""
from collections.abc import Callable

import jax
import numpy as np

from lm.data.batch import Batch, Example, Form, Special
from lm.objectives.objective import Objective, TokenLoss, cross_entropy, token_mean, token_objective


def example(tokens: np.ndarray, rng: np.random.Generator, special: Special) -> Example:
  """The target of each token is the token after it."""
  del rng, special
  return Example(tokens[:-1], tokens[1:], np.ones(len(tokens) - 1, np.float32))


def next_token(denominator: Callable[[Batch], jax.Array] = token_mean, token_loss: TokenLoss = cross_entropy
               ) -> Objective:
  """The cross-entropy of each token given those before it in its document.

  `denominator` is `token_mean` or `sequence_mean` (see `objective`).
  """
  return token_objective(Form(example, ahead=True, in_place=True), denominator=denominator, token_loss=token_loss)
