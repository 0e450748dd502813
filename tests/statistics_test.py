"""Comparisons state what their seeds can show: of equal arms nothing in 19 of 20 trials, and how many seeds would
suffice.
"""
import math

import numpy as np
import pytest
from scipy import stats

from lm import statistics


def simulated(rng, seeds, gap=0., noise=0.01, shared=0.03):
  """Returns final losses of two arms, with a shared effect of each seed and an effect of each arm's own."""
  both = 1.5 + shared * rng.normal(size=seeds)
  return both + noise * rng.normal(size=seeds) + gap, both + noise * rng.normal(size=seeds)


@pytest.mark.parametrize('seeds', [2, 3, 5, 10])
def test_equal_arms_are_not_distinguishable_in_19_of_20_trials(seeds):
  rng, trials = np.random.default_rng(seeds), 2000
  false_alarms = sum(statistics.judge(*simulated(rng, seeds)).word != 'not distinguishable' for _ in range(trials))
  # Within three standard deviations of the binomial: neither too often, nor so rarely that the test has no power.
  assert abs(false_alarms - trials / 20) < 3 * math.sqrt(trials * 0.05 * 0.95)


def test_several_equal_arms_are_not_distinguishable_in_19_of_20_trials():
  rng, trials, false_alarms = np.random.default_rng(0), 1000, 0
  for _ in range(trials):
    first, *others = rng.normal(size=(4, 5))
    false_alarms += any(statistics.judge(arm, first, comparisons=3).word != 'not distinguishable' for arm in others)
  assert false_alarms < trials / 20 + 3 * math.sqrt(trials * 0.05 * 0.95)


@pytest.mark.parametrize('gap,word', [(-0.1, 'better'), (0.1, 'worse')])
def test_a_difference_beyond_the_noise_is_reported_and_pairs_cancel_the_effect_of_seeds(gap, word):
  arm, other = simulated(np.random.default_rng(1), 5, gap, shared=3.)
  verdict = statistics.judge(arm, other)
  assert verdict.word == word and verdict.needed is None
  assert verdict.difference.low < gap < verdict.difference.high
  reference = stats.ttest_rel(arm, other).confidence_interval(0.95)
  np.testing.assert_allclose(verdict.difference[1:], reference)
  unpaired = stats.ttest_ind(arm, other).pvalue
  assert unpaired > 0.05


def test_the_advised_number_of_seeds_finds_the_difference_with_power_0_8():
  rng, gap, noise = np.random.default_rng(0), 0.005, 0.01
  needed = statistics.pairs_needed(gap, noise * 2 ** 0.5)
  assert needed == 65   # G*Power and statsmodels: a paired t-test of effect 0.3536, two-sided, power 0.8
  power = np.mean([statistics.judge(*simulated(rng, needed, -gap, noise)).word == 'better' for _ in range(1000)])
  assert abs(power - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 1000)


def test_the_verdict_names_the_seeds_that_are_needed():
  verdict = statistics.judge([1.01, 0.98, 1.03], [1., 1., 1.])
  assert str(verdict).startswith('not distinguishable; a difference of this size would need ')
  assert statistics.pairs_needed(0.5, 1e-17) == 2
  assert statistics.pairs_needed(0.5, 0.) == 2 and statistics.pairs_needed(0., 1.) is None
  assert statistics.pairs_needed(1e-6, 1.) is None   # more than a million pairs
  assert statistics.pairs_needed(0.01, 1.) == pytest.approx((1.95996 + 0.84162) ** 2 * 1e4, rel=1e-3)


@pytest.mark.parametrize('arm,other,message', [
    ([1., 2.], [1.], 'no pairs'), ([], [], 'no pairs'), ([1., math.nan], [1., 2.], 'diverged'),
    ([1., 2.], [1., math.inf], 'diverged')])
def test_what_cannot_be_compared_is_refused(arm, other, message):
  with pytest.raises(ValueError, match=message):
    statistics.judge(arm, other)


def ratio(sums):
  """Mean loss of a token, from sums of (loss, tokens)."""
  return sums[..., 0] / sums[..., 1]


def test_the_bootstrap_of_a_mean_is_that_of_scipy_and_of_the_normal_law():
  values = np.random.default_rng(0).gamma(2., size=400)
  estimate = statistics.bootstrap(np.stack([values, np.ones(400)], 1), ratio, samples=10_000)
  reference = stats.bootstrap([values], np.mean, n_resamples=10_000, method='percentile', rng=1).confidence_interval
  error = values.std() / 20
  assert estimate.value == pytest.approx(values.mean())
  np.testing.assert_allclose(estimate[1:], reference, atol=0.06 * error)
  np.testing.assert_allclose(estimate[1:], values.mean() + np.array([-1.96, 1.96]) * error, atol=0.1 * error)


