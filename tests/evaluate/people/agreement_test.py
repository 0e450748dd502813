"""Agreement of raters equals published values, other implementations, and what the definitions say."""
import itertools

import numpy as np
import pytest

from lm import statistics
from lm.evaluate.people import agreement

# The two examples of the package `krippendorff` 0.9.0, whose values that package computes.
THREE = """* * * * * 3 4 1 2 1 1 3 3 * 3
           1 * 2 1 3 3 4 3 * * * * * * *
           * * 2 1 3 4 4 * 2 1 1 3 3 * 4"""
FOUR = """1 2 3 3 2 1 4 1 2 * * *
          1 2 3 3 2 2 4 1 2 5 * 3
          * 3 3 3 2 3 4 2 2 5 1 *
          1 2 3 3 2 4 4 1 2 5 1 *"""
ALPHAS = [(THREE, 'nominal', 0.691358024691358), (THREE, 'ordinal', 0.8067214199413153),
          (THREE, 'interval', 0.8108448928121059), (THREE, 'ratio', 0.8089436707842471),
          (FOUR, 'nominal', 0.743421052631579), (FOUR, 'ordinal', 0.8153875037548814),
          (FOUR, 'interval', 0.8491071428571428), (FOUR, 'ratio', 0.7974027747116121)]


def matrix(text: str) -> np.ndarray:
  return np.array([[np.nan if value == '*' else float(value) for value in line.split()] for line in text.splitlines()])


@pytest.mark.parametrize('text,level,value', ALPHAS)
def test_alpha_equals_that_of_the_package_krippendorff(text, level, value):
  np.testing.assert_allclose(agreement.krippendorff_alpha(matrix(text), level), value, rtol=1e-12)


def test_nominal_alpha_is_one_minus_disagreement_within_units_by_that_among_all_values():
  """By loops over pairs of values."""
  values = np.random.default_rng(0).integers(0, 3, (4, 20)).astype(float)
  values[np.random.default_rng(1).random(values.shape) < 0.3] = np.nan
  units = [column[~np.isnan(column)] for column in values.T]
  units = [unit for unit in units if len(unit) > 1]
  everything = np.concatenate(units)
  within = sum(sum(a != b for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in units)
  among = sum(a != b for a, b in itertools.permutations(everything, 2)) / (len(everything) - 1)
  np.testing.assert_allclose(agreement.krippendorff_alpha(values, 'nominal'), 1 - within / among)


def test_alpha_is_one_for_equal_values_and_not_defined_without_pairs_or_differences():
  assert agreement.krippendorff_alpha([[1, 2, 3], [1, 2, 3]], 'ordinal') == 1
  assert np.isnan(agreement.krippendorff_alpha([[1, 1], [1, 1]], 'nominal'))
  assert np.isnan(agreement.krippendorff_alpha([[1, np.nan], [np.nan, 2]], 'interval'))


def test_alpha_has_an_interval_over_units():
  rows, categories = agreement.coincidences(matrix(FOUR))
  flat = rows.reshape(len(rows), -1)
  interval = statistics.bootstrap(flat, lambda sums: agreement.alpha(
      sums.reshape(*sums.shape[:-1], 5, 5), categories, 'nominal'))
  np.testing.assert_allclose(interval.value, 0.743421052631579)
  assert 0.4 < interval.low < interval.value < interval.high <= 1


FIRST, SECOND = [1, 2, 3, 4, 5, 3, 2, 4], [1, 3, 3, 5, 4, 3, 1, 4]


@pytest.mark.parametrize('weights,value', [('equal', 0.37254901960784315), ('linear', 0.6521739130434783),
                                           ('quadratic', 0.8461538461538461)])
def test_kappa_equals_that_of_scikit_learn(weights, value):
  np.testing.assert_allclose(agreement.cohen_kappa(FIRST, SECOND, weights), value, rtol=1e-12)


def test_kappa_of_the_textbook_table_and_where_it_is_not_defined():
  np.testing.assert_allclose(agreement.kappa(np.array([[20, 5], [10, 15]])), 0.4)
  assert np.isnan(agreement.cohen_kappa([1, 1], [1, 1])) and np.isnan(agreement.cohen_kappa([], []))
