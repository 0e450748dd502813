"""The gradient noise scale: the batch size up to which a larger batch saves about as many steps as it has more rows."""
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm.data.batch import Batch
from lm.objectives.objective import Objective

Gradient = Callable[[Any, Batch], tuple[Any, jax.Array]]   # the mean gradient of a batch, and its number of tokens


class NoiseScale(NamedTuple):
  """The simple noise scale tr(Sigma) / |G|^2 of McCandlish et al. 2018, appendix A, in tokens that are targets.

  G is the gradient over all data. Sigma is the covariance of the mean gradient of a batch, times the tokens of a batch,
  so that it includes the correlation of tokens in a row.

  Attributes:
    tokens: the noise scale.
    low: the lower end of its 95 % interval.
    high: the upper end.
    gradient: |G|^2.
    noise: tr(Sigma).
  """
  tokens: float
  low: float
  high: float
  gradient: float
  noise: float


def noise_scale(gradient: Gradient, params: Any, batches: Callable[[int], Batch], count: int,
                progress: Callable[[int], Any] = lambda count: None) -> NoiseScale:
  """Estimates the noise scale from the gradients of batches.

  Each gradient is computed twice, because their mean is not known the first time.

  Args:
    gradient: returns the mean gradient of a batch and its number of tokens.
    params: the parameters.
    batches: `batches(i)` returns a batch on the devices.
    count: the number of batches.
    progress: is called after each gradient with the number of gradients so far, of 2 * count.

  Raises:
    ValueError: there are fewer than 3 batches, or their gradients are too noisy or do not differ.
  """
  if count < 3:
    raise ValueError(f'an interval needs 3 batches at least, not {count}; take more')
  product = jax.jit(lambda a, b: sum(jnp.sum(x * y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b))))
  add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b), donate_argnums=0)
  squares, tokens, products, total = [], [], [], None
  for i in range(count):
    grads, weight = gradient(params, batches(i))
    squares.append(float(product(grads, grads)))
    tokens.append(float(weight))
    total = grads if total is None else add(total, grads)
    progress(i + 1)
  for i in range(count):
    products.append(float(product(gradient(params, batches(i))[0], total)) / count)
    progress(count + i + 1)
  return estimate(squares, products, tokens)


def estimate(squares: Sequence[float], products: Sequence[float], tokens: Sequence[float]) -> NoiseScale:
  """Estimates the noise scale from statistics of the gradients g of n batches.

  It solves E |g|^2 = |G|^2 + tr(Sigma) / tokens and E |mean of g|^2 = |G|^2 + tr(Sigma) / (n tokens), which makes both
  unbiased. The interval is that of a jackknife over batches for the logarithm.

  Args:
    squares: |g|^2 of each batch.
    products: the product of g and the mean of all g, of each batch.
    tokens: the number of tokens of each batch.

  Raises:
    ValueError: the gradients are too noisy, or do not differ.
  """
  squares, products, per_token = np.float64(squares), np.float64(products), 1 / np.float64(tokens)
  n = len(squares)

  def solve(square, mean_square, per_token, n):
    noise = (square - mean_square) / (per_token * (1 - 1 / n))
    return mean_square - noise * per_token / n, noise

  def leave_one_out(x):
    return (np.sum(x) - x) / (n - 1)

  gradient, noise = solve(np.mean(squares), np.mean(products), np.mean(per_token), n)
  # The squared norm of the mean without one batch is |n mean - g|^2 / (n - 1)^2.
  others = (n ** 2 * np.mean(products) - 2 * n * products + squares) / (n - 1) ** 2
  gradients, noises = solve(leave_one_out(squares), others, leave_one_out(per_token), n - 1)

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
  """Returns a function for the gradient of an objective, without dropout; `constants` are not differentiated."""
  def loss(params, batch):
    loss_sum, weight_sum, _ = objective.loss(apply, {**params, **constants}, batch, None)
    return loss_sum, weight_sum

  @jax.jit
  def gradient(params, batch):
    grads, weight = jax.grad(loss, has_aux=True)(params, batch)
    return jax.tree.map(lambda g: g / weight, grads), weight

  return gradient
