"""Scaling laws: the loss as a function of a model's size and of what it was trained on."""
import dataclasses
from collections.abc import Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Law:
  """L(N, D) = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, approach 3): N parameters, D tokens."""
  E: float
  A: float
  alpha: float
  B: float
  beta: float

  def __call__(self, n, d):
    return self.E + self.A / np.asarray(n, float) ** self.alpha + self.B / np.asarray(d, float) ** self.beta

  def __str__(self):
    return f'L = {self.E:.3f} + {self.A:.3g} / N^{self.alpha:.3f} + {self.B:.3g} / D^{self.beta:.3f}'


Points = Sequence[tuple[float, float, float]]   # (N, D, loss)


def fit(points: Points, delta: float = 1e-3, starts: Sequence[Law] = ()) -> Law:
  """Returns the best fit by the Huber loss of differences of logarithms, with L-BFGS from `starts` or from many points.

  ValueError with fewer points than 6, or where all have one N or one D: five numbers are fitted.
  """
  from scipy import optimize, special
  n, d, loss = np.asarray(points, float).T
  if len(loss) < 6 or len(set(n)) < 2 or len(set(d)) < 2:
    raise ValueError(f'{len(loss)} runs of {len(set(n))} sizes and {len(set(d))} budgets do not fix the 5 numbers of '
                     'the law; run 2 sizes and 2 budgets at least, and 6 in all')
  # N and D are measured in their geometric means, so that A and B are of the size of the losses.
  units = np.exp([np.log(n).mean(), np.log(d).mean()])
  log_n, log_d, target = np.log(n / units[0]), np.log(d / units[1]), np.log(loss)

  def objective(x):
    e, a, alpha, b, beta = x
    terms = np.stack([np.full_like(log_n, e), a - alpha * log_n, b - beta * log_d])
    total = special.logsumexp(terms, axis=0)
    r = total - target
    share = np.exp(terms - total)
    slope = np.clip(r, -delta, delta)
    value = np.sum(np.where(np.abs(r) <= delta, r ** 2 / 2, delta * (np.abs(r) - delta / 2)))
    gradient = [share[0], share[1], -share[1] * log_n, share[2], -share[2] * log_d]
    # In units of delta, so that the solver's tolerances fit.
    return value / delta ** 2, np.array([np.sum(slope * g) for g in gradient]) / delta ** 2

  low = np.log(loss.min())
  grid = [(low - e, low - part, alpha, low - part, beta) for e in (0.1, 0.5, 2.) for part in (1., 3.)
          for alpha in (0.2, 0.7) for beta in (0.2, 0.7)]
  from_laws = [(np.log(law.E), np.log(law.A) - law.alpha * np.log(units[0]), law.alpha,
                np.log(law.B) - law.beta * np.log(units[1]), law.beta) for law in starts]
  bounds = [(-20, low), (-20, 10), (0, 3), (-20, 10), (0, 3)]
  best = min((optimize.minimize(objective, x, jac=True, method='L-BFGS-B', bounds=bounds,
                                options={'maxiter': 2000, 'ftol': 1e-13, 'gtol': 1e-9}) for x in from_laws or grid),
             key=lambda result: result.fun)
  e, a, alpha, b, beta = best.x
  return Law(float(np.exp(e)), float(np.exp(a + alpha * np.log(units[0]))), float(alpha),
             float(np.exp(b + beta * np.log(units[1]))), float(beta))


def bootstrap(points: Points, law: Law, count: int = 200, seed: int = 0) -> list[Law]:
  """Returns laws that are fitted to values of the law with residuals drawn from its own: a bootstrap."""
  rng, (n, d, loss) = np.random.default_rng(seed), np.asarray(points, float).T
  residuals = np.log(loss) - np.log(law(n, d))
  residuals = residuals * np.sqrt(len(loss) / max(len(loss) - 5, 1))   # five numbers were fitted to them
  draws = rng.choice(residuals, (count, len(loss)))
  return [fit(np.stack([n, d, law(n, d) * np.exp(draw)], -1), starts=[law]) for draw in draws]


def predict(points: Points, law: Law, laws: Sequence[Law], n: float, d: float, confidence: float = 0.95, seed: int = 0
            ) -> tuple[float, float, float]:
  """Returns the loss at (n, d), and an interval for a run, from the spread of the laws and of the residuals."""
  rng, (ns, ds, loss) = np.random.default_rng(seed), np.asarray(points, float).T
  residuals = (np.log(loss) - np.log(law(ns, ds))) * np.sqrt(len(loss) / max(len(loss) - 5, 1))
  outcomes = [float(other(n, d)) * np.exp(rng.choice(residuals)) for other in laws for _ in range(10)]
  low, high = np.quantile(outcomes, [(1 - confidence) / 2, (1 + confidence) / 2])
  return float(law(n, d)), float(low), float(high)
