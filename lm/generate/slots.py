"""Slots: the rows of one decoding state, which prompts join and leave. A `scheduler` decides which prompt joins when.

A prompt is read in chunks without padding, into a cache of its own: as many of the largest width as it has, then
smaller ones. So the widths of its chunks follow from its length alone, and its numbers do not depend, to the last bit,
on what else is decoded. The cache is then copied into the row of the state that the prompt joins, or into its pages.

The source of an encoder-decoder is read at once, together with the first token, in a width that follows from the number
of its tokens. Each row has room for the longest source.

With pages, prompts share those of a prefix: a chunk of the largest width fills a page, so that what is read from a page
is, to the last bit, what reading the chunk would give.

Shapes: the legend in `models/transformer.py`; R are the rows of a cache into which a prompt is read, of which the first
has the prompt and the others repeat it where a mesh splits rows.
"""
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.generate.engine import (
    Engine,
    State,
    Tokens,
    add_token,
    insert_state,
    last_logits,
    map_shards,
    most_probable,
    replicate,
    split_rows,
    token_log_probabilities,
)
from lm.generate.filters import TokenHistory, new_history
from lm.generate.page_pools import PagePools, Prefix, RowPages, ring
from lm.generate.sampling import Sampling, Settings, settings
from lm.models import paged
from lm.models.low_rank_weight import choose_adapters, count_adapters

WIDTHS = 64, 16, 4, 1   # of chunks; each is a program more, which takes a second to compile


