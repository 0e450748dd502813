"""The decoder loop: token ids in, token ids and their log-probabilities out. Text is a layer above it, in `text`.

  engine = Engine(model, model.unstack(params), slots=256, vocab=tokenizer.vocab_size, ends=tokenizer.eos_ids)
  state, tokens = engine.prefill(batch, settings, limit)   # reads prompts and draws the token after each
  state, tokens = engine.step(state)                       # draws up to CHUNK more tokens of every row
  state = engine.insert(state, other, rows)                # replaces `rows` by the rows of another prefill
  state = engine.evict(state, rows)                        # ends these rows

All rows of a state share one compiled step, because their settings, lengths and limits are arrays `[B]`. A row that has
ended is still computed, but gives no tokens, until another row replaces it. The tokens of a row depend on its prompt
and its settings, and not on the other rows. Only the model reads its caches; the engine passes them on. Shapes: the
legend in `models/transformer.py`.
"""
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.data.batch import Batch
from lm.generate.filters import TokenHistory, draw, keep_allowed, new_history, process, word_count
from lm.generate.sampling import Settings, row_keys
from lm.models import paged
from lm.models.low_rank_weight import choose_adapters
from lm.models.transformer import Cache

CHUNK = 16   # the most tokens of a call of `step`: few enough to be read as they come, enough to hide its overhead
TOP = 20     # the most alternatives to a token whose log-probabilities are given


class Alternatives(NamedTuple):
  """The most probable tokens of each position, the most probable first, and their log-probabilities."""
  ids_BTK: jax.Array
  log_probabilities_BTK: jax.Array


class Tokens(NamedTuple):
  """The tokens of a call, replicated on all devices: the first `count_B[b]` columns of row b are its new tokens.

  `log_probabilities_BT`, in nats, are those of the model's own distribution over its whole vocabulary, at temperature
  1, without penalty and filters, as from `evaluate.log_probabilities`; not of the distribution that tokens are drawn
  from. So are those of the alternatives, TOP for each position, or all tokens if there are fewer; they are zeros unless
  a row has a `State.top_B`.
  """
  ids_BT: jax.Array
  log_probabilities_BT: jax.Array
  count_B: jax.Array
  alternatives: Alternatives | None = None

  def rows(self, count: int) -> list[np.ndarray]:
    """Returns the new ids of each of the first `count` rows."""
    ids, counts = np.asarray(self.ids_BT), np.asarray(self.count_B)
    return [ids[row, :counts[row]] for row in range(count)]


class State(NamedTuple):
  """The state between two tokens. The first axis of every leaf is that of rows, also in the cache."""
  cache: Any               # the model's
  token_B: jax.Array       # the last token of each row, which is not in the cache yet
  position_B: jax.Array    # the position of that token in the text
  ended_B: jax.Array       # whether a row has ended, or is empty
  history: TokenHistory    # its number of tokens written gives a row's next random key
  settings: Settings
  limit_B: jax.Array       # the number of tokens with which a row ends
  top_B: jax.Array         # the number of alternatives whose log-probabilities are needed
  adapter_B: jax.Array     # the number of the adapter of each row; 0 for none


def longest_text(model: Any) -> int:
  """Returns the tokens of the longest text that a model reads at once and whose positions it encodes as in training."""
  return min(length for length in (model.max_length, model.original_context) if length is not None)


def map_shards(function: Any, *args: Any) -> Any:
  """Calls a function of trees of arrays [B, ...]. Each shard of a mesh computes its own rows, over the whole V."""
  rows = sharding.spec('B')
  if rows is None:
    return function(*args)
  args = jax.tree.map(lambda x: jax.sharding.reshard(x, P(*rows, *(None,) * (x.ndim - 1))), args)
  return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)(*args)


def token_log_probabilities(logits_BTV: jax.Array, ids_BT: jax.Array) -> jax.Array:
  """Returns the log-probabilities of `ids_BT` at temperature 1, `[B, T]`, float32."""
  table = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
  return jnp.take_along_axis(table, ids_BT[..., None], axis=-1)[..., 0]


def most_probable(logits_BTV: jax.Array, vocab: int, is_needed: jax.Array) -> Alternatives:
  """Returns the most probable tokens below `vocab`; zeros if they are not needed."""
  size = min(TOP, vocab)

  def compute():
    table = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
    values, ids = jax.lax.top_k(table[..., :vocab], size)
    return Alternatives(ids, values)

  def fill():
    shape = *logits_BTV.shape[:-1], size
    return Alternatives(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))

  return jax.lax.cond(is_needed, compute, fill)


