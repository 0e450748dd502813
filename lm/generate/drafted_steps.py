"""Speculative decoding with the state of an engine: a few tokens are drafted, and one pass of the model reads them all.

  drafter = PromptLookup(4)                                     # or DraftModel(engine_of_a_small_model, 4)
  scheduler = Scheduler(engine, drafter=drafter)
  generate.generate(model, params, tokenizer, prompts, draft=drafter)
  print(drafter.acceptance, drafter.tokens_per_pass)

Each row draws its next token as without drafts: with its own settings and its own random number for that place, from
the logits after its last token. Where that token is the drafted one, the pass has already given the logits after it,
and the next token is drawn too. So a draft that is wrong costs nothing but time, and the text is, for any drafter, that
of the engine alone, except where sums of another shape are rounded differently (drafter-invariant speculative decoding,
Daliri et al. 2024, arXiv:2408.07978). A drafter that draws with the same random numbers is right more often than one
that draws with others.

A row's entries for wrong drafts lie behind its index in the cache, where no query sees them, until the next tokens
overwrite them. They are never in pages that rows share, which have tokens of prompts alone.

Shapes: the legend in `models/transformer.py`; D are the drafted tokens.
"""
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.generate.engine import (
    CHUNK,
    Engine,
    State,
    Tokens,
    add_token,
    empty_columns,
    put_column,
    replicate,
    split_rows,
)
from lm.models.attention import LayerCache
from lm.models.latent import LatentCache
from lm.models.low_rank_weight import choose_adapters
from lm.models.transformer import Cache

MOST = CHUNK - 1   # the largest number of tokens that are drafted at a time
NO_DRAFT = -1   # in the place of a drafted token, where a row has fewer


class DraftCounter:
  """Counts the passes of the model over rows that had not ended, and the drafts that were proposed and accepted."""

  def __init__(self):
    self.clear()

  def clear(self) -> None:
    """Counts from 0 again."""
    self.passes = self.proposed = self.accepted = 0

  @property
  def acceptance(self) -> float:
    """The share of the drafts that were accepted."""
    return self.accepted / max(self.proposed, 1)

  @property
  def tokens_per_pass(self) -> float:
    """The mean number of tokens that a pass gave a row that had not ended."""
    return 1 + self.accepted / max(self.passes, 1)


class Drafter(DraftCounter):
  """Drafts up to `drafts` tokens for each row; see `draft`. One object serves one scheduler."""

  def __init__(self, drafts: int):
    """Raises ValueError for no drafts, or too many for one pass."""
    if not 1 <= drafts <= MOST:
      raise ValueError(f'drafts={drafts} must be from 1 to {MOST}')
    super().__init__()
    self.drafts = drafts

  def prepare(self, engine: Engine, rows: int, widths: Sequence[int], length: int) -> None:
    """Prepares for rows of an engine: texts of up to `length` tokens, whose prompts are read in chunks of `widths`.

    Raises ValueError where this drafter cannot draft for the engine.
    """
    del rows, widths, length
    check_cache(engine.model)

  def join(self, ids: np.ndarray, row: int) -> None:
    """Is called with the ids of each prompt that joins a row."""

  def draft(self, state: State, texts: Sequence[np.ndarray | None]) -> np.ndarray | jax.Array:
    """Returns tokens after those of each row, int32 [B, D], with NO_DRAFT where a row has fewer.

    `texts` are the prompts and what has been written, None for rows that need no drafts.
    """
    raise NotImplementedError

  def step(self, engine: Engine, state: State, texts: Sequence[np.ndarray | None], allowed: np.ndarray | None = None
           ) -> tuple[State, Tokens]:
    """Draws 1 to D + 1 tokens of each row that has not ended, in one pass. It donates `state`.

    A row whose text in `texts` is None has no drafts, and gets one token. `allowed` are the tokens that may be drawn
    next, as in `Engine.step`; rows with such a restriction must have None in `texts`.
    """
    drafts = self.draft(state, texts)
    drafts = np.where([[text is not None] for text in texts], np.asarray(drafts), NO_DRAFT)
    state, tokens = _draw(engine.model, engine.params, state, np.int32(drafts), engine.allowed(len(texts), allowed),
                          np.int32(engine.ends), vocab=engine.vocab)
    counts = np.asarray(tokens.count_B)
    self.passes += int(np.sum(counts > 0))
    self.accepted += int(np.sum(np.maximum(counts - 1, 0)))
    self.proposed += int(np.sum((drafts != NO_DRAFT)[counts > 0]))
    return state, tokens


@sharding.whole_rows()
def check_cache(model: Any) -> None:
  """Raises ValueError for a model whose cache cannot forget drafts that were not accepted."""
  cache = None if model.reads_source else jax.eval_shape(lambda: model.init_cache(sharding.padded_rows(1), 1))
  if not isinstance(cache, Cache) or not all(isinstance(layer, (LayerCache, LatentCache)) for layer in cache.layers):
    raise ValueError('drafts are for decoders whose caches have keys and values for each token, so that wrong drafts '
                     f'can be forgotten, and {type(model).__name__} has another cache; leave them out')


@functools.partial(jax.jit, static_argnames=('model', 'vocab'), donate_argnames='state')
@sharding.whole_rows()
def _draw(model, params, state: State, drafts_BD, allowed, ends, *, vocab) -> tuple[State, Tokens]:
  """Reads the last token of each row and its drafts, and draws tokens until they differ from the drafts."""
  drafts_BD, allowed = split_rows((drafts_BD, allowed))
  index, written, width = state.cache.index, state.history.written_B, drafts_BD.shape[1] + 1
  tokens = jnp.concatenate([state.token_B[:, None], jnp.maximum(drafts_BD, 0)], axis=1)
  drafts = jnp.pad(drafts_BD, ((0, 0), (0, 1)), constant_values=NO_DRAFT)
  # No position is beyond the last one that the row can reach, because models have tables of positions.
  steps = jnp.minimum(jnp.arange(width)[None], jnp.maximum(state.limit_B - written - 1, 0)[:, None])
  segments = jnp.broadcast_to(~state.ended_B[:, None], tokens.shape).astype(jnp.int32)
  batch = Batch(tokens, positions=state.position_B[:, None] + steps, segments=segments)
  out = model.apply(choose_adapters(params, state.adapter_B), batch, cache=state.cache)
  logits_BTV = sharding.whole_logits(out.head, out.hidden)

  def add_column(carry):
    n, state, is_wrong, columns = carry
    is_idle = state.ended_B | is_wrong
    new, tokens = add_token(state._replace(ended_B=is_idle), logits_BTV[:, n], allowed, vocab, ends)
    is_wrong |= new.token_B != drafts[:, n]
    state = new._replace(token_B=jnp.where(is_idle, state.token_B, new.token_B),
                         ended_B=jnp.where(is_idle, state.ended_B, new.ended_B))
    return n + 1, state, is_wrong, put_column(columns, tokens, n)

  columns = empty_columns(*tokens.shape, vocab, ends)
  carry = jnp.int32(0), state._replace(cache=None), jnp.zeros_like(state.ended_B), columns
  _, state, _, columns = jax.lax.while_loop(lambda carry: ~(carry[1].ended_B | carry[2]).all(), add_column, carry)
  counts = state.history.written_B - written
  state = state._replace(cache=out.cache._replace(index=index + counts))
  return state, replicate(columns._replace(count_B=counts))
