"""Rows that are cut from documents which follow one another: nothing is dropped, almost nothing padded."""
import dataclasses
import functools
from typing import NamedTuple, Protocol

import numpy as np

from lm import seeds
from lm.data.batch import Batch, Room, Row
from lm.data.batches import Batches


class TokenDocuments(Protocol):
  """Tokenised documents one after the other: document i is `tokens[offsets[i]:offsets[i + 1]]`.

  `sizes` is [n, 2], places in `tokens` and how many bytes of its text the token there stands for: of those that the
  table of the tokenizer does not say it of. None where it is not known. Only evaluation reads it.
  """
  tokens: np.ndarray
  offsets: np.ndarray
  sizes: np.ndarray | None


class _Epoch(NamedTuple):
  documents: np.ndarray   # the order of the documents
  ends: np.ndarray        # where each, in that order, starts and ends in the stream


@dataclasses.dataclass(frozen=True)
class Stream(Batches):
  """Packs documents into rows of `length` positions, in a new order each epoch.

  Document i becomes bos, tokens, eos. The documents of an epoch follow one another and are cut into rows: of what a
  row holds of a document, the objective makes an example, a segment of its own that starts at position 0 and sees
  nothing else. So every token of an epoch is read once. With next-token prediction rows are full but for the last;
  examples that are longer than their text take less of it a row, as their `Room` says. Rows take turns in the forms of
  an objective that has several.

  Args:
    store: the documents.
    context: positions at the start of a row that repeat the end of the row before and weigh nothing: in evaluation,
      every target then has at least so many positions before it, unless its document begins later.
    counts_bytes: whether batches have the column of `with_bytes`.
  """
  store: TokenDocuments = dataclasses.field(kw_only=True)
  context: int = dataclasses.field(default=0, kw_only=True)
  counts_bytes: bool = dataclasses.field(default=False, kw_only=True)

  def __post_init__(self):
    if not 0 <= self.context < self.length:
      raise ValueError(f'context={self.context} leaves nothing of rows of {self.length} positions')
    if len({form.ahead for form in self.objective.forms}) > 1:
      raise ValueError('the forms of an objective read ahead, or they do not: all of them')
    if self.context and [form.room for form in self.objective.forms] != [Room()]:
      raise ValueError(f'context={self.context} is for objectives whose examples are as long as their text')
    if np.diff(self._turn).min() < 1:
      raise ValueError(f'rows of {self.length} positions'
                       + (f' and sources of {self.source_length}' if self.source_length else '')
                       + ' have no room for an example of this objective; raise the length')

  @property
  def _ahead(self) -> int:
    return int(self.objective.forms[0].ahead)

  @functools.cached_property
  def _gap(self) -> int:
    """Places of the stream before each document that stand for what its example takes beside its tokens."""
    return max(form.room.gap for form in self.objective.forms)

  @functools.cached_property
  def _turn(self) -> np.ndarray:
    """Where in the stream the rows of one turn of the forms begin, and where they end."""
    takes = [form.room.tokens(self.length, self.source_length) for form in self.objective.forms]
    return np.concatenate([[0], np.cumsum(takes) - self.context])

  @functools.cached_property
  def _size(self) -> int:
    """Of the stream of an epoch."""
    count = len(self.store.offsets) - 1
    return int(self.store.offsets[-1] - self.store.offsets[0]) + count * (2 - self._ahead + self._gap)

  @functools.cached_property
  def rows_per_epoch(self) -> int:
    turns, remainder = divmod(self._size, int(self._turn[-1]))
    return turns * len(self.objective.forms) + int(np.searchsorted(self._turn, remainder))

  @functools.cached_property
  def _epoch(self):
    return functools.lru_cache(maxsize=3)(self._documents)   # so many may a turn through endless rows touch

  def _documents(self, epoch: int) -> _Epoch:
    count = len(self.store.offsets) - 1
    order = np.arange(count) if self.seed is None else seeds.generator(self.seed, epoch).permutation(count)
    sizes = np.diff(self.store.offsets)[order] + 2 - self._ahead + self._gap
    return _Epoch(order, np.concatenate([[0], np.cumsum(sizes)]))

  def _fill(self, row: Row, epoch: int, index: int, rng: np.random.Generator) -> None:
    turn, which = divmod(index, len(self.objective.forms))
    begin, stop = (int(turn * self._turn[-1] + self._turn[which + i]) for i in (0, 1))
    first = max(begin - self.context, 0)
    self._add(row, epoch, first, min(stop, self._size), which, rng)
    row.batch.weights[row.i, :begin - first] = 0

  def summary(self, rows: int) -> list[str]:
    tokens, epochs = int(self.store.offsets[-1] - self.store.offsets[0]), rows / self.rows_per_epoch
    return [f'one epoch is {tokens:,} tokens; this run reads {_rounded(tokens * epochs)} tokens, {epochs:.3g} epochs']

  def rows_in(self, epochs: float) -> float:
    """How many rows of `fill_endless` so many epochs are."""
    return epochs * self._size * len(self.objective.forms) / int(self._turn[-1])

  def fill_endless(self, row: Row, n: int, rng: np.random.Generator) -> None:
    """Fills row n of epochs that follow one another without a gap, so that each row has as many tokens as any other.

    As many turns of the forms as an epoch has are shuffled together.
    """
    turn, which = divmod(n, len(self.objective.forms))
    window, place = divmod(turn, self._turns_together)
    turn = window * self._turns_together + int(self._turn_order(window)[place])
    begin, stop = (int(turn * self._turn[-1] + self._turn[which + i]) for i in (0, 1))
    while begin < stop:
      epoch, start = divmod(begin, self._size)
      end = min(start + stop - begin, self._size)
      self._add(row, epoch, start, end, which, rng)
      begin += end - start

  @functools.cached_property
  def _turns_together(self) -> int:
    return -(-self._size // int(self._turn[-1]))

  @functools.cached_property
  def _turn_order(self):
    count = self._turns_together
    return functools.lru_cache(maxsize=2)(lambda window: np.arange(count) if self.seed is None else
                                          seeds.generator(self.seed, window, 1).permutation(count))

  def _add(self, row: Row, epoch: int, start: int, stop: int, which: int, rng: np.random.Generator) -> None:
    """Adds the examples of what lies between two places of the stream of an epoch, in a form."""
    order = self._epoch(epoch)
    document = int(np.searchsorted(order.ends, start, side='right')) - 1
    example = self.objective.forms[which].example
    while start < stop:
      offset, end = int(order.ends[document]), min(int(order.ends[document + 1]), stop)
      first, last = max(start - offset - self._gap, 0), end - offset - self._gap
      if last > first:
        piece = self._piece(int(order.documents[document]), first, last + self._ahead)
        result = example(piece, rng, self.special)
        if self.counts_bytes:
          sizes = self._bytes(int(order.documents[document]), first + self._ahead, last + self._ahead)
          result = result._replace(columns={**(result.columns or {}), 'bytes': sizes})
        row.add(result)
      document, start = document + 1, end

  def with_bytes(self) -> 'Stream':
    tokenizer = self.special.tokenizer
    if tokenizer is None or tokenizer.lossless or not all(form.in_place for form in self.objective.forms):
      return self
    return self if self.store.sizes is None else dataclasses.replace(self, counts_bytes=True)

  @functools.cached_property
  def _empty(self) -> Batch:
    row = super()._empty
    if not self.counts_bytes:
      return row
    return row._replace(columns={**(row.columns or {}), 'bytes': np.zeros((1, self.length), np.int32)})

  @functools.cached_property
  def _byte_lengths(self) -> np.ndarray:
    return self.special.tokenizer.byte_lengths()

  def _bytes(self, document: int, start: int, stop: int) -> np.ndarray:
    """The bytes of the text that tokens `start` to `stop` of a document stand for: bos and eos for none."""
    first, last = int(self.store.offsets[document]), int(self.store.offsets[document + 1])
    sizes = np.zeros(stop - start, np.int32)
    begin, end = first + max(start, 1) - 1, first + min(stop - 1, last - first)   # of the text, in all tokens
    if end > begin:
      text = self._byte_lengths[self.store.tokens[begin:end]]
      low, high = np.searchsorted(self.store.sizes[:, 0], [begin, end])
      places, values = self.store.sizes[low:high].T
      text[places - begin] = values
      sizes[begin - first + 1 - start:end - first + 1 - start] = text
    return sizes

  def _piece(self, document: int, start: int, stop: int) -> np.ndarray:
    """Tokens `start` to `stop` of a document with its bos and eos; ValueError where an id is none of the vocabulary."""
    first, last = int(self.store.offsets[document]), int(self.store.offsets[document + 1])
    piece = np.empty(stop - start, np.int32)
    low, high = max(start, 1), min(stop, last - first + 1)
    if high > low:
      piece[low - start:high - start] = text = self.store.tokens[first + low - 1:first + high - 1]
      if (largest := int(text.max())) >= self.special.vocab:
        raise ValueError(f'document {document} of the stored tokens is damaged: it has the id {largest}, of a '
                         f'vocabulary of {self.special.vocab}; --verify says which files are not as they were written')
    if start == 0:
      piece[0] = self.special.bos
    if stop == last - first + 2:
      piece[-1] = self.special.eos
    return piece


def _rounded(count: float) -> str:
  """1,234 or 7.7M."""
  for unit, name in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M')):
    if count >= unit:
      return f'{count / unit:.1f}{name}'
  return f'{count:,.0f}'
