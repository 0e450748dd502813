"""Documents packed into rows: they follow one another and are cut into rows, so that there is almost no padding."""
import dataclasses
import functools
from typing import NamedTuple, Protocol

import numpy as np

from lm import seeds
from lm.data.batch import Batch, Room, Row
from lm.data.batches import Batches, shuffled


class TokenDocuments(Protocol):
  """Tokenised documents one after the other: document i is `tokens[offsets[i]:offsets[i + 1]]`.

  `sizes` lists the tokens that stand for another number of bytes of the text than the table of the tokenizer says, as
  (place in `tokens`, number of bytes), [n, 2]. It is None if that is unknown. Only evaluation reads it.
  """
  tokens: np.ndarray
  offsets: np.ndarray
  sizes: np.ndarray | None


class _Epoch(NamedTuple):
  documents: np.ndarray   # the order of the documents
  ends: np.ndarray        # [documents + 1]: where each document, in that order, begins in the stream, and its end


@dataclasses.dataclass(frozen=True)
class Stream(Batches):
  """Packs documents into rows of `length` positions, in a new order each epoch.

  Document i becomes bos, tokens, eos. The documents of an epoch form a stream, which is cut into rows. From the piece
  of a document in a row, the objective makes an example, which is a segment of its own: its positions start at 0, and
  it sees no other segment. Each token of an epoch is read once. With next-token prediction, all rows but the last are
  full. If examples are longer than their text, a row holds less text, by their `Room`. An objective with several forms
  uses them in turn, one a row; a round has one row of each form.

  Args:
    store: the documents.
    context: positions at the start of a row that repeat the end of the row before, with weight 0. In evaluation, every
      target then has at least `context` positions before it, unless its document begins later.
    counts_bytes: whether batches have the column of `with_bytes`.

  Raises ValueError if a row has no room for an example, or the forms cannot be used together or with a context.
  """
  store: TokenDocuments = dataclasses.field(kw_only=True)
  context: int = dataclasses.field(default=0, kw_only=True)
  counts_bytes: bool = dataclasses.field(default=False, kw_only=True)

  def __post_init__(self):
    if not 0 <= self.context < self.length:
      raise ValueError(f'context={self.context} is not from 0 to below the {self.length} positions of a row')
    if len({form.ahead for form in self.objective.forms}) > 1:
      raise ValueError('some forms of the objective read ahead and others do not; give all of them the same `ahead`')
    if self.context and [form.room for form in self.objective.forms] != [Room()]:
      raise ValueError(f'context={self.context} is for objectives whose examples are as long as their text; use 0')
    if np.diff(self._round).min() < 1:
      raise ValueError(f'rows of {self.length} positions'
                       + (f' and sources of {self.source_length}' if self.source_length else '')
                       + ' have no room for an example of this objective; raise the length')

  @property
  def _ahead(self) -> int:
    return int(self.objective.forms[0].ahead)

  @functools.cached_property
  def _gap(self) -> int:
    """Places that the stream leaves free before each document, for the positions that its example adds to its tokens.
    """
    return max(form.room.gap for form in self.objective.forms)

  @functools.cached_property
  def _round(self) -> np.ndarray:
    """The places in the stream where each row of the first round begins, and where the round ends, [forms + 1]."""
    sizes = [form.room.tokens(self.length, self.source_length) for form in self.objective.forms]
    return np.concatenate([[0], np.cumsum(sizes) - self.context])

  @functools.cached_property
  def _size(self) -> int:
    """The length of the stream of an epoch."""
    count = len(self.store.offsets) - 1
    return int(self.store.offsets[-1] - self.store.offsets[0]) + count * (2 - self._ahead + self._gap)

  @functools.cached_property
  def rows_per_epoch(self) -> int:
    rounds, remainder = divmod(self._size, int(self._round[-1]))
    return rounds * len(self.objective.forms) + int(np.searchsorted(self._round, remainder))

  @functools.cached_property
  def _epoch(self):
    return functools.lru_cache(maxsize=3)(self._documents)   # a round of `fill_endless` touches up to three epochs

  def _documents(self, epoch: int) -> _Epoch:
    count = len(self.store.offsets) - 1
    order = np.arange(count) if self.seed is None else seeds.generator(self.seed, epoch).permutation(count)
    # Bos and eos are two more tokens; if the objective reads ahead, the last token of a document is only a target.
    sizes = np.diff(self.store.offsets)[order] + 2 - self._ahead + self._gap
    return _Epoch(order, np.concatenate([[0], np.cumsum(sizes)]))

  def _fill(self, row: Row, epoch: int, index: int, rng: np.random.Generator) -> None:
    round_number, which = divmod(index, len(self.objective.forms))
    begin, stop = self._span(round_number, which)
    first = max(begin - self.context, 0)
    self._add(row, epoch, first, min(stop, self._size), which, rng)
    row.batch.weights[row.index, :begin - first] = 0

  def summary(self, rows: int) -> list[str]:
    tokens, epochs = int(self.store.offsets[-1] - self.store.offsets[0]), rows / self.rows_per_epoch
    return [f'one epoch is {tokens:,} tokens; this run reads {_rounded(tokens * epochs)} tokens, {epochs:.3g} epochs']

  def rows_in(self, epochs: float) -> float:
    """Returns how many rows of `fill_endless` a number of epochs has."""
    return epochs * self._size * len(self.objective.forms) / int(self._round[-1])

  def fill_endless(self, row: Row, n: int, rng: np.random.Generator) -> None:
    """Fills row n of the streams of all epochs, joined, so that all rows have the same number of tokens.

    The rounds of a window, as many as an epoch has, are shuffled.
    """
    round_number, which = divmod(n, len(self.objective.forms))
    window, place = divmod(round_number, self._rounds_per_window)
    round_number = window * self._rounds_per_window + int(self._round_order(window)[place])
    begin, stop = self._span(round_number, which)
    while begin < stop:
      epoch, start = divmod(begin, self._size)
      end = min(start + stop - begin, self._size)
      self._add(row, epoch, start, end, which, rng)
      begin += end - start

  def _span(self, round_number: int, which: int) -> tuple[int, int]:
    """Returns the places in the stream where the row of form `which` begins and ends."""
    offset = round_number * self._round[-1]
    return int(offset + self._round[which]), int(offset + self._round[which + 1])

  @functools.cached_property
  def _rounds_per_window(self) -> int:
    return -(-self._size // int(self._round[-1]))

  @functools.cached_property
  def _round_order(self):
    """The order of the rounds of a window, as a function of the number of the window."""
    return functools.lru_cache(maxsize=2)(functools.partial(shuffled, self.seed, self._rounds_per_window))

  def _add(self, row: Row, epoch: int, start: int, stop: int, which: int, rng: np.random.Generator) -> None:
    """Adds the examples, in form `which`, of the documents between two places in the stream of an epoch."""
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
    """Returns the numbers of bytes of the text that tokens `start` to `stop` of a document stand for, int32 [n].

    They are counted with its bos, which is number 0, and its eos; both stand for 0 bytes.
    """
    first, last = int(self.store.offsets[document]), int(self.store.offsets[document + 1])
    sizes = np.zeros(stop - start, np.int32)
    begin, end = first + max(start, 1) - 1, first + min(stop - 1, last - first)   # places in the tokens of the store
    if end > begin:
      text_sizes = self._byte_lengths[self.store.tokens[begin:end]]
      low, high = np.searchsorted(self.store.sizes[:, 0], [begin, end])
      places, values = self.store.sizes[low:high].T
      text_sizes[places - begin] = values
      sizes[begin - first + 1 - start:end - first + 1 - start] = text_sizes
    return sizes

  def _piece(self, document: int, start: int, stop: int) -> np.ndarray:
    """Returns tokens `start` to `stop` of a document, counted with its bos, which is number 0, and its eos.

    Raises ValueError if an id is not in the vocabulary.
    """
    first, last = int(self.store.offsets[document]), int(self.store.offsets[document + 1])
    piece = np.empty(stop - start, np.int32)
    low, high = max(start, 1), min(stop, last - first + 1)
    if high > low:
      text = self.store.tokens[first + low - 1:first + high - 1]
      largest = int(text.max())
      if largest >= self.special.vocab:
        raise ValueError(f'document {document} of the stored tokens is damaged: it has the id {largest}, of a '
                         f'vocabulary of {self.special.vocab}; --verify says which files are not as they were written')
      piece[low - start:high - start] = text
    if start == 0:
      piece[0] = self.special.bos
    if stop == last - first + 2:
      piece[-1] = self.special.eos
    return piece


def _rounded(count: float) -> str:
  """Returns a count as text, such as '1,234' or '7.7M'."""
  for unit, name in ((1e12, 'T'), (1e9, 'G'), (1e6, 'M')):
    if count >= unit:
      return f'{count / unit:.1f}{name}'
  return f'{count:,.0f}'
