"""Supervised fine-tuning: next-token prediction of answers, given their prompts."""
from collections.abc import Callable

import jax
import numpy as np

from lm.data.batch import Batch, Dialogue, Example, Form, Special
from lm.objectives.objective import Objective, TokenLoss, cross_entropy, token_mean, token_objective


def example(dialogue: Dialogue, rng: np.random.Generator, special: Special) -> Example:
  """The target of each token is the token after it; it has a weight where it belongs to an answer."""
  del rng, special
  return Example(dialogue.tokens[:-1], dialogue.tokens[1:], dialogue.loss_mask[1:].astype(np.float32))


def supervised(denominator: Callable[[Batch], jax.Array] = token_mean, token_loss: TokenLoss = cross_entropy
               ) -> Objective:
  """L = -sum_j a_j log p(token_j | tokens before j) / sum_j a_j; a_j is 1 in answers, 0 in prompts.

  Ouyang et al. 2022 (arXiv:2203.02155). `denominator` is `token_mean` or `sequence_mean`, by which it is the mean over
  dialogues of the sums (see `objective`).
  """
  return token_objective(Form(example), needs=Dialogue, token_loss=token_loss, denominator=denominator)
