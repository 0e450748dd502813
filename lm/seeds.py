"""Random keys and generators from seeds of 63 bits; `jax.random.key` alone would cut a seed to 32 bits."""
import zlib

import jax
import jax.numpy as jnp
import numpy as np


def check(seed: int) -> None:
  """Raises ValueError where a seed is out of range."""
  if not 0 <= seed < 2 ** 63:
    raise ValueError(f'seed={seed} is not a whole number from 0 to 2 ** 63 - 1; choose one that is')


def key(seed: int) -> jax.Array:
  """Returns the random key of a seed.

  It is the key that `jax.random.key` gives for seeds below 2 ** 32, and with 64-bit types for larger ones.
  """
  check(seed)
  low = jax.random.key(seed % 2 ** 32)
  if seed < 2 ** 32:
    return low
  pairs = jax.random.key_data(low).reshape(-1, 2)   # the high and the low word; twice for some implementations
  high = jnp.array([[seed >> 32, 0]], jnp.uint32)
  return jax.random.wrap_key_data((pairs ^ high).reshape(-1), impl=jax.random.key_impl(low))


def generator(seed: int, *numbers: int) -> np.random.Generator:
  """Returns NumPy's generator for a seed and for numbers below 2 ** 32, such as an epoch."""
  check(seed)
  # NumPy pads the list with zeros, so the high word is last: seeds below 2 ** 32 are as if it were not there.
  return np.random.default_rng([seed % 2 ** 32, *numbers, seed >> 32])


def derive(seed: int, name: str) -> int:
  """Returns a seed below 2 ** 32 for what has a name of its own, such as an answer among many."""
  check(seed)
  return zlib.crc32(f'{seed} {name}'.encode())
