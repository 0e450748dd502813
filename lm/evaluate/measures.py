"""What an evaluation measures: one number of a set of documents, with its confidence interval.

Most metrics are functions of sums over documents: perplexity, accuracy, corpus BLEU, the mean of any score. So a
`Measure` holds what each document adds to the sums, and a function of the sums. Intervals and tests between two systems
draw documents anew, and need no more than that.
"""
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from lm import statistics


class Measure(NamedTuple):
  """One metric of one system on a set of documents.

  `signature` says what a reader needs in order to compute the same number: settings, and versions of packages.
  """
  name: str
  rows: np.ndarray                              # [documents, k]: what each document adds to the sums
  value: Callable[[np.ndarray], np.ndarray]     # sums [..., k] -> the metric [...]
  better: Literal['higher', 'lower', '']        # '' where neither is better, such as for a length
  signature: str = ''

  def interval(self, confidence: float = 0.95) -> statistics.Interval:
    """Returns the metric and its bootstrap interval over documents; raises ValueError without documents."""
    return statistics.bootstrap(self.rows, self.value, confidence)

  def scores(self) -> np.ndarray:
    """Returns the metric of each document alone, [documents]."""
    return self.value(self.rows)


def intervals(measures: Sequence[Measure], confidence: float = 0.95) -> list[statistics.Interval]:
  """Returns the metric and the bootstrap interval of each measure; documents are drawn once for all of them."""
  by_count: dict[int, list[int]] = {}
  for place, measure in enumerate(measures):
    by_count.setdefault(len(measure.rows), []).append(place)
  result = {}
  for places in by_count.values():
    ends = np.cumsum([measures[place].rows.shape[1] for place in places])

    def values(sums: np.ndarray, places=places, ends=ends) -> np.ndarray:
      parts = np.split(sums, ends[:-1], axis=-1)
      return np.stack([measures[place].value(part) for place, part in zip(places, parts)], -1)
    rows = np.concatenate([measures[place].rows for place in places], axis=1)
    result |= zip(places, statistics.bootstrap_each(rows, values, confidence))
  return [result[place] for place in range(len(measures))]


def ratio(sums: np.ndarray) -> np.ndarray:
  """Returns the quotient of two sums, [..., 2] -> [...]; nan where the second is zero."""
  total, count = np.asarray(sums[..., 0], float), np.asarray(sums[..., 1], float)
  return np.divide(total, count, out=np.full(total.shape, np.nan), where=count != 0)


def perplexity(sums: np.ndarray) -> np.ndarray:
  """Returns exp(-sum of log-probabilities / count), [..., 2] -> [...]."""
  return np.exp(-ratio(sums))


def bits(sums: np.ndarray) -> np.ndarray:
  """Returns -sum of log-probabilities / count in bits, [..., 2] -> [...]."""
  return -ratio(sums) / np.log(2)


def mean(name: str, scores: Sequence[float], better: Literal['higher', 'lower', ''], signature: str = '',
         weights: Sequence[float] | None = None) -> Measure:
  """Returns the mean of a score over documents, each of weight 1 or of `weights`."""
  scores = np.asarray(scores, float)
  weights = np.ones(len(scores)) if weights is None else np.asarray(weights, float)
  return Measure(name, np.stack([scores * weights, weights], 1), ratio, better, signature)
