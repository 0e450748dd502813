"""Comparisons of two systems on the same documents: against scipy, sacrebleu, enumeration and simulated systems."""
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from lm import statistics
from lm.evaluate import measures, significance
from lm.evaluate.measures import Measure

RNG = np.random.default_rng(0)


def mean_pair(one, other, better='higher'):
  return measures.mean('score', one, better), measures.mean('score', other, better)


def ratios(count, shift=0., seed=0):
  """Two systems with a metric that is no mean: a weighted ratio, squared."""
  rng = np.random.default_rng(seed)
  weights = rng.integers(1, 9, count).astype(float)
  value = lambda sums: measures.ratio(sums) ** 2
  totals = weights * rng.normal(1., 0.2, (2, count)) + shift * np.array([[1.], [0.]])
  return [Measure('squared', np.stack([total, weights], 1), value, 'lower') for total in totals]


def test_few_documents_are_enumerated_and_equal_scipy():
  one, other = RNG.normal(0.3, 1, (2, 9))
  comparison = significance.compare(*mean_pair(one, other))
  expected = stats.permutation_test((one, other), lambda a, b, axis: np.mean(a - b, axis=axis), vectorized=True,
                                    permutation_type='samples', n_resamples=np.inf)
  assert comparison.p == pytest.approx(expected.pvalue, abs=1e-12)
  assert comparison.difference.value == pytest.approx(expected.statistic)


def test_many_documents_are_drawn_and_close_to_scipy():
  one, other = RNG.normal(0.12, 1, 80), RNG.normal(0, 1, 80)
  expected = stats.permutation_test((one, other), lambda a, b, axis: np.mean(a - b, axis=axis), vectorized=True,
                                    permutation_type='samples', n_resamples=9999, rng=np.random.default_rng(1)).pvalue
  error = (2 * expected * (1 - expected) / 10_000) ** 0.5
  assert 0.02 < expected < 0.9 and abs(significance.compare(*mean_pair(one, other)).p - expected) < 4 * error


def test_a_metric_that_is_no_mean_equals_a_plain_loop_over_all_exchanges():
  one, other = ratios(8, 0.4)
  actual = abs(one.value(one.rows.sum(0)) - other.value(other.rows.sum(0)))
  extreme = 0
  for signs in itertools.product([False, True], repeat=8):
    swapped = np.array(signs)[:, None]
    first, second = np.where(swapped, other.rows, one.rows), np.where(swapped, one.rows, other.rows)
    extreme += abs(one.value(first.sum(0)) - one.value(second.sum(0))) >= actual - 1e-12
  assert significance.compare(one, other).p == pytest.approx(extreme / 2 ** 8)


def test_documents_that_do_not_differ_leave_the_test_exact():
  """Of 500 documents, 5 differ, always for the better: 2 of 32 exchanges are as extreme."""
  one = np.concatenate([np.ones(495), np.full(5, 2.)])
  assert significance.compare(*mean_pair(one, np.ones(500))).p == 2 / 32


def test_the_order_of_documents_is_irrelevant():
  one, other = ratios(50, 0.1)
  order = RNG.permutation(50)
  shuffled = [measure._replace(rows=measure.rows[order]) for measure in (one, other)]
  assert significance.compare(one, other) == significance.compare(*shuffled)


@pytest.mark.parametrize('better,words', [('higher', ('better', 'worse')), ('lower', ('worse', 'better')),
                                          ('', ('higher', 'lower'))])
def test_verdicts_say_which_direction_is_better(better, words):
  one, other = RNG.normal(0, 1, 100) + 1, RNG.normal(0, 1, 100)
  assert significance.compare(*mean_pair(one, other, better)).verdict == words[0]
  assert significance.compare(*mean_pair(other, one, better)).verdict == words[1]


