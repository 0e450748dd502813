"""Which of two arms is better, by runs paired by seed, and whether the data suffice to say. Lower is better."""
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Interval(NamedTuple):
  """A mean and its confidence interval, which is infinite for a single value."""
  mean: float
  low: float
  high: float

  def __str__(self):
    return f'{self.mean:.4f} [{self.low:.4f}, {self.high:.4f}]'


def interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
  """Student's t interval of the mean."""
  from scipy import stats  # 0.3 s: not for --help
  mean, n = float(np.mean(values)), len(values)
  half = math.inf if n < 2 else stats.t.ppf((1 + confidence) / 2, n - 1) * np.std(values, ddof=1) / n ** 0.5
  return Interval(mean, float(mean - half), float(mean + half))


class Verdict(NamedTuple):
  """The result of comparing an arm with another."""
  difference: Interval   # the arm minus the other, over seeds
  deviation: float       # standard deviation of a pair's difference, over seeds; nan for one seed
  confidence: float      # of the interval

  @property
  def word(self) -> str:
    if self.difference.high < 0:
      return 'better'
    return 'worse' if self.difference.low > 0 else 'not distinguishable'

  @property
  def needed(self) -> int | None:
    """How many seeds would show a difference of this size; None where it is shown already, or is zero."""
    if self.word != 'not distinguishable' or math.isnan(self.deviation):
      return None
    return seeds_needed(self.difference.mean, self.deviation, self.confidence)

  def __str__(self):
    seeds = self.needed
    return self.word if seeds is None else f'{self.word}; a difference of this size would need {seeds:,} seeds'


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


def seeds_needed(difference: float, deviation: float, confidence: float = 0.95, power: float = 0.8,
                 most: int = 1_000_000) -> int | None:
  """Returns how many pairs a paired t-test needs to find a true difference with probability `power`.

  None if it is more than `most`.

  `deviation` is the standard deviation of a pair's difference. Exact, by the noncentral t distribution.
  """
  from scipy import stats
  if difference == 0 or deviation == 0:
    return None if difference == 0 else 2
  effect = abs(difference) / deviation

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


Curve = Sequence[tuple[float, float]]   # (compute, loss), by compute


def reached(curve: Curve, loss: float) -> float | None:
  """Returns the compute at which a curve first reaches `loss`, by linear interpolation; None if it never does."""
  before = None
  for compute, value in curve:
    if value <= loss:
      if before is None or before[1] == value:
        return compute
      share = (before[1] - loss) / (before[1] - value)
      return before[0] + share * (compute - before[0])
    before = compute, value
  return None


def speed_up(arm: Sequence[Curve], other: Sequence[Curve], confidence: float = 0.95) -> Interval | None:
  """Returns by what factor the arm reaches the other's final loss sooner: a geometric mean over seeds, with interval.

  It is below 1 where the other arm is faster: the reciprocal of that arm's speed-up. None where in some seed neither
  reaches the other's final loss, or where a curve has fewer than two points.
  """
  logs = []
  for a, b in zip(arm, other, strict=True):
    if min(len(a), len(b)) < 2:
      return None
    if compute := reached(a, b[-1][1]):
      logs.append(math.log(b[-1][0] / compute))
    elif compute := reached(b, a[-1][1]):
      logs.append(-math.log(a[-1][0] / compute))
    else:
      return None
  return Interval(*(math.exp(min(x, 700.)) for x in interval(logs, confidence)))
