"""How a token is drawn: temperature, and filters of logits."""
import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How a token is drawn. The filters apply in the order of vLLM: penalty, temperature, min_p, top_k, top_p.

  Args:
    temperature: divides the logits; 0 takes the most probable token (as below 1e-5; below 0.01 acts as 0.01).
    top_k: keeps the k most probable tokens, and ties of the last; 0 (or -1) keeps all.
    top_p: keeps the smallest set of tokens whose mass reaches p (Holtzman et al. 2020); 1 keeps all.
    min_p: keeps tokens of at least this share of the greatest probability (Nguyen et al. 2024); 0 keeps all.
    repetition_penalty: makes tokens of prompt and output less likely (Keskar et al. 2019); 1 does nothing.
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
    return self.temperature < 1e-5


# Filters: float32 logits [B, V] -> logits, at -inf where a token is ruled out.


def penalize(logits_BV: jax.Array, seen_BV: jax.Array, penalty: float) -> jax.Array:
  """Divides the positive logits of seen tokens by `penalty`, multiplies the negative ones by it."""
  return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def keep_min_p(logits_BV: jax.Array, share: float) -> jax.Array:
  """Rules out tokens less probable than `share` times the most probable one."""
  return jnp.where(logits_BV >= logits_BV.max(-1, keepdims=True) + math.log(share), logits_BV, -jnp.inf)


def keep_top_k(logits_BV: jax.Array, k: int) -> jax.Array:
  """Rules out tokens below the k-th greatest logit; its ties stay."""
  least = jax.lax.top_k(logits_BV, min(k, logits_BV.shape[-1]))[0][:, -1:]
  return jnp.where(logits_BV >= least, logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, mass: float) -> jax.Array:
  """Rules out the least probable tokens that together hold at most 1 - `mass`; of ties, the earlier ids first."""
  order = jnp.argsort(logits_BV, axis=-1)
  ascending = jax.nn.softmax(jnp.take_along_axis(logits_BV, order, -1))
  dropped = (jnp.cumsum(ascending, -1) <= 1 - mass).at[:, -1].set(False)
  return jnp.where(jnp.put_along_axis(dropped, order, dropped, axis=-1, inplace=False), -jnp.inf, logits_BV)


def process(logits_BV: jax.Array, sampling: Sampling, seen_BV: jax.Array | None = None) -> jax.Array:
  """The logits that tokens are drawn from. `seen_BV`: tokens of prompt and output, where there is a penalty."""
  logits = logits_BV.astype(jnp.float32)
  if sampling.repetition_penalty != 1:
    logits = penalize(logits, seen_BV, sampling.repetition_penalty)
  if sampling.greedy:   # the filters keep the most probable token
    return logits
  logits = logits / max(sampling.temperature, 0.01)
  if sampling.min_p > 0:
    logits = keep_min_p(logits, sampling.min_p)
  if sampling.top_k > 0:
    logits = keep_top_k(logits, sampling.top_k)
  if sampling.top_p < 1:
    logits = keep_top_p(logits, sampling.top_p)
  return logits
