"""Confidence intervals, and comparisons of what is paired: two arms by seed, or two systems by document."""
import math
from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
  """An estimate, such as a mean, and its confidence interval, which is infinite for a single observation."""
  value: float
  low: float
  high: float

  def __str__(self):
    return f'{self.value:.4f} [{self.low:.4f}, {self.high:.4f}]'


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
  """Student's t interval of the mean."""
  from scipy import stats  # 0.3 s: not for --help
  mean, n = float(np.mean(values)), len(values)
  half = math.inf if n < 2 else stats.t.ppf((1 + confidence) / 2, n - 1) * np.std(values, ddof=1) / n ** 0.5
  return Interval(mean, float(mean - half), float(mean + half))


def bootstrap(rows: np.ndarray, value: Callable[[np.ndarray], np.ndarray], confidence: float = 0.95,
              samples: int = 2000, seed: int = 0) -> Interval:
  """Percentile bootstrap interval of a quantity that is a function of sums over documents (Efron 1979).

  Most quantities are: a perplexity, an accuracy, corpus BLEU, the mean of any score. `rows` has what each document
  adds to the sums, [documents, k], and `value` computes the quantity from sums, [..., k] -> [...]. Documents, not
  tokens, are drawn with replacement, since the tokens of a document are not independent. The same seed draws the same
  documents for any quantity. Undefined values (nan), such as those of a draw without a token, are left out.

  Raises ValueError if there are no documents.
  """
  return bootstrap_each(rows, lambda sums: value(sums)[..., None], confidence, samples, seed)[0]


def bootstrap_each(rows: np.ndarray, values: Callable[[np.ndarray], np.ndarray], confidence: float = 0.95,
                   samples: int = 2000, seed: int = 0) -> list[Interval]:
  """Returns the interval of each of several quantities, which `values` computes together: sums [..., k] -> [..., n].

  Otherwise as `bootstrap`. Limits are nan where no draw has a value.
  """
  rows = np.asarray(rows, float)
  if not len(rows):
    raise ValueError('there are no documents, and so no estimate')
  estimates = values(rows.sum(0))
  if len(rows) == 1:
    return [Interval(float(estimate), -math.inf, math.inf) for estimate in estimates]
  intervals = []
  for estimate, drawn in zip(estimates, values(resampled_sums(rows, samples, seed)).T):
    defined, limits = drawn[~np.isnan(drawn)], [(1 - confidence) / 2, (1 + confidence) / 2]
    method = 'linear' if np.isfinite(defined).all() else 'closest_observation'   # nothing lies between two infinities
    low, high = np.quantile(defined, limits, method=method) if len(defined) else (math.nan, math.nan)
    intervals.append(Interval(float(estimate), float(low), float(high)))
  return intervals


