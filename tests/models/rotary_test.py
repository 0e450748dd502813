"""The rotary frequencies of stretched contexts are those of published models."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models.rotary import Linear, Llama3, LongRope, Rotary, Yarn

LLAMA = Rotary(5e5, scaling=Llama3(8., 1., 4., 8192))
GPT_OSS = Rotary(1.5e5, scaling=Yarn(32., 4096, 0.1 * np.log(32) + 1, truncate=False))


@pytest.mark.parametrize('rotary, size, expected, total', [
    # Values that transformers 5.23 computes for Llama 3.1 8B, gpt-oss 20B and Gemma 3 4B.
    (LLAMA, 128, {
        0: 1.0, 1: .8146172165870667, 20: .016560440883040428, 29: .0021665706299245358, 32: .0005248460220173001,
        35: 9.556212171446532e-05, 36: 7.784655463183299e-05, 40: 3.428102354519069e-05, 63: 3.068925877869333e-07},
     5.3860578536987305),
    (GPT_OSS, 64, {
        0: 1.0, 1: .6890442967414856, 8: .05081327259540558, 12: .006794959306716919, 16: .0004564839182421565,
        20: 1.818833698052913e-05, 31: 3.023511396804679e-07}, 3.180438280105591),
    (Rotary(1e6, scaling=Linear(8.)), 256, {0: .125}, None),
    (Rotary(1e6, scaling=Linear(8.)), 128, {1: .1007302775979042}, None)], ids=['llama3', 'yarn', 'linear', 'linear'])
def test_frequencies_of_published_models(rotary, size, expected, total):
  actual = rotary.frequencies(size)
  np.testing.assert_allclose(actual[list(expected)], list(expected.values()), rtol=1e-6)
  if total is not None:
    np.testing.assert_allclose(actual.sum(), total, rtol=1e-6)


def test_yarn_raises_attention():
  np.testing.assert_allclose(GPT_OSS.scaling.attention, 1.3465735902799727, rtol=1e-12)
  x = jnp.ones((1, 3, 1, 64))
  positions = jnp.arange(3)[None]
  np.testing.assert_allclose(jnp.linalg.norm(GPT_OSS(x, positions), axis=-1), 8 * 1.3465735902799727, rtol=1e-6)


def test_longrope_divides_by_other_factors_past_the_original_context():
  plain = Rotary(1e4)
  rotary = Rotary(1e4, scaling=LongRope((1.,) * 4, (2.,) * 4, 16, 1.))
  x = jax.random.normal(jax.random.key(0), (1, 20, 2, 8))
  positions = jnp.arange(20)[None]
  np.testing.assert_allclose(rotary(x[:, :16], positions[:, :16]), plain(x[:, :16], positions[:, :16]), atol=1e-6)
  np.testing.assert_allclose(rotary(x, positions), plain(x, positions / 2), atol=1e-6)


@pytest.mark.slow
def test_longrope_chooses_factors_for_each_text():
  """This covers packed texts, rows of a batch, padding, and tokens after those of a cache."""
  rotary = Rotary(1e4, scaling=LongRope((1.,) * 4, (2.,) * 4, 16, 1.1))
  x = jax.random.normal(jax.random.key(0), (3, 40, 2, 8))
  rows = [[20, 16, 4], [17, 3, 20], [5, 33, 2]]   # the last of each is padding
  positions = jnp.array([[i for n in row for i in range(n)] for row in rows])
  segments = jnp.array([[s % 3 for s, n in enumerate(row, 1) for _ in range(n)] for row in rows])
  together = rotary(x, positions, segments)
  for i, row in enumerate(rows):
    for n, end in zip(row, np.cumsum(row)):
      alone = rotary(x[i:i + 1, end - n:end], jnp.arange(n)[None])
      np.testing.assert_allclose(together[i:i + 1, end - n:end], alone, atol=1e-6)
  both = rotary(x[:2, :17], jnp.arange(17)[None] - jnp.array([[0], [1]]))
  for i in (0, 1):
    np.testing.assert_allclose(both[i:i + 1], rotary(x[i:i + 1, :17], jnp.arange(17)[None] - i), atol=1e-6)
  assert not np.allclose(both[1], rotary(x[1:2, :17], jnp.arange(17)[None])[0], atol=0.1)


@pytest.mark.parametrize('rotary', [Rotary(100.), Rotary(100., 4), Rotary(100., interleaved=True), LLAMA, GPT_OSS])
def test_products_depend_on_the_distance_alone(rotary):
  q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 64))
  def product(query_position, key_position):
    return jnp.vdot(rotary(q, jnp.array([[query_position]])), rotary(k, jnp.array([[key_position]])))
  np.testing.assert_allclose(product(7, 3), product(104, 100), rtol=1e-4)
  assert abs(product(7, 3) - product(7, 4)) > 1e-3


def test_longrope_in_float32_is_that_of_float64_but_for_the_rounding_of_angles():
  rotary = Rotary(1e4, scaling=LongRope((1.,) * 16, tuple(np.linspace(1.1, 30, 16)), 512, 1.19))
  x = np.random.default_rng(0).normal(size=(1, 768, 1, 32)).astype('f4')
  positions = np.arange(768)[None]
  angles = positions[..., None] / (1e4 ** (np.arange(16) / 16) * np.linspace(1.1, 30, 16))
  a, b = np.split(np.float64(x[:, :, 0]), 2, axis=-1)
  expected = 1.19 * np.concatenate([a * np.cos(angles) - b * np.sin(angles), b * np.cos(angles) + a * np.sin(angles)],
                                   -1)
  error = np.abs(np.asarray(rotary(x, jnp.asarray(positions)))[:, :, 0] - expected)
  # Float32 represents an angle of 700 to 2 ** -15, and small ones more exactly.
  assert error.max() < 3e-4 and error[:, :64].max() < 2e-5 and error[:, :, 8:16].max() < 2e-6
