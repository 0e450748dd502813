"""Prefix language modelling: L = -sum_{j > k} log p(token_j | all k tokens of the prefix, tokens before j)."""
from collections.abc import Callable

import jax
import numpy as np

from lm.data.batch import Batch, Example, Form, Special
from lm.objectives.objective import Objective, TokenLoss, cross_entropy, token_mean, token_objective

Split = Callable[[int, np.random.Generator], int]   # (targets that a piece could have, rng) -> tokens of the prefix


def uniform(size: int, rng: np.random.Generator) -> int:
  """Returns a prefix length from 1 to `size`, uniformly."""
  return int(rng.integers(1, size + 1))


def bidirectional_prompt(batch: Batch) -> Batch:
  """Returns the batch with all of each prompt marked as prefix."""
  return batch._replace(bidirectional=batch.segments > 0)


def prefix(split: Split = uniform, denominator: Callable[[Batch], jax.Array] = token_mean,
           token_loss: TokenLoss = cross_entropy) -> Objective:
  """Predicts the tokens after a prefix, which is read bidirectionally.

  (Liu et al. 2018, arXiv:1801.10198; Raffel et al. 2020, arXiv:1910.10683, section 3.2.1.) Each piece of a document has
  a prefix of its own: the first `split(n, rng)` of its n + 1 tokens. For a fixed length, pass a function such as
  `lambda n, rng: 128` or `lambda n, rng: n // 2`. A piece that is no longer than its prefix has no targets. A prefix
  shorter than one token counts as one token, which is next-token prediction.
  """
  def example(piece: np.ndarray, rng: np.random.Generator, special: Special) -> Example:
    del special
    size = len(piece) - 1
    prefix_length, places = max(split(size, rng), 1), np.arange(size)
    weights = (places >= prefix_length - 1).astype(np.float32)
    return Example(piece[:-1], piece[1:], weights, places < prefix_length)

  return token_objective(Form(example, ahead=True, in_place=True), denominator=denominator, token_loss=token_loss,
                         prompt=bidirectional_prompt)
