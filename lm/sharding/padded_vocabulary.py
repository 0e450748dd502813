"""A vocabulary V whose size its mesh axes do not divide.

At rest, in checkpoints and in exported files, a weight [V, D] has its true shape (see `axes.stored_spec`). For use,
rows of zeros are added to it, and its parts are exchanged such that V is split as the table says; its gradient goes
back the same way. A head hides the logits of the rows that were added: these are so low that no softmax, maximum or
sampler sees them.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from lm.sharding.axes import constrain, is_laid_out, parts

_HIDDEN = -1e30   # not -inf, since differences of two logits would not be numbers


def padded(weight: jax.Array, axes: str) -> jax.Array:
  """Returns a weight with rows of zeros such that the mesh axes of V divide V; the weight itself where they do."""
  if not is_laid_out() or 'V' not in axes or weight.shape[axes.index('V')] % parts('V') == 0:
    return weight
  added = [(0, -size % parts('V') if letter == 'V' else 0) for letter, size in zip(axes, weight.shape)]
  return constrain(jnp.pad(weight, added), axes)


def hide_padding(logits_BTV: jax.Array, vocab: int) -> jax.Array:
  """Returns logits of which only the first `vocab` can be seen by a softmax, a maximum or a sampler."""
  if logits_BTV.shape[-1] == vocab:
    return logits_BTV
  return jnp.where(jnp.arange(logits_BTV.shape[-1])[None, None] < vocab, logits_BTV, _HIDDEN)


def mean_over_vocabulary(logits_BTV: jax.Array) -> jax.Array:
  """Returns the mean of the logits of each position, [B, T], without those of the padding."""
  if parts('V') == 1:
    return jnp.mean(logits_BTV, axis=-1)
  is_seen = logits_BTV > _HIDDEN / 2
  return jnp.sum(jnp.where(is_seen, logits_BTV, 0), axis=-1) / jnp.sum(is_seen, axis=-1)


def vocabulary_of(head: Callable[[jax.Array], jax.Array], hidden_BTD: jax.Array) -> int | None:
  """Returns the number of logits of a head without those of the padding; None if its results are not [B, T, V].

  A head that hides padding says by an attribute `vocab` how many logits it has.
  """
  shape = jax.eval_shape(head, hidden_BTD).shape
  if len(shape) < 3:
    return None
  return getattr(head, 'vocab', None) or shape[-1]


def whole_logits(head: Callable[[jax.Array], jax.Array], hidden_BTD: jax.Array) -> jax.Array:
  """Returns the logits [B, T, V] without those of the padding; each device has the whole V of its own rows."""
  return constrain(head(hidden_BTD), 'B--')[..., :getattr(head, 'vocab', None)]
