"""Predicting ratings: the objective of a `models.TextScorer`, such as BLEURT (Sellam et al. 2020, arXiv:2004.04696)."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.batch import Batch, Example, Form, RatedPair, Room, Special
from lm.objectives.objective import Objective, Sums

CLOSE = 0.1   # an error below this counts as correct


def example(pair: RatedPair, rng: np.random.Generator, special: Special) -> Example:
  """Returns bos, a reference drawn at random, eos, the candidate, eos; the first token has the rating and weight 1."""
  reference = pair.references[rng.integers(len(pair.references))]
  tokens = np.concatenate([[special.bos], reference, [special.eos], pair.candidate, [special.eos]]).astype(np.int32)
  weights, ratings = np.zeros((2, len(tokens)), np.float32)
  weights[0], ratings[0] = 1, pair.rating
  types = (np.arange(len(tokens)) >= len(reference) + 2).astype(np.int32)
  return Example(tokens, np.full(len(tokens), special.eos, np.int32), weights,
                 columns={'ratings': ratings, 'types': types})


def rating() -> Objective:
  """The objective of a scorer of pairs: the mean of (score - rating)^2, where the score is that of the first token.

  Metrics: `rating/error`, the mean absolute error; nll is the loss, tokens are pairs, and a score is correct if its
  error is below 0.1.
  """
  def loss(apply: Callable[..., Any], params: Any, batch: Batch, key: jax.Array | None
           ) -> tuple[jax.Array, jax.Array, Sums]:
    output = apply(params, batch._replace(types=batch.columns['types']), key=key)
    error = jnp.abs(output.head(output.hidden) - batch.columns['ratings'])
    squares, count = jnp.sum(error ** 2 * batch.weights), jnp.sum(batch.weights)
    return squares, count, {'nll': squares, 'tokens': count, 'correct': jnp.sum((error < CLOSE) * batch.weights),
                            'rating/error': (jnp.sum(error * batch.weights), count)}

  return Objective((Form(example, Room(extra=3)),), loss, RatedPair, prompt=None)
