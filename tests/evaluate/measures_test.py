"""A measure is a function of sums over documents, with an interval over documents."""
import math

import numpy as np
import pytest

from lm import statistics
from lm.evaluate import measures


def test_a_mean_of_scores_has_the_interval_of_the_normal_law():
  scores = np.random.default_rng(0).normal(3., 2., size=900)
  interval = measures.mean('score', scores, 'higher').interval()
  assert interval.value == pytest.approx(scores.mean())
  np.testing.assert_allclose(interval[1:], scores.mean() + np.array([-1.96, 1.96]) * scores.std() / 30, atol=0.02)


def test_a_weighted_mean_is_that_of_numpy_and_scores_are_those_of_documents():
  scores, weights = np.array([1., 5., 2.]), np.array([3., 1., 0.])
  measure = measures.mean('loss', scores, 'lower', weights=weights)
  assert measure.interval().value == pytest.approx(np.average(scores, weights=weights))
  np.testing.assert_array_equal(measure.scores(), [1., 5., math.nan])


def test_intervals_of_many_measures_are_those_of_each_and_documents_are_drawn_once(monkeypatch):
  rng = np.random.default_rng(0)
  several = [measures.mean('a', rng.random(30), ''), measures.mean('b', rng.random(20), ''),
             measures.mean('c', rng.random(30), '', weights=rng.random(30)), measures.mean('d', [1.], '')]
  expected, draw, calls = [measure.interval() for measure in several], statistics.resampled_sums, []
  monkeypatch.setattr(statistics, 'resampled_sums', lambda rows, *args: calls.append(rows) or draw(rows, *args))
  assert np.allclose(measures.intervals(several), expected, rtol=1e-12, atol=0)
  assert [rows.shape for rows in calls] == [(30, 4), (20, 2)]
  assert measures.intervals([]) == []
