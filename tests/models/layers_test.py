"""Products with weights, norms and biases equal their formulas in every precision."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models import layers


@pytest.mark.parametrize('formula,shapes', [
    ('BTD,DF->BTF', ((2, 3, 5), (5, 7))), ('BTF,FD->BTD', ((2, 3, 7), (7, 5))), ('BTD,VD->BTV', ((2, 3, 5), (11, 5))),
    ('BTD,DNH->BTNH', ((2, 3, 5), (5, 2, 4))), ('VD,BTD->VBT', ((11, 5), (2, 1, 5)))])
@pytest.mark.parametrize('dtype,tolerance', [(jnp.float32, 1e-5), (jnp.bfloat16, 0.02)])
def test_a_product_and_its_gradients_are_those_of_the_formula(formula, shapes, dtype, tolerance):
  rng = np.random.default_rng(0)
  x, w = (jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)
  y, pull = jax.vjp(lambda x, w: layers.einsum(formula, x, w), x, w)
  assert y.dtype == dtype
  dy = jnp.asarray(rng.normal(size=y.shape), dtype)
  exact = jax.vjp(lambda x, w: jnp.einsum(formula, x, w), *(a.astype(jnp.float32) for a in (x, w)))
  for actual, expected in zip((y, *pull(dy)), (exact[0], *exact[1](dy.astype(jnp.float32)))):
    assert actual.dtype == dtype
    np.testing.assert_allclose(actual.astype(jnp.float32), expected, tolerance, tolerance)


def test_sums_of_half_precision_products_are_float32():
  """One plus 4,096 times 1/4096: added in bfloat16, the small terms would be lost."""
  x, w = jnp.ones((1, 1, 4097), jnp.bfloat16).at[0, 0, 1:].set(1 / 4096), jnp.ones((4097, 1), jnp.bfloat16)
  assert layers.einsum('BTD,DF->BTF', x, w) == 2
  small = layers.einsum('BTD,DF->BTF', x, w, jnp.float32)
  assert small.dtype == jnp.float32


def test_a_bias_in_half_precision_gets_the_sum_of_all_positions():
  class Biased(layers.nn.Module):
    @layers.nn.compact
    def __call__(self, y):
      return layers.add_bias(self, 'bias', 'F', y)

  y = jnp.full((8, 1024, 4), 1 / 64, jnp.bfloat16)
  params = Biased().init(jax.random.key(0), y)
  grads = jax.grad(lambda p: jnp.sum(Biased().apply(p, y).astype(jnp.float32)))(params)
  assert (grads['params']['bias'] == 8 * 1024).all()


@pytest.mark.parametrize('offset', [0., 0.5, 1.])
def test_a_norm_starts_as_the_plain_one_whatever_is_added_to_its_scale(offset):
  norm, x = layers.RMSNorm(offset=offset), np.float32([[3., -1., 2.], [10., 0., 5.]])
  y, _ = norm.init_with_output(jax.random.key(0), x)
  np.testing.assert_allclose(y, x / np.sqrt((x ** 2).mean(-1, keepdims=True)), rtol=1e-5)


X = np.random.default_rng(0).normal(1, 3, (2, 5, 96)).astype('f4')
PARTS = {
    'RMSNorm': (layers.RMSNorm(1e-6), lambda x: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6)),
    'LayerNorm': (layers.LayerNorm(1e-6), lambda x: (x - x.mean(-1, keepdims=True)) / np.sqrt(
        x.var(-1, keepdims=True) + 1e-6)),
    'gate': (lambda x: layers.silu_gated(x, x[::-1]), lambda x: x / (1 + np.exp(-x)) * x[::-1])}


@pytest.mark.parametrize('name', PARTS)
def test_a_part_in_float32_is_that_of_float64_but_for_rounding(name):
  """Errors of a part are magnified by the layers after it."""
  part, formula = PARTS[name]
  y = part.init_with_output(jax.random.key(0), X)[0] if isinstance(part, layers.nn.Module) else part(X)
  assert y.dtype == jnp.float32
  np.testing.assert_allclose(y, formula(np.float64(X)), rtol=1e-6, atol=1e-6)
