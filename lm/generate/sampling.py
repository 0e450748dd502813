"""Sampling of tokens: the temperature, a repetition penalty, and filters of logits."""
import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import seeds

GREEDY = 1e-5   # below this temperature, the most probable token is taken


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn. As in vLLM, the order is: penalty, temperature, min_p, top_k, top_p.

  Args:
    temperature: divides the logits. At 0, and below 1e-5, the most probable token is taken; other temperatures below
      0.01 count as 0.01.
    top_k: keeps the k most probable tokens, and those as probable as the last of them; 0 (or -1) keeps all.
    top_p: keeps the smallest set of tokens whose probabilities sum to at least p (Holtzman et al. 2020); 1 keeps all.
    min_p: keeps tokens of at least this share of the greatest probability (Nguyen et al. 2024); 0 keeps all.
    repetition_penalty: lowers the probability of tokens of the prompt and the output (Keskar et al. 2019); 1 does
      nothing.
  """
  temperature: float = 1.
  top_k: int = 0
  top_p: float = 1.
  min_p: float = 0.
  repetition_penalty: float = 1.

  def __post_init__(self):
    for name, valid, allowed in (
        ('temperature', 0 <= self.temperature < math.inf, '0 (greedy) or more'),
        ('top_k', self.top_k >= -1 and self.top_k % 1 == 0, 'a whole number, 0 (off) or more'),
        ('top_p', 0 < self.top_p <= 1, 'more than 0 and at most 1 (off)'),
        ('min_p', 0 <= self.min_p <= 1, 'between 0 (off) and 1'),
        ('repetition_penalty', 0 < self.repetition_penalty < math.inf, 'more than 0; 1 is off')):
      if not valid:
        raise ValueError(f'{name}={getattr(self, name)} must be {allowed}')

  @property
  def greedy(self) -> bool:
    return self.temperature < GREEDY


class Settings(NamedTuple):
  """The sampling of each row, as arrays `[B]`, so that rows with other settings need no new compilation.

  `key` has the data of a random key for each row, `[B, 2]`, so that its draws do not depend on the other rows.
  """
  temperature: jax.Array
  top_k: jax.Array
  top_p: jax.Array
  min_p: jax.Array
  repetition_penalty: jax.Array
  key: jax.Array

  @property
  def greedy(self) -> jax.Array:
    return self.temperature < GREEDY


def settings(samplings: Sequence[Sampling], seeds_B: Sequence[int], streams_B: np.ndarray) -> Settings:
  """Returns the settings of rows, in NumPy. Row b draws from the random stream `streams_B[b]`, uint32, of its seed."""
  dtypes = {'temperature': np.float32, 'top_k': np.int32, 'top_p': np.float32, 'min_p': np.float32,
            'repetition_penalty': np.float32}
  values = [np.array([getattr(sampling, name) for sampling in samplings], dtype) for name, dtype in dtypes.items()]
  keys = {seed: seeds.key(seed) for seed in set(seeds_B)}
  streams = jnp.asarray(streams_B, jnp.uint32)
  key = jax.vmap(jax.random.fold_in)(jnp.stack([keys[seed] for seed in seeds_B]), streams)
  return Settings(*values, np.asarray(jax.random.key_data(key)))


def row_keys(settings: Settings, *numbers: jax.Array | int) -> jax.Array:
  """Returns the key of each row, `[B]`, after `fold_in` of each of the numbers, `[B]` or one for all rows."""
  keys = jax.random.wrap_key_data(settings.key)
  for number in numbers:
    keys = jax.vmap(jax.random.fold_in)(keys, jnp.broadcast_to(number, keys.shape))
  return keys


# The functions below map float32 logits [B, V] to logits; those of excluded tokens become -inf. Their argument is one
# number, or an array [B] with one for each row.


def _column(value: jax.Array | float) -> jax.Array:
  return jnp.reshape(jnp.asarray(value), (-1, 1))


def penalize(logits_BV: jax.Array, present_BV: jax.Array, penalty: jax.Array | float) -> jax.Array:
  """Divides the positive logits of the tokens in `present_BV` by `penalty`, and multiplies the negative ones by it."""
  penalty = _column(penalty)
  penalized = jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty)
  return jnp.where(present_BV, penalized, logits_BV)


def keep_min_p(logits_BV: jax.Array, share: jax.Array | float) -> jax.Array:
  """Excludes tokens less probable than `share` times the most probable one; 0 excludes none."""
  return jnp.where(logits_BV >= logits_BV.max(-1, keepdims=True) + jnp.log(_column(share)), logits_BV, -jnp.inf)


def keep_top_k(logits_BV: jax.Array, k: jax.Array | int) -> jax.Array:
  """Excludes tokens below the k-th greatest logit, and keeps those equal to it; 0 or less excludes none."""
  size, k = logits_BV.shape[-1], _column(k)
  least = kth_greatest(logits_BV, jnp.broadcast_to(jnp.clip(k, 1, size), (len(logits_BV), 1)))
  return jnp.where((k < 1) | (logits_BV >= least), logits_BV, -jnp.inf)


def kth_greatest(values_BV: jax.Array, k_B1: jax.Array) -> jax.Array:
  """The k-th greatest of the float32 values of each row, [B, 1]; `k_B1` is at least 1 and at most V.

  It is found bit by bit, from the highest: a bit is set if k values are no less with it. That takes 32 counts over the
  row, in place of sorting it, and k need not be static. No value is NaN.
  """
  bits = jax.lax.bitcast_convert_type(values_BV, jnp.uint32)
  sign = jnp.uint32(1 << 31)
  ordered = jnp.where(bits >= sign, ~bits, bits | sign)   # integers in the order of the values

  def set_bit(i, kth):
    candidate = kth | (sign >> i.astype(jnp.uint32))
    enough = jnp.sum(ordered >= candidate, axis=-1, keepdims=True) >= k_B1
    return jnp.where(enough, candidate, kth)

  kth = jax.lax.fori_loop(0, 32, set_bit, jnp.zeros_like(ordered[:, :1]))
  return jax.lax.bitcast_convert_type(jnp.where(kth >= sign, kth ^ sign, ~kth), jnp.float32)


def keep_top_p(logits_BV: jax.Array, mass: jax.Array | float) -> jax.Array:
  """Excludes the least probable tokens whose probabilities sum to at most 1 - `mass`; 1 excludes none.

  Of equally probable tokens, those with lower ids are excluded first.
  """
  mass = _column(mass)
  order = jnp.argsort(logits_BV, axis=-1)
  ascending = jax.nn.softmax(jnp.take_along_axis(logits_BV, order, -1))
  dropped = (jnp.cumsum(ascending, -1) <= 1 - mass).at[:, -1].set(False) & (mass < 1)
  return jnp.where(jnp.put_along_axis(dropped, order, dropped, axis=-1, inplace=False), -jnp.inf, logits_BV)


def process(logits_BV: jax.Array, sampling: Sampling | Settings, present_BV: jax.Array | None = None) -> jax.Array:
  """Returns the logits that tokens are drawn from.

  `present_BV` says which tokens occur in the prompt or the output; without it there is no penalty. The logits of greedy
  rows are penalised but not filtered, because no filter removes the most probable token. A filter that no row uses
  costs nothing.
  """
  def apply_if(used, function, logits, *args):
    return jax.lax.cond(jnp.any(used), function, lambda logits, *_: logits, logits, *args)

  logits = logits_BV.astype(jnp.float32)
  if present_BV is not None:
    penalty = jnp.asarray(sampling.repetition_penalty)
    logits = apply_if(penalty != 1, penalize, logits, present_BV, penalty)
  is_drawn = ~jnp.asarray(sampling.greedy)
  min_p, top_k, top_p = (jnp.asarray(x) for x in (sampling.min_p, sampling.top_k, sampling.top_p))
  filtered = logits / _column(jnp.maximum(jnp.asarray(sampling.temperature), 0.01))
  filtered = apply_if(is_drawn & (min_p > 0), keep_min_p, filtered, min_p)
  filtered = apply_if(is_drawn & (top_k > 0), keep_top_k, filtered, top_k)
  filtered = apply_if(is_drawn & (top_p < 1), keep_top_p, filtered, top_p)
  return jnp.where(_column(is_drawn), filtered, logits)


def draw(logits_BV: jax.Array, settings: Settings, keys_B: jax.Array) -> jax.Array:
  """Draws a token of each row from processed logits; takes the most probable one if the row is greedy."""
  best = jnp.argmax(logits_BV, axis=-1)

  def draw_some():
    return jnp.where(settings.greedy, best, jax.vmap(jax.random.categorical)(keys_B, logits_BV))

  return jax.lax.cond(settings.greedy.all(), lambda: best, draw_some)
