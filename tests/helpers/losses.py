"""Inputs of losses, and comparisons of their values and gradients."""
import functools

import jax
import numpy as np

ROWS, TIME, WIDTH, VOCAB = 8, 8, 4, 64

# These programs run once or twice: optimising them would take longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})


def make_inputs():
  """Returns (hidden [B, T, D], head [V, D], targets [B, T], weights [B, T]); about 30 % of the weights are zero."""
  rng = np.random.default_rng(0)
  weights = rng.uniform(0.5, 2, (ROWS, TIME)) * (rng.uniform(size=(ROWS, TIME)) < 0.7)
  return (rng.normal(size=(ROWS, TIME, WIDTH)).astype('f4'), rng.normal(size=(VOCAB, WIDTH)).astype('f4'),
          rng.integers(0, VOCAB, (ROWS, TIME)).astype('i4'), weights.astype('f4'))


def assert_close(actual, expected, tolerance=1e-5):
  """Asserts that arrays agree within `tolerance` of the largest absolute expected value."""
  np.testing.assert_allclose(np.asarray(actual, 'f8'), expected, rtol=0, atol=tolerance * np.abs(expected).max())