def test_the_bootstrap_of_a_ratio_draws_documents_and_covers_the_truth_in_19_of_20_trials():
  """Tokens of a document share its difficulty, so an interval over tokens would be too narrow."""
  rng, trials, covered, narrow = np.random.default_rng(3), 300, 0, 0
  for trial in range(trials):
    tokens, difficulty = rng.integers(5, 40, size=80), 3 + 0.5 * rng.normal(size=80)
    rows = np.stack([tokens * difficulty, tokens], 1)
    interval = statistics.bootstrap(rows, ratio, samples=500, seed=trial)
    covered += interval.low <= 3 <= interval.high
    by_token = np.repeat(rows[:, 0] / tokens, tokens)
    narrow += abs(by_token.mean() - 3) <= 1.96 * by_token.std() / len(by_token) ** 0.5
  assert abs(covered - 0.95 * trials) < 3 * math.sqrt(trials * 0.95 * 0.05) + 0.02 * trials
  assert narrow < 0.6 * trials


def test_a_bootstrap_is_the_same_again_and_of_one_document_is_infinite():
  rows = np.random.default_rng(0).random((50, 2))
  assert statistics.bootstrap(rows, ratio) == statistics.bootstrap(rows, ratio)
  assert statistics.bootstrap(rows, ratio) != statistics.bootstrap(rows, ratio, seed=1)
  assert statistics.bootstrap(rows[:1], ratio)[1:] == (-math.inf, math.inf)
  with pytest.raises(ValueError, match='no documents'):
    statistics.bootstrap(rows[:0], ratio)


def test_draws_in_chunks_are_the_draws_at_once():
  rows = np.random.default_rng(0).random((11_000, 2))
  sums = statistics.resampled_sums(rows, 1000, 0)   # in two chunks
  draws = np.random.default_rng(0).integers(11_000, size=(1000, 11_000))
  np.testing.assert_allclose(sums[[0, 950, 999]], [rows[draw].sum(0) for draw in draws[[0, 950, 999]]])


def test_an_infinite_value_is_a_value_of_the_bootstrap_and_an_undefined_one_is_not():
  rows = np.array([[np.inf], [1.], [2.], [3.]])
  estimate = statistics.bootstrap(rows.clip(max=1e300), lambda sums: np.where(sums > 1e200, np.inf, sums)[..., 0])
  assert estimate.high == np.inf and 4 <= estimate.low <= 12   # about a third of the draws lack the first document
  undefined = statistics.bootstrap(rows[1:], lambda sums: np.where(sums > 6, np.nan, sums)[..., 0])
  assert undefined.value == 6 and 3 <= undefined.low < undefined.high <= 6


def test_correlations_are_their_definitions_and_their_intervals_cover():
  rng = np.random.default_rng(0)
  x = rng.normal(size=40).round(1)   # with ties
  y = (x + rng.normal(size=40)).round(1)
  values = statistics.correlations(x, y)

  def pearson(a, b):
    a, b = a - a.mean(), b - b.mean()
    return a @ b / np.sqrt((a @ a) * (b @ b))
  ranks = [np.array([(v < u).sum() + ((v == u).sum() + 1) / 2 for u in v]) for v in (x, y)]
  signs = [np.sign(v[:, None] - v[None]) for v in (x, y)]
  tau = (signs[0] * signs[1]).sum() / np.sqrt((signs[0] ** 2).sum() * (signs[1] ** 2).sum())
  for name, expected in (('pearson', pearson(x, y)), ('spearman', pearson(*ranks)), ('kendall', tau)):
    assert values[name].value == pytest.approx(expected)
    assert values[name].low < expected < values[name].high
  intervals = [statistics.correlations(*rng.multivariate_normal([0, 0], [[1, .5], [.5, 1]], 100).T, samples=60,
                                       seed=i)['pearson'] for i in range(40)]
  assert sum(each.low < .5 < each.high for each in intervals) >= 33


def test_correlations_draw_whole_groups_and_constants_have_none():
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(2, 20))
  once, alike = statistics.correlations(x, y), statistics.correlations(
      np.repeat(x, 9), np.repeat(y, 9), np.repeat(np.arange(20), 9))
  assert alike['pearson'] == pytest.approx(once['pearson'])   # nine copies of each item say no more than one
  assert statistics.correlations(np.repeat(x, 9), np.repeat(y, 9))['pearson'].low > alike['pearson'].low + 0.1
  assert all(np.isnan(value.value) for value in statistics.correlations(np.ones(9), np.arange(9)).values())
  with pytest.raises(ValueError, match='2 scores and 2 ratings have no correlation'):
    statistics.correlations([1, 2], [1, 2])
