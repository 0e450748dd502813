"""The gradient noise scale: up to which batch size more tokens a step are worth about as many steps fewer."""
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.batch import Batch
from lm.objectives.objective import Objective

Gradient = Callable[[Any, Batch], tuple[Any, jax.Array]]   # the mean over a batch, and how many tokens that has


class NoiseScale(NamedTuple):
  """B_simple = tr(Sigma) / |G|^2 in tokens, targets that is, with a 95 % interval (McCandlish et al. 2018, appendix A).

  G is the gradient over all data, Sigma the covariance of a token's. Batches are what is drawn, so that it counts that
  tokens of a row are alike: Sigma is that of the mean of a batch, times its tokens.
  """
  tokens: float
  low: float
  high: float
  gradient: float   # |G|^2
  noise: float      # tr(Sigma)


def noise_scale(gradient: Gradient, params: Any, batches: Callable[[int], Batch], count: int,
                progress: Callable[[int], Any] = lambda done: None) -> NoiseScale:
  """From the gradients of batches 0 to count - 1, each computed twice: their mean is not known the first time.

  `batches(i)` is on the devices; `progress` is told how many of 2 `count` gradients are done. ValueError where G cannot
  be told from 0, or there are fewer than 3 batches.
  """
  if count < 3:
    raise ValueError(f'an interval needs 3 batches at least, not {count}')
  product = jax.jit(lambda a, b: sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))))
  add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
  squares, tokens, products, total = [], [], [], None
  for i in range(count):
    found, weight = gradient(params, batches(i))
    squares.append(float(product(found, found)))
    tokens.append(float(weight))
    total = found if total is None else add(total, found)
    progress(i + 1)
  for i in range(count):
    products.append(float(product(gradient(params, batches(i))[0], total)) / count)
    progress(count + i + 1)
  return estimate(squares, products, tokens)


def estimate(squares: Sequence[float], products: Sequence[float], tokens: Sequence[float]) -> NoiseScale:
  """From |g|^2, g times the mean of all g, and the tokens of each batch, whose gradient is g.

  E |g|^2 = |G|^2 + tr(Sigma) / tokens, and E |mean of n g|^2 = |G|^2 + tr(Sigma) / (n tokens), both unbiased. The
  interval is a jackknife's over batches, of the logarithm.
  """
  squares, products, per_token = np.float64(squares), np.float64(products), 1 / np.float64(tokens)
  n = len(squares)

  def solve(square, mean_square, per_token, n):
    noise = (square - mean_square) / (per_token * (1 - 1 / n))
    return mean_square - noise * per_token / n, noise

  def without(x):
    return (np.sum(x) - x) / (n - 1)

  gradient, noise = solve(np.mean(squares), np.mean(products), np.mean(per_token), n)
  # |mean of the others|^2 = |n mean - g|^2 / (n - 1)^2
  others = (n ** 2 * np.mean(products) - 2 * n * products + squares) / (n - 1) ** 2
  gradients, noises = solve(without(squares), others, without(per_token), n - 1)

  def error(x):
    return math.sqrt((n - 1) * np.var(x))

  if gradient < 2 * error(gradients) or np.min(gradients) <= 0:
    raise ValueError(f'the gradient cannot be told from 0: |G|^2 = {gradient:.2g}, give or take '
                     f'{2 * error(gradients):.2g}, of {n} batches of {1 / np.mean(per_token):,.0f} tokens; take more '
                     'of them, or larger ones')
  if noise <= 0 or np.min(noises) <= 0:
    raise ValueError(f'the gradients of the {n} batches do not differ: are they of the same text?')
  log, spread = math.log(noise / gradient), 1.96 * error(np.log(noises / gradients))
  return NoiseScale(*map(math.exp, (log, log - spread, log + spread)), float(gradient), float(noise))


def gradient_of(apply: Callable[..., Any], objective: Objective, constants: Mapping[str, Any]) -> Gradient:
  """The gradient of an objective, without dropout; `constants` are parameters that it is not of."""
  def loss(params, batch):
    loss_sum, weight_sum, _ = objective.loss(apply, {**params, **constants}, batch, None)
    return loss_sum, weight_sum

  @jax.jit
  def gradient(params, batch):
    grads, weight = jax.grad(loss, has_aux=True)(params, batch)
    return jax.tree.map(lambda g: g / weight, grads), weight

  return gradient