def usable_widths(widths: Sequence[int], context: int) -> tuple[int, ...]:
  """Returns the widths of chunks that texts of up to `context` tokens have use for, the largest first.

  Raises:
    ValueError: 1 is not among them.
  """
  usable = tuple(width for width in sorted(set(widths), reverse=True) if width <= max(context // 2, 1))
  if usable[-1:] != (1,):
    raise ValueError(f'widths={usable} must include 1, because prompts are read without padding')
  return usable


class Prompt(NamedTuple):
  """A prompt that is read so far: its cache, and the logits after its last token, [R, V]."""
  cache: Any
  logits_RV: jax.Array


class Start(NamedTuple):
  """What a row begins with besides its prompt, in NumPy, led by R."""
  history: TokenHistory
  settings: Settings
  position_R: np.ndarray   # of the last token of the prompt
  limit_R: np.ndarray
  top_R: np.ndarray
  adapter_R: np.ndarray
  allowed_RW: np.ndarray   # the tokens that may be drawn first


def _new_cache(model: Any, rows: int, slots: int) -> Any:
  """Returns an empty cache without pages; sources may be as long as texts."""
  return model.init_cache(rows, slots, slots) if model.reads_source else model.init_cache(rows, slots)


@functools.partial(jax.jit, static_argnames=('model', 'rows', 'slots', 'pages', 'size'))
@sharding.whole_rows()
def _empty(model, history, settings, *, rows, slots, pages, size) -> State:
  history, settings = split_rows((history, settings))
  zeros = split_rows(jnp.zeros(rows, jnp.int32))
  cache = paged.init_cache(model, rows, pages, size, slots // size) if any(pages) else _new_cache(model, rows, slots)
  return State(cache, zeros, zeros, zeros == 0, history, settings, zeros, zeros, zeros)


@functools.partial(jax.jit, static_argnames=('model', 'rows', 'slots'))
@sharding.whole_rows()
def _empty_cache(model, *, rows, slots) -> Any:
  return _new_cache(model, rows, slots)


@functools.partial(jax.jit, static_argnames=('model', 'vocab'), donate_argnames='cache')
@sharding.whole_rows()
def _read(model, params, cache, batch: Batch, adapter_R, is_scored, *, vocab) -> tuple[Prompt, Tokens]:
  """Reads a chunk. Returns the log-probabilities of the targets too if `is_scored` is true, otherwise zeros."""
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  params = choose_adapters(params, split_rows(adapter_R))
  out = model.apply(params, batch._replace(targets=None), cache=cache)

  def score(logits, targets):
    return Tokens(targets, token_log_probabilities(logits, targets), None, most_probable(logits, vocab, True))

  def compute():
    return replicate(map_shards(score, sharding.whole_logits(out.head, out.hidden), batch.targets))

  def fill():
    shapes = jax.eval_shape(compute)
    return replicate(jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes))

  return Prompt(out.cache, last_logits(out)), jax.lax.cond(is_scored, compute, fill)


@functools.partial(jax.jit, static_argnames=('model', 'vocab'), donate_argnames='state')
@sharding.whole_rows()
def _join(model, state: State, prompt: Prompt, start: Start, ends, row, pages, *, vocab) -> tuple[State, Tokens]:
  start = split_rows(start)
  zeros = jnp.zeros_like(start.limit_R)
  new = State(prompt.cache, zeros, start.position_R, zeros > 0, start.history, start.settings, start.limit_R,
              start.top_R, start.adapter_R)
  new, tokens = add_token(new, prompt.logits_RV, start.allowed_RW, vocab, ends)
  places = jnp.where(jnp.arange(len(zeros)) == 0, row, len(state.token_B))   # the repetitions have no place
  if pages is None:
    cache = model.insert(state.cache, prompt.cache, places)
  else:
    cache = paged.insert(state.cache, prompt.cache, row, *pages)
  return insert_state(state, new, places, cache), replicate(tokens)


_read_prefix = jax.jit(paged.read_prefix)


@dataclasses.dataclass(frozen=True)
class Slots:
  """Reads prompts and lets them join the rows of a state, for an engine and a number of rows.

  The cache of the state has `pages` pages of the largest width; with 0, each row has slots of its own.
  """
  engine: Engine
  rows: int
  widths: Sequence[int] = WIDTHS
  pages: int = 0

  @property
  def size(self) -> int:
    """The number of slots of a page."""
    return self.widths[0]

  @property
  def slots(self) -> int:
    """The number of slots of a row."""
    return -(-self.engine.slots // self.size) * self.size if self.pages else self.engine.slots

  @functools.cached_property
  def adapters(self) -> int:
    """The number of adapters beside the parameters, of which each row can have one; see `lora.with_row_adapters`."""
    return count_adapters(self.engine.params)

  @functools.cached_property
  def _windows(self) -> tuple[int | None, ...]:
    """The window of each layer that has pages for windows."""
    return paged.windows(self.engine.model) if self.pages and not paged.obstacle(self.engine.model) else ()

  @property
  def window(self) -> int | None:
    """The largest window of a layer that has pages for windows; None if there is none."""
    return max((window for window in self._windows if window is not None), default=None)

  @property
  def pool_sizes(self) -> tuple[int, int]:
    """The number of pages for layers without and with a window."""
    if self.window is None:
      return self.pages, 0
    # What a row sees of its prompt and what it writes; and as much again, for prefixes that other prompts can use.
    windowed = min(self.pages, 4 * self.rows * ring(self.window, self.size) + 1)
    return self.pages if None in self._windows else 0, windowed

  def empty(self) -> State:
    """Returns a state without prompts."""
    engine = self.engine
    row_settings = settings([Sampling()] * self.rows, [0] * self.rows, np.zeros(self.rows))
    history = new_history([np.int32([])] * self.rows, engine.model.vocab)
    return self._on_device(_empty(engine.model, history, row_settings, rows=self.rows, slots=self.slots,
                                  pages=self.pool_sizes, size=self.size))

  def empty_cache(self) -> Any:
    """Returns a cache for a prompt that is read from its beginning."""
    return self._on_device(_empty_cache(self.engine.model, rows=sharding.padded_rows(1), slots=self.slots))

  def _on_device(self, arrays: Any) -> Any:
    """Returns arrays bound to the device of the parameters, where there is no mesh.

    JAX compiles a program again for arrays that it may move to another device, as new ones are and results of programs
    with parameters like these are not.
    """
    if sharding.spec('') is not None:
      return arrays
    return jax.device_put(arrays, jax.tree.leaves(self.engine.params)[0].sharding)

  def pools(self) -> PagePools | None:
    """Returns the pools of the pages of a state; None if it has no pages."""
    return PagePools(self.pool_sizes, self.window, self.size, self.slots // self.size) if self.pages else None

  def read_prefix(self, state: State, prefix: Prefix) -> Any:
    """Returns a cache for a prompt whose first tokens are in pages."""
    return _read_prefix(state.cache, prefix.pages_GM, prefix.first_G, np.int32(prefix.count))

  def width(self, count: int) -> int:
    """Returns the width of the next chunk of a prompt of which `count` tokens are not read yet."""
    return next(width for width in self.widths if width <= count)

  def source_width(self, count: int) -> int:
    """Returns the width in which a source of `count` tokens is read: a power of two, or the number of slots."""
    return min(max(16, 1 << (count - 1).bit_length()), self.slots)

  def source_widths(self) -> list[int]:
    """Returns all widths in which sources are read."""
    return sorted({self.source_width(count) for count in range(1, self.slots + 1)})

  def read(self, cache: Any, ids: np.ndarray, start: int, is_scored: bool, source: np.ndarray | None = None,
           adapter: int = 0) -> tuple[Prompt, Tokens]:
    """Reads the next chunk of a prompt, from its token `start` on. It donates `cache`.

    Returns the prompt, and of each token of the chunk the log-probabilities of the token after it, if they are scored.
    A `source` is read with the first token. `adapter` is the number of an adapter; 0 for none.
    """
    reads_source = source is not None and start == 0
    width, rows = 1 if reads_source else self.width(len(ids) - start), sharding.padded_rows(1)
    chunk = np.arange(start, start + width)
    tokens, positions, targets = (np.repeat(np.int32(x)[None], rows, axis=0)
                                  for x in (ids[chunk], chunk, ids[np.minimum(chunk + 1, len(ids) - 1)]))
    engine, batch = self.engine, Batch(tokens, targets, positions=positions)
    if reads_source:
      padded, segments = np.zeros((2, rows, self.source_width(len(source))), np.int32)
      padded[:, :len(source)], segments[:, :len(source)] = source, 1
      batch = batch._replace(source=padded, source_segments=segments)
    return _read(engine.model, engine.params, cache, batch, np.full(rows, adapter, np.int32), is_scored,
                 vocab=engine.vocab)

  def start(self, ids: np.ndarray, sampling: Sampling, limit: int, top: int, seed: int, stream: int,
            allowed: np.ndarray | None = None, adapter: int = 0) -> Start:
    """Returns what a row begins with, which draws from the random stream `stream` of its seed.

    `allowed` are the tokens that may be drawn first, int32 [1, W] as in `grammars`; None for all.
    """
    rows = sharding.padded_rows(1)
    return Start(new_history([ids] * rows, self.engine.model.vocab),
                 settings([sampling] * rows, [seed] * rows, np.full(rows, stream)),
                 *(np.full(rows, value, np.int32) for value in (len(ids) - 1, limit, top, adapter)),
                 self.engine.allowed(rows, allowed))

  def join(self, state: State, prompt: Prompt, start: Start, row: int, pages: RowPages | None = None
           ) -> tuple[State, Tokens]:
    """Replaces a row by a prompt that has been read, and draws its first token. It donates `state`, not `prompt`.

    `pages` are those of the row, if the state has pages.
    """
    engine, arrays = self.engine, None if pages is None else (pages.pages_GM, pages.is_new_GM)
    return _join(engine.model, state, prompt, start, np.int32(engine.ends), np.int32(row), arrays, vocab=engine.vocab)