def test_equal_systems_are_told_apart_as_often_as_the_level_says():
  """Under the null hypothesis p is at most 0.05 in a share of 0.05 of the cases, and the interval has 0 in 0.95."""
  rejections, covered, count = 0, 0, 300
  for seed in range(count):
    rng = np.random.default_rng(seed)
    shared = rng.normal(0, 2, 40)
    comparison = significance.compare(*mean_pair(*(shared + rng.exponential(1, (2, 40)))), samples=400, seed=seed)
    rejections += comparison.p <= 0.05
    covered += comparison.difference.low <= 0 <= comparison.difference.high
  error = 3 * (0.05 * 0.95 / count) ** 0.5
  assert rejections / count < 0.05 + error
  assert abs(covered / count - 0.95) < error + 0.01   # the percentile interval is a little narrow for 40 documents


def test_documents_needed_are_those_of_a_paired_t_test_for_a_mean():
  one, other = RNG.normal(0.05, 1, 60), RNG.normal(0, 1, 60)
  comparison = significance.compare(*mean_pair(one, other))
  expected = statistics.pairs_needed(np.mean(one - other), np.std(one - other, ddof=1))
  assert comparison.word == 'not distinguishable' and comparison.needed == expected > 60
  assert f'would need about {expected:,} documents' in comparison.verdict


def test_the_deviation_of_documents_is_that_of_the_bootstrap_for_a_ratio():
  one, other = ratios(400, 0.1)
  rows = np.concatenate([one.rows, other.rows], 1)
  drawn = statistics.resampled_sums(rows, 4000, 1)
  error = np.std(one.value(drawn[:, :2]) - one.value(drawn[:, 2:]))
  assert significance.compare(one, other).deviation / 20 == pytest.approx(error, rel=0.06)


def test_so_many_documents_tell():
  """With as many documents as needed, about 0.8 of the tests find the difference."""
  rng = np.random.default_rng(3)
  comparison = significance.compare(*mean_pair(rng.normal(0.2, 1, 15), np.zeros(15)))._replace(
      difference=statistics.Interval(0.5, -1., 2.), deviation=1., adjusted=0.5)
  shown = [significance.compare(*mean_pair(rng.normal(0.5, 1, comparison.needed), np.zeros(comparison.needed)),
                                samples=400).p <= 0.05 for _ in range(200)]
  assert abs(np.mean(shown) - 0.8) < 0.1


def test_few_documents_can_never_tell_and_the_count_says_so():
  one = np.array([1., 1.01, 0.99, 1.])   # 2 of 16 exchanges: p is 0.125 at best
  comparison = significance.compare(*mean_pair(one, np.zeros(4)))
  assert comparison.p == 2 / 16 and comparison.needed == 6 and 2 / 2 ** 6 <= 0.05 < 2 / 2 ** 5
  assert significance.compare(*mean_pair(one[:1], [0.])).verdict.endswith('one document tells nothing about others')
  undefined = significance.compare(*mean_pair([0., np.nan], [0., 1.]))
  assert undefined.verdict == 'not distinguishable; a value is not a finite number'
  assert significance.compare(*mean_pair(one, one)).verdict == 'not distinguishable; the values are equal'


def test_holm_is_his_procedure():
  """Hypotheses are rejected from the smallest p on, while p <= level / (those that remain)."""
  p = RNG.uniform(0, 0.1, 12)
  adjusted = significance.holm(p)
  for level in (0.01, 0.05, 0.2, 0.5):
    rejected, remaining = set(), len(p)
    for i in np.argsort(p):
      if p[i] > level / remaining:
        break
      rejected.add(i)
      remaining -= 1
    assert rejected == set(np.flatnonzero(adjusted <= level))
  np.testing.assert_allclose(significance.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])


