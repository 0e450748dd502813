"""Rows of texts for an encoder: batches by length, of few shapes, and the progress of long inputs."""
import functools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import sharding
from lm.data import tokenizers
from lm.data.batch import Batch
from lm.evaluate import row_shapes
from lm.evaluate.texts.scored_pairs import References

_SECONDS = 3.   # between two lines of progress


class Text(NamedTuple):
  """The tokens of a row, and the sentence of a pair that each of them belongs to."""
  tokens: np.ndarray   # int32 [n]
  types: np.ndarray    # int32 [n]: 0, or 1


def sizes(tokenizer: tokenizers.Tokenizer, candidates: Sequence[str], references: References) -> dict[str, int]:
  """Returns the number of tokens of each text."""
  texts = list(dict.fromkeys([*candidates, *(text for several in references for text in several)]))
  return dict(zip(texts, map(len, tokenizer.encode_batch(texts))))


def batches(texts: Sequence[Text], most: int) -> Iterator[tuple[list[int], Batch]]:
  """Yields the places of texts and a batch with a row for each of them, and empty rows after them."""
  for places, shape in row_shapes.groups([(row_shapes.width(len(text.tokens), most),) for text in texts]):
    tokens, types, segments = np.zeros((3, row_shapes.rows(shape), *shape), np.int32)
    for row, i in enumerate(places):
      count = len(texts[i].tokens)
      tokens[row, :count], types[row, :count], segments[row, :count] = *texts[i], 1
    yield places, Batch(tokens, segments=segments, types=types)


def compute(name: str, function: Callable[[Batch], Any], texts: Sequence[Text], most: int,
            clock: Callable[[], float] = time.monotonic) -> Iterator[tuple[list[int], Any]]:
  """Yields the places of texts and `function(batch)` in NumPy, of one batch after another.

  The next batch is computed while a result is read. Prints to stderr how many texts are done, every few seconds.
  """
  last, count, pending = clock(), 0, None
  for chosen, batch in [*batches(texts, most), (None, None)]:
    ahead = None if batch is None else (chosen, function(batch))
    if pending is not None:
      yield pending[0], jax.tree.map(np.asarray, pending[1])
      count += len(pending[0])
      if clock() - last > _SECONDS and ahead is not None:
        print(f'{name}: {count:,} of {len(texts):,} texts', file=sys.stderr, flush=True)
        last = clock()
    pending = ahead


@functools.partial(jax.jit, static_argnums=0)
@sharding.whole_rows()
def scores(apply: Callable[..., Any], params: Any, batch: Batch) -> jax.Array:
  """Returns the score of each row by a `models.TextScorer`, [B], on every device."""
  output = apply(params, batch)
  return sharding.constrain(output.head(output.hidden[:, :1])[:, 0], '-')


@functools.partial(jax.jit, static_argnums=0)
@sharding.whole_rows()
def hidden(apply: Callable[..., Any], params: Any, batch: Batch) -> jax.Array:
  """Returns the hidden states of each row, float32 [B, T, D], on every device."""
  return sharding.constrain(apply(params, batch).hidden.astype(np.float32), '---')
