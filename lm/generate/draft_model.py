"""Drafts by another, smaller model that has the same tokens. See `drafted_steps`.

It has a cache of its own, with a row for each row of the engine, and draws with the settings and the random numbers of
the engine's rows. Shapes: the legend in `models/transformer.py`; D are the drafted tokens.
"""
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.generate.drafted_steps import Drafter, check_cache
from lm.generate.engine import Engine, State, longest_text
from lm.generate.slots import Slots


@functools.partial(jax.jit, static_argnames=('model', 'vocab', 'ends', 'drafts'), donate_argnames='cache')
@sharding.whole_rows()
def _draft(model, params, cache, state: State, *, vocab, ends, drafts) -> tuple[Any, jax.Array]:
  """Draws tokens after those of the rows of `state`, whose own cache is None. Returns the cache and the tokens."""
  state = state._replace(cache=cache._replace(index=state.position_B))   # without drafts that were not accepted
  # Drawing one token more makes the model read the last draft too, which its cache needs if that is accepted.
  state, tokens = Engine(model, params, 0, vocab, ends).step(state, drafts + 1)
  return state.cache, tokens.ids_BT[:, :drafts]


@functools.partial(jax.jit, static_argnames='model', donate_argnames='cache')
def _insert(model, cache, new, row) -> Any:
  """Replaces a row of a cache by the first row of another."""
  places = jnp.where(jnp.arange(len(new.index)) == 0, row, len(cache.index))
  return model.insert(cache, new, places)


class DraftModel(Drafter):
  """Drafts by a model, for any decoder whose cache can forget tokens.

  Args:
    engine: of the model that drafts; its slots are as many as the longest text has tokens, or more.
    drafts: the number of tokens that are drafted at a time.
  """

  def __init__(self, engine: Engine, drafts: int):
    super().__init__(drafts)
    self.engine = engine

  def prepare(self, engine: Engine, rows: int, widths: Sequence[int], length: int) -> None:
    super().prepare(engine, rows, widths, length)
    own, model = self.engine, self.engine.model
    check_cache(model)
    if (own.vocab, model.vocab) != (engine.vocab, engine.model.vocab):
      raise ValueError(f'the model that drafts has {own.vocab} tokens, padded to {model.vocab}, and the model that it '
                       f'drafts for has {engine.vocab}, padded to {engine.model.vocab}; give one with the same tokens')
    longest = min(own.slots, longest_text(model))
    if longest < length:
      raise ValueError(f'the model that drafts reads {longest} tokens at once, and the texts may have '
                       f'{length}; give shorter texts, or another model')
    self._slots = Slots(dataclasses.replace(own, slots=own.slots + self.drafts + 1), rows, widths)
    self._cache = self._slots.empty().cache
    self._prompt = None, None   # the last one that was read, and its cache

  def join(self, ids: np.ndarray, row: int) -> None:
    if ids is not self._prompt[0]:   # other choices of the same request follow
      cache, count = self._slots.empty_cache(), 0
      while count < len(ids):
        width = self._slots.width(len(ids) - count)
        cache = self._slots.read(cache, ids, count, False)[0].cache
        count += width
      self._prompt = ids, cache
    self._cache = _insert(self.engine.model, self._cache, self._prompt[1], np.int32(row))

  def draft(self, state: State, texts: Sequence[np.ndarray | None]) -> jax.Array:
    own = self.engine
    self._cache, drafts = _draft(own.model, own.params, self._cache, state._replace(cache=None), vocab=own.vocab,
                                 ends=tuple(own.ends), drafts=self.drafts)
    return drafts
