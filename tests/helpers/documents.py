"""Random documents, and the pairs of tokens that packed rows hold."""
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
  tokens: np.ndarray
  offsets: np.ndarray


def documents(sizes) -> Documents:
  """No token comes twice, so that a pair tells where it is from."""
  offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
  return Documents(np.arange(2, 2 + offsets[-1]).astype(np.uint16), offsets)


def pairs_of(store: Documents) -> collections.Counter:
  pairs = collections.Counter()
  for i, j in itertools.pairwise(store.offsets):
    pairs.update(itertools.pairwise([BEGIN, *store.tokens[i:j].tolist(), END]))
  return pairs


def pairs_in(batch: Batch, rows=slice(None)) -> collections.Counter:
  weighted = batch.weights[rows] > 0
  return collections.Counter(zip(batch.tokens[rows][weighted].tolist(), batch.targets[rows][weighted].tolist()))


def stacked(batches: Stream, steps) -> Batch:
  return Batch(*(None if x[0] is None else np.concatenate(x) for x in zip(*map(batches, steps))))


def same(a: Batch, b: Batch) -> bool:
  return all(x is y if x is None or y is None else x.dtype == y.dtype and np.array_equal(x, y) for x, y in zip(a, b))
