"""Products of groups of rows with matrices of their own are those of a loop over the groups."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import sharding
from lm.models import grouped

# These programs are run once or twice: optimising them takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})


def assert_close(actual, expected, tolerance=2e-5):
  """Asserts that arrays agree within `tolerance` of the largest absolute expected value."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * (np.abs(expected).max() + 1e-3))


@pytest.mark.parametrize('sizes', [[0, 300, 0, 0], [1, 0, 250, 9], [100, 90, 80, 30], [0, 0, 0, 0]],
                         ids=['all_one', 'unequal', 'near', 'none'])
@pytest.mark.parametrize('platform', ['cpu', 'tpu'])
def test_products_of_groups_equal_the_loop_over_groups(sizes, platform, monkeypatch):
  """The product uses blocks of rows on CPU and `ragged_dot` elsewhere. Rows of no group are undefined."""
  monkeypatch.setattr(sharding, 'platform', lambda: platform)
  rng = np.random.default_rng(3)
  rows, total = 310, sum(sizes)
  x, w, dy = (rng.normal(size=s).astype('f4') for s in ((rows, 5), (4, 5, 7), (rows, 7)))
  dy[total:] = 0

  def and_grads(x, w, sizes):
    y, back = jax.vjp(lambda x, w: grouped.product(jnp.float32, x, w, sizes), x, w)
    return y[:total], *back(dy)

  y, dx, dw = jit(and_grads)(x, w, np.array(sizes, 'i4'))
  group = np.repeat(np.arange(4), sizes)
  assert_close(y, np.einsum('rd,rdf->rf', x[:total], w[group])) if total else None
  assert_close(dx[:total], np.einsum('rf,rdf->rd', dy[:total], w[group])) if total else None
  assert_close(dw, [x[:total][group == e].T.astype('f8') @ dy[:total][group == e] for e in range(4)])
