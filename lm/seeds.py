"""Random numbers by seeds from 0 to 2 ** 63, which `jax.random.key` would cut to 32 bits."""
import jax
import jax.numpy as jnp
import numpy as np


def check(seed: int) -> None:
  """ValueError where a seed is out of range."""
  if not 0 <= seed < 2 ** 63:
    raise ValueError(f'seed={seed} is not a whole number from 0 to 2 ** 63 - 1; choose one that is')


def key(seed: int) -> jax.Array:
  """The key of a seed: that of `jax.random.key` below 2 ** 32, and that of JAX with 64-bit types from there on."""
  check(seed)
  low = jax.random.key(seed % 2 ** 32)
  if seed < 2 ** 32:
    return low
  pairs = jax.random.key_data(low).reshape(-1, 2)   # the high and the low word, once or twice
  high = jnp.array([[seed >> 32, 0]], jnp.uint32)
  return jax.random.wrap_key_data((pairs ^ high).reshape(-1), impl=jax.random.key_impl(low))


def generator(seed: int, *numbers: int) -> np.random.Generator:
  """NumPy's generator of a seed and of numbers below 2 ** 32, such as an epoch.

  The high word of the seed comes last, for NumPy pads with zeros: in the place of a number, it would stand for one.
  """
  check(seed)
  return np.random.default_rng([seed % 2 ** 32, *numbers, seed >> 32])