def resampled_sums(rows: np.ndarray, samples: int, seed: int) -> np.ndarray:
  """Returns sums of `rows` [documents, k] over documents drawn with replacement, [samples, k]."""
  rng, count = np.random.default_rng(seed), len(rows)
  chunk = max(1, min(samples, 10_000_000 // count))   # counts of documents for this many draws at once: 80 MB
  sums = []
  for first in range(0, samples, chunk):
    draws = rng.integers(count, size=(min(chunk, samples - first), count))
    counts = np.stack([np.bincount(draw, minlength=count) for draw in draws])
    sums.append(counts @ rows)
  return np.concatenate(sums)


CORRELATIONS = 'pearson', 'spearman', 'kendall'


def correlations(scores: Sequence[float], ratings: Sequence[float], groups: Sequence[Hashable] | None = None,
                 confidence: float = 0.95, samples: int = 200, seed: int = 0) -> dict[str, Interval]:
  """Returns Pearson's r, Spearman's rho and Kendall's tau-b of two scores, with percentile bootstrap intervals.

  `groups` says which scores belong together, such as those of one item: whole groups are drawn. A coefficient is nan
  where all scores, or all ratings, are equal. Raises ValueError if there are fewer than three pairs.
  """
  x, y = np.asarray(scores, float), np.asarray(ratings, float)
  if len(x) != len(y) or len(x) < 3:
    raise ValueError(f'{len(x)} scores and {len(y)} ratings have no correlation; give three pairs or more')
  members: dict[Hashable, list[int]] = {}
  for i, group in enumerate(range(len(x)) if groups is None else groups):
    members.setdefault(group, []).append(i)
  places, rng = list(map(np.array, members.values())), np.random.default_rng(seed)
  draws = [np.concatenate([places[i] for i in rng.integers(len(places), size=len(places))]) for _ in range(samples)]
  estimates, drawn = _coefficients(x, y), np.array([_coefficients(x[draw], y[draw]) for draw in draws])
  limits = [(1 - confidence) / 2, (1 + confidence) / 2]
  result = {}
  for name, estimate, values in zip(CORRELATIONS, estimates, drawn.T):
    finite = values[np.isfinite(values)]
    result[name] = Interval(estimate, *(np.quantile(finite, limits).tolist() if len(finite) else (math.nan,) * 2))
  return result


def _coefficients(x: np.ndarray, y: np.ndarray) -> list[float]:
  from scipy import stats
  if len(x) < 3 or np.ptp(x) == 0 or np.ptp(y) == 0:
    return [math.nan] * len(CORRELATIONS)
  return [float(function(x, y).statistic) for function in (stats.pearsonr, stats.spearmanr, stats.kendalltau)]


class Verdict(NamedTuple):
  """The result of comparing an arm with another, of which lower values are better."""
  difference: Interval   # the arm minus the other, over pairs
  deviation: float       # standard deviation of the difference of a pair; nan for one pair
  confidence: float      # of the interval
  unit: str = 'seeds'    # what is paired

  @property
  def word(self) -> str:
    if self.difference.high < 0:
      return 'better'
    return 'worse' if self.difference.low > 0 else 'not distinguishable'

  @property
  def needed(self) -> int | None:
    """How many pairs would show a difference of this size; None where it is shown already, or is zero."""
    if self.word != 'not distinguishable' or math.isnan(self.deviation):
      return None
    return pairs_needed(self.difference.value, self.deviation, self.confidence)

  def __str__(self):
    needed = self.needed
    if needed is None:
      return self.word
    return f'{self.word}; a difference of this size would need {needed:,} {self.unit}'


def judge(arm: Sequence[float], other: Sequence[float], comparisons: int = 1, confidence: float = 0.95) -> Verdict:
  """Compares an arm with another by the final values of their runs, which are paired by seed.

  With several `comparisons`, each interval is wider (Bonferroni), so that all of them hold at once with `confidence`.
  For equal arms, the verdict is wrong with probability 1 - confidence at most, if differences are roughly normal.

  ValueError where values are not paired, or not finite.
  """
  arm, other = np.asarray(arm, float), np.asarray(other, float)
  if arm.shape != other.shape or not len(arm):
    raise ValueError(f'{len(arm)} values of one arm and {len(other)} of the other are no pairs; run both on the same '
                     'seeds')
  if not np.isfinite([arm, other]).all():
    raise ValueError('a final value is not finite: that run diverged, and has no difference to another; lower its rate')
  confidence = 1 - (1 - confidence) / comparisons
  differences = arm - other
  deviation = float(np.std(differences, ddof=1)) if len(differences) > 1 else math.nan
  return Verdict(interval(differences, confidence), deviation, confidence)


def pairs_needed(difference: float, deviation: float, confidence: float = 0.95, power: float = 0.8,
                 most: int = 1_000_000) -> int | None:
  """Returns how many pairs a paired t-test needs to find a true difference with probability `power`.

  None if it is more than `most`.

  `deviation` is the standard deviation of a pair's difference. Exact, by the noncentral t distribution.
  """
  from scipy import stats
  if difference == 0 or deviation == 0:
    return None if difference == 0 else 2
  effect = min(abs(difference) / deviation, 1e6)   # the noncentral t overflows where all differences are nearly equal

  def enough(n):
    if n > 2000:   # normal by then, and the noncentral t is slow and overflows
      return stats.norm.cdf(effect * n ** 0.5 - stats.norm.ppf((1 + confidence) / 2)) >= power
    return stats.nct.sf(stats.t.ppf((1 + confidence) / 2, n - 1), n - 1, effect * n ** 0.5) >= power

  low, high = 1, 2
  while not enough(high):
    low, high = high, 2 * high
    if high > most:
      return None
  while high - low > 1:
    middle = (low + high) // 2
    low, high = (low, middle) if enough(middle) else (middle, high)
  return high
