"""Ratings of systems from pairwise comparisons: the model of Bradley and Terry, by maximum likelihood.

System i beats system j with probability sigmoid(s_i - s_j); a tie counts as half a win for each. The strengths s are a
function of the sums of wins over items, so that `statistics.bootstrap` gives their intervals.

References: Bradley and Terry 1952; Ford 1957 on when the maximum exists.
"""
from collections.abc import Sequence

import numpy as np


def bradley_terry(wins: np.ndarray) -> np.ndarray:
  """Returns log-strengths of mean zero from wins, [..., S, S] -> [..., S]. `wins[i, j]`: how often i beat j.

  The maximum is infinite where some systems won all comparisons with the others. There, one tie is added between the
  systems of each pair that was compared, so that the strengths are finite. They are nan where some systems were never
  compared with the others, directly or through third ones: then nothing is known of their difference.
  """
  wins = np.asarray(wins, float)
  shape, systems = wins.shape[:-1], wins.shape[-1]
  wins = wins.reshape(-1, systems, systems)
  unlinked = ~_reachable(wins + wins.swapaxes(1, 2)).all((1, 2))
  infinite = ~_reachable(wins).all((1, 2))
  wins = wins + 0.5 * infinite[:, None, None] * (wins + wins.swapaxes(1, 2) > 0)
  wins[unlinked] = 1 - np.eye(systems)   # any wins that can be solved; their strengths are nan below
  games, strengths = wins + wins.swapaxes(1, 2), np.zeros(wins.shape[:2])
  for _ in range(200):   # Newton's method on a concave function; long steps are cut, so that it cannot overshoot
    p = 1 / (1 + np.exp(strengths[:, None, :] - strengths[:, :, None]))
    gradient = wins.sum(2) - (games * p).sum(2)
    weights = games * p * (1 - p)
    curvature = np.eye(systems) * weights.sum(2)[:, :, None] - weights
    # Strengths are known up to a constant: the curvature has a null space, which the mean fills.
    scale = np.trace(curvature, axis1=1, axis2=2)[:, None, None] / systems ** 2
    step = np.linalg.solve(curvature + scale, gradient[..., None])[..., 0]
    step -= step.mean(1, keepdims=True)
    step *= np.minimum(1, 2 / np.maximum(np.abs(step).max(1, keepdims=True), 1e-300))
    strengths = strengths + step
    if np.abs(step).max(initial=0) < 1e-12:
      break
  strengths[unlinked] = np.nan
  return strengths.reshape(shape)


def scaled(strengths: np.ndarray) -> np.ndarray:
  """Returns strengths on the scale of Elo: mean 1000, and 400 points more are ten times the odds to win."""
  return 1000 + 400 / np.log(10) * np.asarray(strengths)


def caution(wins: np.ndarray, systems: Sequence[str]) -> str:
  """Returns what is to be known of the strengths of these wins [S, S]: '' where the maximum likelihood is finite."""
  wins = np.asarray(wins, float)
  linked = _reachable((wins + wins.T)[None])[0]
  names = lambda chosen: ', '.join(name for name, is_in in zip(systems, chosen) if is_in)
  if not linked.all():
    return (f'No ratings: {names(linked[0])} and {names(~linked[0])} were never compared, directly or through other '
            'systems; more votes are needed.')
  beats = _reachable(wins[None])[0]
  if beats.all():
    return ''
  # The systems that nothing outside their group has beaten are those that reach the most.
  strongest = beats[int(np.argmax(beats.sum(1)))] & beats[:, int(np.argmax(beats.sum(1)))]
  return (f'{names(strongest)} won all comparisons with {names(~strongest)}, so that the most likely difference is '
          'infinite; the ratings are computed with one tie added to each pair of systems.')


def _reachable(edges: np.ndarray) -> np.ndarray:
  """Returns which systems can be reached from which by positive edges, [N, S, S], each from itself too."""
  paths = (edges > 0) | np.eye(edges.shape[-1], dtype=bool)
  for _ in range(max(1, edges.shape[-1].bit_length())):
    paths = paths.astype(np.float32) @ paths.astype(np.float32) > 0
  return paths