def add_token(state: State, logits_BV: jax.Array, allowed_BW: jax.Array, vocab: int, ends: jax.Array
              ) -> tuple[State, Tokens]:
  """Draws the next token of each row. Returns the new state and the tokens, of which a row that has ended has none.

  `allowed_BW` are the tokens that may be drawn, as in `grammars`.
  """
  def local(logits, history, settings, top, is_live, allowed, ends):
    in_vocab = jnp.where(jnp.arange(logits.shape[-1])[None] < vocab, logits, -jnp.inf)   # without the padding
    in_vocab = keep_allowed(in_vocab, allowed)
    token = draw(process(in_vocab, settings, history, ends), settings, row_keys(settings, history.written_B))
    token = jnp.where(is_live, token, ends[:, 0])
    is_end = (token[:, None] == ends).any(-1) | (token[:, None] == settings.stop_ids).any(-1)
    log_probability = token_log_probabilities(logits[:, None], token[:, None])
    alternatives = most_probable(logits[:, None], vocab, (top > 0).any())
    return token, is_end, history.add(token, is_live), log_probability, alternatives

  is_live = ~state.ended_B
  ends = jnp.broadcast_to(ends, (len(state.token_B), len(ends)))
  token, is_end, history, log_probability, alternatives = map_shards(
      local, logits_BV, state.history, state.settings, state.top_B, is_live, allowed_BW, ends)
  ended = state.ended_B | is_end | (history.written_B >= state.limit_B)
  state = state._replace(token_B=token, position_B=state.position_B + is_live, ended_B=ended, history=history)
  log_probability = jnp.where(is_live[:, None], log_probability, 0)
  return state, Tokens(token[:, None], log_probability, is_live.astype(jnp.int32), alternatives)


def empty_columns(rows: int, width: int, vocab: int, ends: jax.Array) -> Tokens:
  """Returns `width` columns for the tokens of rows, filled with the first of `ends`; they have no counts."""
  shape, top = (rows, width), (rows, width, min(TOP, vocab))
  return split_rows(Tokens(jnp.full(shape, ends[0]), jnp.zeros(shape), None,
                           Alternatives(jnp.zeros(top, jnp.int32), jnp.zeros(top))))


def put_column(columns: Tokens, tokens: Tokens, n: jax.Array) -> Tokens:
  """Returns columns of which column `n` is that of `tokens`, which have one."""
  return jax.tree.map(lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, n, 1), columns,
                      tokens._replace(count_B=None))


def split_rows(tree: Any) -> Any:
  """Returns arrays whose first axis is that of rows, split over the mesh along this axis only."""
  return jax.tree.map(lambda x: sharding.constrain(x, 'B' + '-' * (x.ndim - 1)), tree)


def last_logits(out: Any) -> jax.Array:
  """Returns the logits at the last position of a forward pass, [B, V]."""
  return sharding.whole_logits(out.head, out.hidden[:, -1:])[:, 0]


@functools.partial(jax.jit, static_argnames=('model', 'vocab', 'slots'))
@sharding.whole_rows()
def _prefill(model, params, batch: Batch, history, settings, limit, allowed, ends, *, vocab, slots
             ) -> tuple[State, Tokens]:
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  history, settings, limit, allowed = split_rows((history, settings, limit, allowed))
  out = model.apply(params, batch, cache=model.init_cache(len(batch.tokens), slots))
  ended = (batch.segments[:, -1] == 0) | (history.written_B >= limit)
  zeros = jnp.zeros_like(limit)
  state = State(out.cache, batch.tokens[:, -1], batch.positions[:, -1], ended, history, settings, limit, zeros, zeros)
  state, tokens = add_token(state, last_logits(out), allowed, vocab, ends)
  return state, replicate(tokens)


def replicate(tree: Any) -> Any:
  """Returns arrays on all devices, so that every host can read them."""
  return jax.tree.map(lambda x: sharding.constrain(x, '-' * x.ndim), tree)


@functools.partial(jax.jit, static_argnames=('model', 'vocab'), donate_argnames='state')
@sharding.whole_rows()
def _step(model, params, state: State, count, allowed, ends, *, vocab) -> tuple[State, Tokens]:
  """Draws up to `count` tokens of each row; fewer if all rows end."""
  allowed, params = split_rows(allowed), choose_adapters(params, state.adapter_B)

  def add_column(carry):
    n, state, columns = carry
    is_live = (~state.ended_B).astype(jnp.int32)
    batch = Batch(state.token_B[:, None], positions=state.position_B[:, None], segments=is_live[:, None])
    out = model.apply(params, batch, cache=state.cache)
    state, tokens = add_token(state._replace(cache=out.cache), last_logits(out), allowed, vocab, ends)
    return n + 1, state, put_column(columns, tokens, n)

  written, columns = state.history.written_B, empty_columns(len(state.token_B), CHUNK, vocab, ends)
  _, state, columns = jax.lax.while_loop(
      lambda carry: (carry[0] < count) & ~carry[1].ended_B.all(), add_column, (jnp.int32(0), state, columns))
  return state, replicate(columns._replace(count_B=state.history.written_B - written))


def insert_state(state: State, new: State, rows: jax.Array, cache: Any) -> State:
  """Returns `state` with row `rows[i]` replaced by row i of `new`, unless it has no such row, and with this cache."""
  state, new = (x._replace(cache=None) for x in (state, new))
  return sharding.insert_rows(state, new, rows)._replace(cache=cache)


