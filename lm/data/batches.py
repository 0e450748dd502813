"""`batch(step)`: rows of packed documents, as a pure function of (store, seed, step)."""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

Array = Any   # NumPy on the host, JAX on the devices


class Example(NamedTuple):
  """What an objective makes of one document, or of a piece of it: NumPy arrays of the same length."""
  tokens: Array                       # int32, what the model reads
  targets: Array                      # int32, what it is asked at each position
  weights: Array                      # float32, how much each position counts
  bidirectional: Array | None = None  # bool, positions that all others of the document see


class Batch(NamedTuple):
  """Rows of packed examples, `[B, T]`. A model reads all but `targets` and `weights`.

  An encoder-decoder reads `source` too, `[B, S]`, with its encoder; the decoder reads `tokens` and is asked for
  `targets`, so that the losses of decoders hold for it. Segment i of the tokens sees segment i of the source. An
  objective whose examples have no source makes one in its `loss`: `apply(params, batch._replace(source=...), key=key)`.
  """
  tokens: Array
  targets: Array | None = None
  weights: Array | None = None
  positions: Array | None = None      # place within the piece of a document; None: 0, 1, 2, ...
  segments: Array | None = None       # 0 padding, then 1, 2, ... by document; None: one document a row, no padding
  bidirectional: Array | None = None
  types: Array | None = None          # which sentence of a pair a token is of (BERT); None: 0
  source: Array | None = None
  source_segments: Array | None = None   # as `segments`


class Documents(Protocol):
  """Tokenised documents one after the other: document i is `tokens[offsets[i]:offsets[i + 1]]`."""
  tokens: np.ndarray
  offsets: np.ndarray


class _Epoch(NamedTuple):
  documents: np.ndarray   # the order of the documents
  ends: np.ndarray        # where each, in that order, starts and ends among the positions of the epoch
  rows: np.ndarray        # the order of the rows


@dataclasses.dataclass(frozen=True)
class Batches:
  """Packs documents into rows of `length` positions, in a new order each epoch.

  Document i becomes begin, tokens, end: n + 1 positions, each a token read and the next one asked. The documents of an
  epoch follow one another without gap and are cut into rows; only the last row is padded. So every token of an epoch
  is asked once. What a row holds of a document is a segment of its own: it starts at position 0 and sees nothing else.

  Args:
    store: the documents.
    example: of the objective; called with a piece of n + 1 tokens, it must give n positions.
    length: T. rows: B, of the global batch.
    begin, end: the tokens around each document.
    seed: fixes the order; None keeps the documents' own.
    repeat: whether a new epoch follows; otherwise rows after the last are empty.
    context: positions at the start of a row that repeat the end of the row before and weigh nothing: in evaluation,
      every target then has at least so many positions before it, unless its document begins later.
  """
  store: Documents
  example: Callable[[np.ndarray, np.random.Generator], Example]
  length: int
  rows: int
  begin: int
  end: int
  seed: int | None = 0
  repeat: bool = True
  context: int = 0

  def __post_init__(self):
    if not 0 <= self.context < self.length:
      raise ValueError(f'context={self.context} leaves nothing of rows of {self.length} positions')

  @functools.cached_property
  def rows_per_epoch(self) -> int:
    positions = int(self.store.offsets[-1]) + len(self.store.offsets) - 1
    return -(-positions // (self.length - self.context))

  @property
  def steps_per_epoch(self) -> int:
    return -(-self.rows_per_epoch // self.rows)

  @functools.cached_property
  def _marks(self) -> bool:
    """Whether examples mark positions: a host whose rows are empty must know too."""
    return self.example(self._piece(0, 0, 2), np.random.default_rng(0)).bidirectional is not None

  @functools.cached_property
  def _epoch(self):
    return functools.lru_cache(maxsize=2)(self._order)   # a batch spans two epochs at most, or is larger than either

  def _order(self, epoch: int) -> _Epoch:
    count = len(self.store.offsets) - 1
    if self.seed is None:
      documents, rows = np.arange(count), np.arange(self.rows_per_epoch)
    else:
      rng = np.random.default_rng([self.seed, epoch])
      documents, rows = rng.permutation(count), rng.permutation(self.rows_per_epoch)
    sizes = np.diff(self.store.offsets)[documents] + 1
    return _Epoch(documents, np.concatenate([[0], np.cumsum(sizes)]), rows)

  def __call__(self, step: int, rows: range | None = None) -> Batch:
    """The batch of a step, or only some of its rows (those that a host owns): NumPy arrays."""
    rows = range(self.rows) if rows is None else rows
    tokens, targets, positions, segments = np.zeros((4, len(rows), self.length), np.int32)
    marks = np.zeros(tokens.shape, bool) if self._marks else None
    batch = Batch(tokens, targets, np.zeros(tokens.shape, np.float32), positions, segments, marks)
    for i, row in enumerate(rows):
      epoch, index = divmod(step * self.rows + row, self.rows_per_epoch)
      if epoch == 0 or self.repeat:
        self._fill(batch, i, epoch, index)
    return batch

  def _fill(self, batch: Batch, i: int, epoch: int, index: int) -> None:
    order = self._epoch(epoch)
    row = int(order.rows[index])
    rng = np.random.Generator(np.random.Philox(key=[self.seed or 0, epoch * self.rows_per_epoch + row]))
    asked = self.length - self.context
    start, stop = max(row * asked - self.context, 0), min((row + 1) * asked, int(order.ends[-1]))
    repeated = row * asked - start
    first = int(np.searchsorted(order.ends, start, side='right')) - 1
    at = 0
    for segment in range(1, self.length + 1):
      if start == stop:
        break
      piece_end = min(stop, int(order.ends[first + segment]))
      offset = int(order.ends[first + segment - 1])
      piece = self._piece(int(order.documents[first + segment - 1]), start - offset, piece_end - offset + 1)
      example, span = self.example(piece, rng), slice(at, at + piece_end - start)
      batch.tokens[i, span], batch.targets[i, span], batch.weights[i, span] = example[:3]
      batch.positions[i, span] = np.arange(span.stop - at)
      batch.segments[i, span] = segment
      if example.bidirectional is not None:
        batch.bidirectional[i, span] = example.bidirectional
      at, start = span.stop, piece_end
    batch.weights[i, :repeated] = 0

  def _piece(self, document: int, start: int, stop: int) -> np.ndarray:
    """Tokens `start` to `stop` of a document with its begin and end."""
    first, last = int(self.store.offsets[document]), int(self.store.offsets[document + 1])
    piece = np.empty(stop - start, np.int32)
    low, high = max(start, 1), min(stop, last - first + 1)
    piece[low - start:high - start] = self.store.tokens[first + low - 1:first + high - 1]
    if start == 0:
      piece[0] = self.begin
    if stop == last - first + 2:
      piece[-1] = self.end
    return piece
