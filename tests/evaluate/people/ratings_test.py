"""Bradley-Terry strengths equal those of choix, and maximise the likelihood; where there is no maximum, it is said."""
import numpy as np
import pytest

from lm.evaluate.people import ratings

# a beat b 7 times of 10, a beat c 8 times of 10, b beat c 6 times of 10; strengths by choix 0.4.1.
WINS = np.array([[0, 7, 8], [3, 0, 6], [2, 4, 0]])
STRENGTHS = [0.7405699351270405, -0.14910225509726854, -0.591467680029772]


def test_strengths_equal_those_of_choix():
  np.testing.assert_allclose(ratings.bradley_terry(WINS), STRENGTHS, rtol=1e-7)
  np.testing.assert_allclose(ratings.scaled(ratings.bradley_terry(WINS)),
                             [1128.6501745156493, 974.0982853487701, 897.2515401355807], rtol=1e-8)


def test_two_systems_differ_by_the_logarithm_of_their_odds():
  strengths = ratings.bradley_terry([[0, 7.5], [2.5, 0]])   # seven wins, two losses, one tie
  np.testing.assert_allclose(strengths, np.array([0.5, -0.5]) * np.log(3), rtol=1e-12)


def test_the_likelihood_has_no_slope_at_the_strengths_of_any_wins():
  rng = np.random.default_rng(0)
  wins = rng.integers(0, 30, (500, 5, 5)) * 10. ** rng.integers(0, 4, (500, 5, 5)) + 0.5
  wins[:, range(5), range(5)] = 0
  strengths = ratings.bradley_terry(wins)
  p = 1 / (1 + np.exp(strengths[:, None] - strengths[:, :, None]))
  games = wins + wins.swapaxes(1, 2)
  np.testing.assert_allclose((games * p).sum(2), wins.sum(2), rtol=1e-9)
  np.testing.assert_allclose(strengths.sum(1), 0, atol=1e-9)
  assert ratings.caution(wins[0], 'abcde') == ''


def test_a_system_that_won_everything_has_a_finite_rating_and_a_caution():
  wins = np.array([[0, 5, 5], [0, 0, 3], [0, 2, 0]])
  strengths = ratings.bradley_terry(wins)
  assert np.isfinite(strengths).all() and strengths.argmax() == 0
  tied = wins + 0.5 * (1 - np.eye(3))
  np.testing.assert_allclose(strengths, ratings.bradley_terry(tied))
  assert ratings.caution(wins, 'abc').startswith('a won all comparisons with b, c, so that')


def test_a_group_that_won_all_comparisons_with_another_is_named():
  wins = np.zeros((4, 4))
  wins[2, 3] = wins[3, 2] = wins[0, 1] = wins[1, 0] = wins[2, 0] = 1
  assert ratings.caution(wins, 'abcd').startswith('c, d won all comparisons with a, b, so that')


def test_systems_that_were_never_compared_have_no_ratings():
  wins = np.zeros((4, 4))
  wins[0, 1] = wins[1, 0] = wins[2, 3] = wins[3, 2] = 2
  assert np.isnan(ratings.bradley_terry(wins)).all()
  assert ratings.caution(wins, 'abcd').startswith('No ratings: a, b and c, d were never compared')
  wins[1, 2] = wins[2, 1] = 1
  assert np.isfinite(ratings.bradley_terry(wins)).all() and ratings.caution(wins, 'abcd') == ''


@pytest.mark.parametrize('systems', [2, 3, 9])
def test_many_draws_at_once_have_the_strengths_of_each_alone(systems):
  wins = np.random.default_rng(systems).integers(0, 3, (50, systems, systems))
  wins[:, range(systems), range(systems)] = 0
  np.testing.assert_allclose(ratings.bradley_terry(wins), [ratings.bradley_terry(one) for one in wins], atol=1e-9)
