"""A measure is a function of sums over documents, with an interval over documents."""
import math

import numpy as np
import pytest

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
