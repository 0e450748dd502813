"""How far raters agree: Krippendorff's alpha and Cohen's kappa.

Both are functions of sums over units (what is rated), so that `statistics.bootstrap` gives their intervals:
`coincidences` and `confusions` return what each unit adds to the sums, `alpha` and `kappa` compute the coefficient from
sums. 1 is perfect agreement, 0 that of chance; values below 0 are disagreement beyond chance.

References: Krippendorff, Content Analysis (2004), chapter 11; Cohen 1960 and 1968.
"""
from typing import Literal

import numpy as np

Level = Literal['nominal', 'ordinal', 'interval', 'ratio']
Weights = Literal['equal', 'linear', 'quadratic']


def coincidences(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns the coincidence matrices of units, [units, C, C], and the C values that occur, in ascending order.

  `values`, [raters, units], are numbers, nan where a rater did not rate a unit. A unit with fewer than two values has
  nothing that could agree and adds zeros.
  """
  values = np.asarray(values, float)
  categories = np.unique(values[~np.isnan(values)])
  counts = (values[:, :, None] == categories).sum(0).astype(float)   # [units, C]
  raters = counts.sum(1)
  pairs = counts[:, :, None] * counts[:, None, :] - counts[:, :, None] * np.eye(len(categories))
  return pairs * (raters > 1)[:, None, None] / np.maximum(raters - 1, 1)[:, None, None], categories


def alpha(sums: np.ndarray, categories: np.ndarray, level: Level) -> np.ndarray:
  """Returns Krippendorff's alpha from summed coincidences, [..., C, C] -> [...].

  nan where it is not defined: nothing was rated twice, or all values are the same.
  """
  sums = np.asarray(sums, float)
  totals = sums.sum(-1)                                 # [..., C]: how often each value occurs
  count = totals.sum(-1)
  distance = _distance(totals, np.asarray(categories, float), level)
  observed = (sums * distance).sum((-2, -1))
  expected = (totals[..., :, None] * totals[..., None, :] * distance).sum((-2, -1))
  defined = expected > 0
  return np.where(defined, 1 - (count - 1) * observed / np.where(defined, expected, 1), np.nan)


def _distance(totals: np.ndarray, categories: np.ndarray, level: Level) -> np.ndarray:
  """Returns the squared distances of values, [..., C, C]. Ordinal ones depend on how often each value occurs."""
  if level == 'nominal':
    return 1 - np.eye(len(categories))
  if level == 'ordinal':   # the difference of mean ranks
    ranks = np.cumsum(totals, -1) - totals / 2
    return (ranks[..., :, None] - ranks[..., None, :]) ** 2
  difference = categories[:, None] - categories
  if level == 'interval':
    return difference ** 2
  total = categories[:, None] + categories
  return np.divide(difference, total, out=np.zeros_like(difference), where=total != 0) ** 2


def krippendorff_alpha(values: np.ndarray, level: Level) -> float:
  """Returns Krippendorff's alpha of `values`, [raters, units] with nan where there is none; nan if not defined."""
  rows, categories = coincidences(values)
  return float(alpha(rows.sum(0), categories, level))


def confusions(first: np.ndarray, second: np.ndarray) -> np.ndarray:
  """Returns the confusion matrices of units that two raters rated, [units, C, C]. `first` and `second` are [units]."""
  first, second = np.asarray(first), np.asarray(second)
  categories = np.union1d(first, second)
  return ((first[:, None] == categories)[:, :, None] & (second[:, None] == categories)[:, None, :]).astype(float)


def kappa(sums: np.ndarray, weights: Weights = 'equal') -> np.ndarray:
  """Returns Cohen's kappa from summed confusions, [..., C, C] -> [...]; nan if it is not defined.

  Disagreements weigh equally, or by the distance of the ranks of the two values, linear or squared.
  """
  sums = np.asarray(sums, float)
  ranks = np.arange(sums.shape[-1])
  apart = np.abs(ranks[:, None] - ranks)
  distance = {'equal': apart > 0, 'linear': apart, 'quadratic': apart ** 2}[weights]
  observed = (sums * distance).sum((-2, -1)) * sums.sum((-2, -1))
  expected = (sums.sum(-1)[..., :, None] * sums.sum(-2)[..., None, :] * distance).sum((-2, -1))
  defined = expected > 0
  return np.where(defined, 1 - observed / np.where(defined, expected, 1), np.nan)


def cohen_kappa(first: np.ndarray, second: np.ndarray, weights: Weights = 'equal') -> float:
  """Returns Cohen's kappa of the values that two raters gave to the same units; nan if it is not defined."""
  return float(kappa(confusions(first, second).sum(0), weights))
