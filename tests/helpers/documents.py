"""Documents of distinct tokens, and the (token, target) pairs that packed rows hold."""
import collections
import dataclasses
import itertools

import numpy as np

from lm.data.batch import Batch, Special
from lm.data.rows.packed_documents import Stream

BEGIN, END = 0, 1

SPECIAL = Special(BEGIN, END, 1000, ())


@dataclasses.dataclass(frozen=True)
class Documents:
  """A store of documents: document i is `tokens[offsets[i]:offsets[i + 1]]`."""
  tokens: np.ndarray
  offsets: np.ndarray


def documents(sizes) -> Documents:
  """Returns documents of these sizes. No token occurs twice, so that a pair of tokens shows where it comes from."""
  offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
  return Documents(np.arange(2, 2 + offsets[-1]).astype(np.uint16), offsets)


def pairs_of(store: Documents) -> collections.Counter:
  """Counts the (token, next token) pairs of each document between its BEGIN and its END."""
  pairs = collections.Counter()
  for i, j in itertools.pairwise(store.offsets):
    pairs.update(itertools.pairwise([BEGIN, *store.tokens[i:j].tolist(), END]))
  return pairs


def pairs_in(batch: Batch, rows=slice(None)) -> collections.Counter:
  """Counts the (token, target) pairs of positive weight in these rows of a batch."""
  weighted = batch.weights[rows] > 0
  return collections.Counter(zip(batch.tokens[rows][weighted].tolist(), batch.targets[rows][weighted].tolist()))


def stacked(batches: Stream, steps) -> Batch:
  """Returns one batch with the rows of all these steps, in order."""
  return Batch(*(None if x[0] is None else np.concatenate(x) for x in zip(*map(batches, steps))))


def same(a: Batch, b: Batch) -> bool:
  """Returns whether all arrays of two batches agree in dtype and values."""
  return all(x is y if x is None or y is None else x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b))
