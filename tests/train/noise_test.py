"""The noise scale equals closed forms: for a linear model with known noise, and for draws from a known distribution."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.data.batch import Batch
from lm.train import noise_scale

D, SIGMA, N, TOKENS = 5, 2., 40, 64


def draws(rng, mean, spread, n, tokens):
  """Returns statistics of n gradients, each the mean over tokens whose gradients are normal with known covariance."""
  g = mean + rng.normal(size=(n, len(mean))) * spread / np.sqrt(tokens)[:, None]
  return np.sum(g * g, axis=1), g @ g.mean(axis=0), tokens


def test_estimates_are_unbiased_and_the_interval_covers_what_is_true():
  rng, mean, spread = np.random.default_rng(0), np.full(50, 0.3), np.linspace(0.5, 2, 50)
  tokens = rng.integers(20, 60, N).astype(float)   # batches need not be equal
  true = np.sum(spread ** 2) / np.sum(mean ** 2)
  estimates = [noise_scale.estimate(*draws(rng, mean, spread, N, tokens)) for _ in range(400)]
  scales, lows, highs, gradients, noises = np.array(estimates).T
  for values, exact in ((gradients, np.sum(mean ** 2)), (noises, np.sum(spread ** 2))):
    assert abs(np.mean(values) - exact) < 4 * np.std(values) / 20
    assert np.std(values) / 20 < 0.02 * exact   # checks that the assertion above is sharp
  covered = np.mean((lows < true) & (true < highs))
  assert 0.88 < covered < 0.99 and np.median(scales) == pytest.approx(true, rel=0.05)


def test_a_linear_model_has_the_noise_scale_of_its_closed_form():
  """y = x w* + e, x normal: at w, with d = w - w*, G = d and tr(Sigma) = (D + 1) |d|^2 + D sigma^2."""
  rng, d = np.random.default_rng(1), np.linspace(0.5, 1.5, D).astype('f4')
  data = [(rng.normal(size=(TOKENS, D)), SIGMA * rng.normal(size=TOKENS)) for _ in range(400)]

  @jax.jit
  def gradient(params, batch):
    x, e = batch
    loss = lambda p: jnp.mean((x @ jnp.concatenate([p['a'], p['b']]) - e) ** 2) / 2   # w* = 0
    return jax.grad(loss)(params), jnp.float32(len(e))

  progress = []
  read = lambda i: jax.tree.map(jnp.float32, data[i])
  estimate = noise_scale.noise_scale(gradient, {'a': d[:2], 'b': d[2:]}, read, 400, progress.append)
  size = np.sum(d ** 2)
  exact = (D + 1) * size + D * SIGMA ** 2
  # The variance of a token's gradient along G is 2 |d|^2 + sigma^2.
  error = 2 * np.sqrt(size * (2 * size + SIGMA ** 2) / (400 * TOKENS))
  assert abs(estimate.gradient - size) < 4 * error and estimate.noise == pytest.approx(exact, rel=0.1)
  assert estimate.low < exact / size < estimate.high < 1.3 * estimate.low
  assert progress == list(range(1, 801))


def test_the_gradient_is_of_the_mean_loss_without_constants():
  class Objective:
    @staticmethod
    def loss(apply, params, batch, key):
      assert key is None
      weight = jnp.sum(batch.weights)
      return jnp.sum(batch.weights) * params['w'] ** 2 * params['teacher'], weight, {}

  gradient = noise_scale.gradient_of(None, Objective, {'teacher': jnp.float32(3)})
  grads, weight = gradient({'w': jnp.float32(2)}, Batch(None, weights=np.ones((2, 4), 'f4')))
  assert grads == {'w': 12.} and weight == 8


@pytest.mark.parametrize('mean, spread, message', [
    (0., 1., r'the gradient cannot be told from 0: .* of 40 batches of 64 tokens; take more'),
    (1., 0., 'do not differ')])
def test_an_unknown_noise_scale_is_refused(mean, spread, message):
  with pytest.raises(ValueError, match=message):
    noise_scale.estimate(*draws(np.random.default_rng(0), np.full(50, mean), np.full(50, spread), N, np.full(N, 64.)))
  with pytest.raises(ValueError, match='3 batches at least, not 2'):
    noise_scale.noise_scale(None, None, None, 2)
