"""Comparisons say what they may: of equal arms nothing in 19 of 20 trials, and how many seeds would tell."""
import math

import numpy as np
import pytest
from scipy import stats

from lm.studies import statistics


def simulated(rng, seeds, gap=0., noise=0.01, shared=0.03):
  """Final losses of two arms: what a seed does to both, and what it does to each."""
  both = 1.5 + shared * rng.normal(size=seeds)
  return both + noise * rng.normal(size=seeds) + gap, both + noise * rng.normal(size=seeds)


@pytest.mark.parametrize('seeds', [2, 3, 5, 10])
def test_arms_that_are_the_same_are_not_distinguishable_in_19_of_20_trials(seeds):
  rng, trials = np.random.default_rng(seeds), 2000
  told = sum(statistics.judge(*simulated(rng, seeds)).word != 'not distinguishable' for _ in range(trials))
  # Within three standard deviations of the binomial: neither more often, nor so seldom that nothing would be found.
  assert abs(told - trials / 20) < 3 * math.sqrt(trials * 0.05 * 0.95)


def test_several_arms_that_are_the_same_are_all_not_distinguishable_in_19_of_20_trials():
  rng, trials, told = np.random.default_rng(0), 1000, 0
  for _ in range(trials):
    first, *others = rng.normal(size=(4, 5))
    told += any(statistics.judge(arm, first, comparisons=3).word != 'not distinguishable' for arm in others)
  assert told < trials / 20 + 3 * math.sqrt(trials * 0.05 * 0.95)


@pytest.mark.parametrize('gap,word', [(-0.1, 'better'), (0.1, 'worse')])
def test_a_difference_beyond_the_noise_is_told_and_pairs_cancel_what_seeds_do_to_both(gap, word):
  arm, other = simulated(np.random.default_rng(1), 5, gap, shared=3.)
  verdict = statistics.judge(arm, other)
  assert verdict.word == word and verdict.needed is None
  assert verdict.difference.low < gap < verdict.difference.high
  reference = stats.ttest_rel(arm, other).confidence_interval(0.95)
  np.testing.assert_allclose(verdict.difference[1:], reference)
  unpaired = stats.ttest_ind(arm, other).pvalue
  assert unpaired > 0.05


def test_so_many_seeds_as_it_says_would_find_the_difference():
  rng, gap, noise = np.random.default_rng(0), 0.005, 0.01
  needed = statistics.seeds_needed(gap, noise * 2 ** 0.5)
  assert needed == 65   # G*Power and statsmodels: a paired t-test of effect 0.3536, two-sided, power 0.8
  found = np.mean([statistics.judge(*simulated(rng, needed, -gap, noise)).word == 'better' for _ in range(1000)])
  assert abs(found - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 1000)


def test_needed_seeds_are_told_with_the_verdict():
  verdict = statistics.judge([1.01, 0.98, 1.03], [1., 1., 1.])
  assert str(verdict).startswith('not distinguishable; a difference of this size would need ')
  assert statistics.seeds_needed(0.5, 0.) == 2 and statistics.seeds_needed(0., 1.) is None
  assert statistics.seeds_needed(1e-6, 1.) is None   # more than a million
  assert statistics.seeds_needed(0.01, 1.) == pytest.approx((1.95996 + 0.84162) ** 2 * 1e4, rel=1e-3)


@pytest.mark.parametrize('arm,other,message', [
    ([1., 2.], [1.], 'no pairs'), ([], [], 'no pairs'), ([1., math.nan], [1., 2.], 'diverged'),
    ([1., 2.], [1., math.inf], 'diverged')])
def test_what_cannot_be_compared_says_so(arm, other, message):
  with pytest.raises(ValueError, match=message):
    statistics.judge(arm, other)


def test_the_speed_up_is_where_the_better_curve_reaches_the_others_end():
  slow = [(x, 4 - 2 * x) for x in (0.25, 0.5, 0.75, 1.)]      # ends at 2
  fast = [(x, 4 - 4 * x) for x in (0.25, 0.5, 0.75, 1.)]      # is there at a half
  assert statistics.reached(fast, 2.) == 0.5 and statistics.reached(fast, 2.5) == pytest.approx(0.375)
  assert statistics.reached(slow, 1.9) is None and statistics.reached(slow, 4.) == 0.25
  found = statistics.speed_up([fast] * 3, [slow] * 3)
  assert found == pytest.approx((2., 2., 2.))
  assert statistics.speed_up([slow] * 3, [fast] * 3) == pytest.approx((0.5, 0.5, 0.5))
  mixed = statistics.speed_up([fast, slow], [slow, fast])
  assert mixed.mean == pytest.approx(1) and mixed.low < 1 < mixed.high and mixed.low * mixed.high == pytest.approx(1)
  assert statistics.speed_up([slow[-1:]], [fast]) is None