@functools.partial(jax.jit, static_argnames='model', donate_argnames='state')
def _insert(model, state: State, new: State, rows) -> State:
  return insert_state(state, new, rows, model.insert(state.cache, new.cache, rows))


@functools.partial(jax.jit, donate_argnames='state')
def _evict(state: State, evicted) -> State:
  evicted = sharding.constrain(evicted, 'B')
  state = state._replace(ended_B=state.ended_B | evicted)
  if isinstance(state.cache, Cache) and state.cache.pages_BM is not None:
    return state._replace(cache=paged.release(state.cache, evicted))
  return state


@dataclasses.dataclass(frozen=True)
class Engine:
  """Decodes with a model that has `apply`, `init_cache` and `insert`; see the docstring of the module.

  Args:
    model: a `LanguageModel` that writes from left to right.
    params: its parameters; those of `model.unstack` are the fastest.
    slots: the slots of each row in the cache, for the padded prompt and the tokens written after it.
    vocab: only ids below it are drawn, because the model's vocabulary may be padded.
    ends: the ids that end a row, and are written too. Rows that have ended are filled with the first of them.
  """
  model: Any
  params: Any
  slots: int
  vocab: int
  ends: Sequence[int]

  @property
  def spare_slots(self) -> int:
    """The number of slots that a row needs besides those of its prompt and its new tokens."""
    return 0

  def prefill(self, batch: Batch, settings: Settings, limit: Sequence[int], written: int = 0,
              texts: Sequence[np.ndarray] = (), allowed: np.ndarray | None = None) -> tuple[State, Tokens]:
    """Reads prompts, as `model.prompt` makes them, and draws the token after each. Empty rows count as ended.

    Args:
      batch: `[B, T]`, in NumPy; as many rows as there are settings.
      settings: the sampling of each row.
      limit: the largest number of tokens of each row, `[B]`, which includes those that it wrote earlier.
      written: the number of tokens that the rows wrote earlier: their random numbers continue after these.
      texts: all tokens of the first rows, if a penalty counts more tokens than the batch has.
      allowed: the tokens that may be drawn, int32 `[B, W]` as in `grammars`; None for all.

    Raises:
      ValueError: the cache does not have enough slots.
    """
    rows, width = batch.tokens.shape
    limit = np.asarray(limit, np.int32)
    needed = int(limit.max()) - written
    if width + needed + self.spare_slots > self.slots:
      raise ValueError(f'prompts padded to {width} columns and {needed} new tokens do not fit slots={self.slots}; '
                       'make the engine with more slots')
    read = [row_tokens[segments > 0] for row_tokens, segments in zip(batch.tokens, batch.segments)]
    history = new_history([*texts, *read[len(texts):]], self.model.vocab, written)
    return self._prefill(batch, history, settings, limit, allowed)

  def _prefill(self, batch, history, settings, limit, allowed):
    return _prefill(self.model, self.params, batch, history, settings, limit, self.allowed(len(limit), allowed),
                    np.int32(self.ends), vocab=self.vocab, slots=self.slots)

  def allowed(self, rows: int, allowed: np.ndarray | None = None) -> np.ndarray:
    """Returns the tokens that may be drawn in each row, int32 `[B, W]`: all of them in rows that `allowed` lacks."""
    every = np.full((rows, word_count(self.model.vocab)), -1, np.int32)
    if allowed is not None:
      every[:len(allowed)] = allowed
    return every

  def step(self, state: State, count: int = CHUNK, allowed: np.ndarray | None = None) -> tuple[State, Tokens]:
    """Draws up to `count` tokens, at most CHUNK, of each row that has not ended. It donates `state`.

    `allowed` are the tokens that may be drawn, int32 `[B, W]` as in `grammars`, for `count=1`; None for all.
    """
    if not 1 <= count <= CHUNK:
      raise ValueError(f'count={count} tokens in one step must be 1 to {CHUNK}')
    if allowed is not None and count != 1:
      raise ValueError(f'count={count} tokens in one step must be 1 where `allowed` restricts the next one')
    return _step(self.model, self.params, state, np.int32(count), self.allowed(len(state.ended_B), allowed),
                 np.int32(self.ends), vocab=self.vocab)

  def insert(self, state: State, new: State, rows: Sequence[int]) -> State:
    """Replaces row `rows[i]` by row i of `new`, which continues there. It donates `state`.

    A row of `new` is skipped if its index in `rows` is not below the number of rows of `state`.
    """
    if len(rows) != len(new.ended_B):
      raise ValueError(f'rows={list(rows)} must name a place for each of {len(new.ended_B)} rows')
    return _insert(self.model, state, new, np.int32(rows))

  def evict(self, state: State, rows: Sequence[int]) -> State:
    """Ends rows: they give no more tokens, have no pages, and others may replace them. It donates `state`."""
    return _evict(state, np.isin(np.arange(len(state.ended_B)), rows))
