"""Log-probabilities of continuations of contexts; a context that several continuations share is read once.

The model reads the context into a cache, and each continuation goes on from there. The shapes of both batches follow
from the lengths of the context and of the continuation alone, so that a score is the same to the last bit in any
company, as in `score`. It differs in the last digits from the score of the same text in one piece.
"""
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.evaluate import row_shapes, score
from lm.evaluate.score import Predicted
from lm.train.validation import read_behind

_SHORTEST = 64   # context, in tokens, that is read apart; programs for shorter ones would not repay their compilation
_LONGEST = 64    # continuation, in tokens, for which a cache has slots
_SLOTS = 8192    # of all contexts in a cache


def predictions(model: Any, params: Any, texts: Sequence[np.ndarray], starts: Sequence[int]) -> list[Predicted]:
  """Returns how a decoder predicts `tokens[start:]` of each text, given all tokens before them, on the current mesh.

  The tokens before `start`, of which there is one at least, are the context. With a short context, with a long
  continuation, and by a model that encodes the positions of long texts in another way, a text is scored in one piece,
  by `score.predictions`.
  """
  contexts: dict[int, dict[bytes, list[int]]] = {}   # by width of the row, the texts that begin with each context
  whole = []
  for text, (tokens, start) in enumerate(zip(texts, starts, strict=True)):
    if start > _SHORTEST and 0 < len(tokens) - start <= _LONGEST and model.original_context is None:
      groups = contexts.setdefault(min(_power_of_two(start - 1), model.max_length), {})
      groups.setdefault(np.int32(tokens[:start]).tobytes(), []).append(text)
    else:
      whole.append(text)
  result = {text: Predicted(*(values[starts[text] - 1:] for values in predicted)) for text, predicted in zip(
      whole, score.predictions(model, params, [texts[text] for text in whole]))}
  calls = (call for width, groups in sorted(contexts.items())
           for call in _calls(model, params, texts, starts, list(groups.values()), width))
  for rows, predicted in read_behind(calls):
    for row, text in enumerate(rows.tolist()):
      result[text] = Predicted(*(values_BT[row, :len(texts[text]) - starts[text]] for values_BT in predicted))
  return [result[text] for text in range(len(texts))]


def _power_of_two(length: int) -> int:
  """Returns the smallest power of two that is not below `length`."""
  return 1 << (length - 1).bit_length()


def _parts(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
  """Yields the items, `size` at a time."""
  for first in range(0, len(items), size):
    yield items[first:first + size]


def _calls(model: Any, params: Any, texts: Sequence[np.ndarray], starts: Sequence[int],
           groups: Sequence[Sequence[int]], width: int) -> Iterator[tuple[np.ndarray, Predicted]]:
  """Yields (texts, predictions of their continuations, one in each row); each of the groups shares a context.

  `width` is that of the rows of contexts.
  """
  slots = width + _LONGEST
  capacity = sharding.padded_rows(max(_SLOTS // slots, 1))   # contexts
  for part in _parts(groups, capacity):
    cache = _empty(model, capacity, slots)
    rows = min(row_shapes.rows((width,)), capacity)
    for places in _parts(range(len(part)), rows):
      contexts = [texts[part[place][0]][:starts[part[place][0]] - 1] for place in places]
      cache = _read(model, params, cache, _contexts(contexts, rows, width), _padded(places, rows, capacity))
    by_width: dict[int, list[tuple[int, int]]] = {}
    for place, group in enumerate(part):
      for text in group:
        by_width.setdefault(max(32, _power_of_two(len(texts[text]) - starts[text])), []).append((text, place))
    for size, members in sorted(by_width.items()):
      rows = min(row_shapes.rows((size,)), capacity)
      for some in _parts(members, rows):
        batch = _continuations([(texts[text], starts[text]) for text, _ in some], rows, size)
        cache_rows = _padded([place for _, place in some], rows, 0)
        yield np.array([text for text, _ in some]), score.predict(model.apply, params, batch, None, cache, cache_rows)


def _padded(values: Sequence[int], count: int, padding: int) -> np.ndarray:
  return np.int32([*values, *[padding] * (count - len(values))])


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
@sharding.whole_rows()
def _empty(model: Any, rows: int, slots: int) -> Any:
  return model.init_cache(rows, slots)


@functools.partial(jax.jit, static_argnames='model', donate_argnames='cache')
@sharding.whole_rows()
def _read(model: Any, params: Any, cache: Any, batch: Batch, places: jax.Array) -> Any:
  """Returns the cache with the contexts of a batch in its rows `places`; a row that the cache has not is left out."""
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  rows, width = batch.tokens.shape
  new = model.apply(params, batch, cache=model.init_cache(rows, width + _LONGEST)).cache
  return model.insert(cache, new, places)


def _contexts(contexts: Sequence[np.ndarray], rows: int, width: int) -> Batch:
  """Returns a batch of contexts, padded on the left, as a model that goes on from the last column needs it."""
  tokens, positions, segments = np.zeros((3, rows, width), np.int32)
  for row, ids in enumerate(contexts):
    span = row, slice(width - len(ids), None)
    tokens[span], positions[span], segments[span] = ids, np.arange(len(ids)), 1
  return Batch(tokens, positions=positions, segments=segments)


def _continuations(members: Sequence[tuple[np.ndarray, int]], rows: int, width: int) -> Batch:
  """Returns a batch of the continuations of (text, start), each after the last token of its context."""
  tokens, targets, positions, segments = np.zeros((4, rows, width), np.int32)
  for row, (ids, start) in enumerate(members):
    count = len(ids) - start
    tokens[row, :count], targets[row, :count] = ids[start - 1:-1], ids[start:]
    positions[row, :count], segments[row, :count] = np.arange(start - 1, len(ids) - 1), 1
  return Batch(tokens, targets, positions=positions, segments=segments)