def test_several_systems_are_corrected_together():
  baseline = RNG.normal(0, 1, 50)
  systems = {'base': {'score': measures.mean('score', baseline, 'higher')}}
  for i in range(10):
    systems[f'system {i}'] = {'score': measures.mean('score', baseline + RNG.normal(0, 1, 50), 'higher')}
  systems['good'] = {'score': measures.mean('score', baseline + RNG.normal(1, 1, 50), 'higher')}
  comparisons = significance.compare_all(systems, 'base')
  adjusted = significance.holm([one.p for ones in comparisons.values() for one in ones])
  assert [one.adjusted for ones in comparisons.values() for one in ones] == adjusted.tolist()
  assert {name for name, (one,) in comparisons.items() if one.word != 'not distinguishable'} == {'good'}
  text = significance.table(comparisons, 'base')
  assert 'for 11 comparisons' in text and text.count('not distinguishable') == 10
  with pytest.raises(ValueError, match='nothing to compare base with'):
    significance.compare_all({'base': systems['base']}, 'base')


def test_what_is_not_paired_is_refused():
  one = measures.mean('a', [1., 2.], 'higher')
  with pytest.raises(ValueError, match='a and b are different metrics'):
    significance.compare(one, one._replace(name='b'))
  with pytest.raises(ValueError, match='of 2 documents and of the other of 1'):
    significance.compare(one, one._replace(rows=one.rows[:1]))


def test_a_value_that_is_not_defined_tells_nothing():
  rows = np.zeros((4, 2))
  comparison = significance.compare(*[Measure('a', rows, measures.ratio, 'higher')] * 2)
  assert math.isnan(comparison.p) and comparison.word == 'not distinguishable'


WORDS = list('abcdefghijklmnopqrst')


@pytest.fixture(scope='module')
def bleu():
  """sacrebleu, references, outputs of two systems, and their measures."""
  pytest.importorskip('sacrebleu')
  from sacrebleu.metrics import BLEU
  rng = np.random.default_rng(5)
  references = [rng.choice(WORDS, 12).tolist() for _ in range(60)]
  noisy = lambda share: [' '.join(rng.choice(WORDS) if rng.random() < share else word for word in words)
                         for words in references]
  references, outputs = [' '.join(words) for words in references], (noisy(0.28), noisy(0.32))
  metric = BLEU()
  value = lambda sums: np.apply_along_axis(lambda row: metric._compute_score_from_stats(list(row)).score, -1, sums)
  rows = [np.array(metric._extract_corpus_statistics(texts, [references]), float) for texts in outputs]
  order = np.lexsort(np.concatenate(rows, 1).T)   # the order in which `compare` draws
  references, *outputs = ([texts[i] for i in order] for texts in (references, *outputs))
  return references, outputs, [Measure('BLEU', one[order], value, 'higher') for one in rows]


def test_corpus_bleu_is_compared_as_sacrebleu_does_it(bleu, monkeypatch):
  from sacrebleu.metrics import BLEU
  from sacrebleu.significance import PairedTest
  references, outputs, (one, other) = bleu
  monkeypatch.setenv('SACREBLEU_SEED', '7')
  test = PairedTest([('other', outputs[1]), ('one', outputs[0])], {'BLEU': BLEU()}, [references], 'ar', n_samples=2000)
  _, scores = test()
  comparison = significance.compare(one, other, samples=2000)
  expected = scores['BLEU'][1].p_value
  assert [comparison.baseline, comparison.value] == pytest.approx([result.score for result in scores['BLEU']])
  assert 0.01 < expected < 0.9 and abs(comparison.p - expected) < 4 * (2 * expected * (1 - expected) / 2000) ** 0.5


def test_the_interval_is_of_the_draws_of_sacrebleu(bleu, monkeypatch):
  """With the same seed, the documents of each draw are the same."""
  from sacrebleu.metrics import BLEU
  from sacrebleu.significance import _bootstrap_resample
  _, _, (one, other) = bleu
  monkeypatch.setenv('SACREBLEU_SEED', '0')
  drawn = [[score.score for score in _bootstrap_resample(measure.rows.tolist(), BLEU(), 2000)[1]]
           for measure in (one, other)]
  expected = np.quantile(np.subtract(*drawn), [0.025, 0.975])
  np.testing.assert_allclose(significance.compare(one, other, samples=10).difference[1:], expected, atol=1e-4)
