"""Parts of a token loss: `token_loss(nll, smoothing(0.1), z_loss(1e-4))` is what objectives take as `token_loss`."""
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lm import sharding
from lm.objectives.objective import TokenLoss, cross_entropy


class TokenScores(NamedTuple):
  """Logits minus the highest of their position, the same of the target, and log sum exp of all: what terms read.

  On a mesh, V may be padded with logits of about -1e30; a mean over V leaves them out, see `smoothing`.
  """
  logits_BTV: jax.Array
  target_BT: jax.Array
  log_z_BT: jax.Array
  highest_BT: jax.Array   # not differentiated: no term depends on it


Part = Callable[[TokenScores], jax.Array]   # a term of the loss of each position, [B, T]


def nll(scores: TokenScores) -> jax.Array:
  """-log p(target) = log sum_v exp(z_v) - z_target."""
  return scores.log_z_BT - scores.target_BT


def smoothing(epsilon: float) -> Part:
  """With `nll`, the cross-entropy with targets (1 - epsilon) one_hot + epsilon / V (Szegedy et al. 2016).

  It adds epsilon (z_target - mean_v z_v).
  """
  if not 0 <= epsilon < 1:
    raise ValueError(f'label smoothing by {epsilon}: it must be at least 0 and less than 1')
  return lambda scores: epsilon * (scores.target_BT - sharding.mean_over_vocabulary(scores.logits_BTV))


def z_loss(coefficient: float) -> Part:
  """coefficient * (log sum_v exp(z_v))^2, which keeps logits from drifting (PaLM, arXiv:2204.02311, section 5)."""
  if not 0 <= coefficient < math.inf:
    raise ValueError(f'a z-loss of {coefficient} must be at least 0, and finite')
  return lambda scores: coefficient * jnp.square(scores.log_z_BT + scores.highest_BT)


def token_loss(*parts: Part) -> TokenLoss:
  """Returns the weighted sum of terms; its metrics are those of `cross_entropy`, whatever the terms are."""
  def loss(logits_BTV, targets_BT, weights_BT):
    highest = jax.lax.stop_gradient(jnp.max(logits_BTV, axis=-1))
    shifted = logits_BTV - highest[..., None]
    picked = jnp.arange(logits_BTV.shape[-1])[None, None, :] == targets_BT[..., None]
    scores = TokenScores(shifted, jnp.sum(jnp.where(picked, shifted, 0), axis=-1),
                    jnp.log(jnp.sum(jnp.exp(shifted), axis=-1)), highest)
    _, sums = cross_entropy(logits_BTV, targets_BT, weights_BT)   # XLA computes what both have in common once
    return jnp.sum(sum(part(scores) for part in parts) * weights_BT), sums
  return loss
