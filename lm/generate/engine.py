"""The decoder loop: token ids in, token ids and their log-probabilities out. Text is a layer above it, in `text`.

  engine = Engine(model, model.unstack(params), slots=256, vocab=tokenizer.vocab_size, ends=tokenizer.eos_ids)
  state, tokens = engine.prefill(batch, settings, limit)   # reads prompts, and draws the token after each
  state, tokens = engine.step(state)                       # up to CHUNK more tokens of every row
  state = engine.insert(state, other, rows)                # the rows of another prefill take the place of `rows`
  state = engine.evict(state, rows)                        # these rows have ended

All rows of a state share one compiled step, whatever their settings, lengths and limits: those are arrays `[B]`. A row
that has ended is computed and gives no token, until another takes its place. So a row's tokens depend on its prompt and
its settings, not on its company. The caches are the model's: the engine only hands them on. Shapes: the legend in
`models/transformer.py`.
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
from lm.generate.sampling import Settings, draw, process, row_keys

CHUNK = 16   # tokens that one call of `step` makes at most: few enough to read along, enough to hide the call


class Tokens(NamedTuple):
  """What a call has written, on every device: the first `count_B[b]` columns of row b are its new tokens.

  `log_probabilities_BT` are in nats, of the model's own distribution: temperature 1, without penalty and filters, over
  its whole vocabulary, as `evaluate.log_probabilities` has them. They are not those of what the token was drawn from.
  """
  ids_BT: jax.Array
  log_probabilities_BT: jax.Array
  count_B: jax.Array

  def rows(self, count: int) -> list[np.ndarray]:
    """The new ids of each of the first `count` rows."""
    ids, counts = np.asarray(self.ids_BT), np.asarray(self.count_B)
    return [ids[row, :counts[row]] for row in range(count)]


class State(NamedTuple):
  """What decoding carries from token to token; every leaf is led by rows, those of the cache too."""
  cache: Any                    # of the model
  token_B: jax.Array            # the last token of each row, not yet in the cache
  position_B: jax.Array         # and its place in the text
  done_B: jax.Array             # rows that have ended, or are empty
  seen_BV: jax.Array            # tokens of prompt and output, for the penalty
  settings: Settings
  written_B: jax.Array             # tokens written, which number the draws of a row
  limit_B: jax.Array            # a row ends with so many


def by_row(function: Any, *args: Any) -> Any:
  """Calls a function of trees led by rows; on a mesh, each shard does its own rows, over the whole vocabulary."""
  if (rows := sharding.spec('B')) is None:
    return function(*args)
  args = jax.tree.map(lambda x: jax.sharding.reshard(x, P(*rows, *(None,) * (x.ndim - 1))), args)
  return jax.shard_map(function, in_specs=rows, out_specs=rows, check_vma=False)(*args)


def chosen(logits_BTV: jax.Array, ids_BT: jax.Array) -> jax.Array:
  """The log-probabilities of `ids_BT` at temperature 1, `[B, T]`, float32."""
  table = jax.nn.log_softmax(logits_BTV.astype(jnp.float32), axis=-1)
  return jnp.take_along_axis(table, ids_BT[..., None], axis=-1)[..., 0]


def _next(state: State, out: Any, vocab: int, ends: jax.Array) -> tuple[State, jax.Array]:
  """The state with one more token, from the last position of a forward pass, and its log-probabilities [B]."""
  def local(logits, seen, settings, written):
    known = jnp.where(jnp.arange(logits.shape[-1])[None] < vocab, logits, -jnp.inf)   # a padded vocabulary
    token = draw(process(known, settings, seen), settings, row_keys(settings, written))
    seen = seen.at[jnp.arange(len(token)), token].set(True)
    return token, seen, chosen(logits[:, None], token[:, None])[:, 0]

  logits = out.head(out.hidden[:, -1:])[:, 0]
  token, seen, log_probability = by_row(local, logits, state.seen_BV, state.settings, state.written_B)
  live = ~state.done_B
  token = jnp.where(live, token, ends[0])
  written = state.written_B + live
  done = state.done_B | (token[:, None] == ends[None]).any(-1) | (written >= state.limit_B)
  state = state._replace(cache=out.cache, token_B=token, position_B=state.position_B + live, done_B=done, seen_BV=seen,
                         written_B=written)
  return state, jnp.where(live, log_probability, 0)


def laid_out(tree: Any) -> Any:
  """Arrays led by rows, split over them and over nothing else."""
  return jax.tree.map(lambda x: sharding.constrain(x, 'B' + '-' * (x.ndim - 1)), tree)


@functools.partial(jax.jit, static_argnames=('model', 'vocab', 'slots'))
def _prefill(model, params, batch: Batch, seen, settings, written, limit, ends, *, vocab, slots) -> tuple[State,
                                                                                                          Tokens]:
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  seen, settings, written, limit = laid_out((seen, settings, written, limit))
  out = model.apply(params, batch, cache=model.init_cache(len(batch.tokens), slots))
  done = (batch.segments[:, -1] == 0) | (written >= limit)
  state = State(out.cache, batch.tokens[:, -1], batch.positions[:, -1], done, seen, settings, written, limit)
  state, log_probability = _next(state, out, vocab, ends)
  return state, everywhere(state.token_B[:, None], log_probability[:, None], state.written_B - written)


def everywhere(ids_BT: jax.Array, log_probabilities_BT: jax.Array, count_B: jax.Array) -> Tokens:
  """Tokens that every host can read."""
  return Tokens(*(sharding.constrain(x, '-' * x.ndim) for x in (ids_BT, log_probabilities_BT, count_B)))


@functools.partial(jax.jit, static_argnames=('model', 'vocab'), donate_argnames='state')
def _step(model, params, state: State, count, ends, *, vocab) -> tuple[State, Tokens]:
  """Up to `count` more tokens, fewer if all rows end."""
  def step(carry):
    n, state, ids, log_probabilities = carry
    batch = Batch(state.token_B[:, None], positions=state.position_B[:, None])
    state, log_probability = _next(state, model.apply(params, batch, cache=state.cache), vocab, ends)
    ids = jax.lax.dynamic_update_slice(ids, state.token_B[:, None], (0, n))
    return n + 1, state, ids, jax.lax.dynamic_update_slice(log_probabilities, log_probability[:, None], (0, n))

  shape = len(state.token_B), CHUNK
  ids, log_probabilities = laid_out((jnp.full(shape, ends[0]), jnp.zeros(shape)))
  written = state.written_B
  _, state, ids, log_probabilities = jax.lax.while_loop(
      lambda carry: (carry[0] < count) & ~carry[1].done_B.all(), step, (jnp.int32(0), state, ids, log_probabilities))
  return state, everywhere(ids, log_probabilities, state.written_B - written)


@functools.partial(jax.jit, static_argnames='model', donate_argnames='state')
def _insert(model, state: State, new: State, rows) -> State:
  cache = model.insert(state.cache, new.cache, rows)
  state, new = (x._replace(cache=None) for x in (state, new))
  return sharding.insert_rows(state, new, rows)._replace(cache=cache)


@functools.partial(jax.jit, donate_argnames='state')
def _evict(state: State, evicted) -> State:
  return state._replace(done_B=state.done_B | sharding.constrain(evicted, 'B'))


@dataclasses.dataclass(frozen=True)
class Engine:
  """Writes tokens with a model that has `apply`, `init_cache` and `insert`; see the module.

  Args:
    model: a `LanguageModel` that writes from left to right.
    params: its parameters, best as `model.unstack` gives them.
    slots: of the cache, for a padded prompt and what is written after it.
    vocab: ids from here on are never drawn: those of a padded vocabulary.
    ends: ids that end a row; they are written too. A row that has ended is filled up with the first.
  """
  model: Any
  params: Any
  slots: int
  vocab: int
  ends: Sequence[int]

  @property
  def spare(self) -> int:
    """The slots of a row beyond those of its prompt and its new tokens."""
    return 0

  def prefill(self, batch: Batch, settings: Settings, limit: Sequence[int], written: int = 0,
              texts: Sequence[np.ndarray] = ()) -> tuple[State, Tokens]:
    """Reads prompts, as `model.prompt` makes them of ids, and draws the token after each. Empty rows have ended.

    Args:
      batch: `[B, T]`, in NumPy; as many rows as there are settings.
      limit: the tokens that each row writes at most, `[B]`, those that it has written already among them.
      written: tokens that the rows have written already: their random streams go on after these.
      texts: all tokens of each row, where a repetition penalty is for more than the batch has.

    Raises:
      ValueError: the cache has not enough slots.
    """
    rows, width = batch.tokens.shape
    limit = np.asarray(limit, np.int32)
    needed = int(limit.max()) - written
    if width + needed + self.spare > self.slots:
      raise ValueError(f'prompts padded to {width} columns and {needed} new tokens do not fit slots={self.slots}; '
                       'make the engine with more slots')
    seen = np.zeros((rows, self.model.vocab), bool)
    row, column = np.nonzero(batch.segments)
    seen[row, batch.tokens[row, column]] = True
    for row, ids in enumerate(texts):
      seen[row, ids] = True
    return self._prefill(batch, seen, settings, np.full(rows, written, np.int32), limit)

  def _prefill(self, batch, seen, settings, written, limit):
    return _prefill(self.model, self.params, batch, seen, settings, written, limit, np.int32(self.ends),
                    vocab=self.vocab,
                    slots=self.slots)

  def step(self, state: State, count: int = CHUNK) -> tuple[State, Tokens]:
    """Up to `count` more tokens of each row that has not ended, at most CHUNK; `state` is used up."""
    if not 1 <= count <= CHUNK:
      raise ValueError(f'count={count} tokens in one step must be 1 to {CHUNK}')
    return _step(self.model, self.params, state, np.int32(count), np.int32(self.ends), vocab=self.vocab)

  def insert(self, state: State, new: State, rows: Sequence[int]) -> State:
    """Row i of `new` takes the place of row `rows[i]`, and goes on from there; `state` is used up.

    A row of `new` whose place is the number of rows of `state`, or beyond, is left out.
    """
    if len(rows) != len(new.done_B):
      raise ValueError(f'rows={list(rows)} must name a place for each of {len(new.done_B)} rows')
    return _insert(self.model, state, new, np.int32(rows))

  def evict(self, state: State, rows: Sequence[int]) -> State:
    """These rows have ended: they give no more tokens, and another may take their place; `state` is used up."""
    return _evict(state, np.isin(np.arange(len(state.done_B)), rows))
