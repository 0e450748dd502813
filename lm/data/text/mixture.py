"""Sources mixed by weight: each gives its share of the tokens that training reads, exactly, after any number of rows.

A mixture is a source, with the documents of one source after those of another, whose `mixing` has the weights. `Mixed`
reads training rows by these weights.
"""
import array
import collections
import dataclasses
import fractions
import functools
import math
from collections.abc import Sequence

import numpy as np

from lm.data.batch import Batch, Row, blank
from lm.data.batches import Batches, generator
from lm.data.rows.packed_documents import Stream
from lm.data.text import source
from lm.data.text.source import Source

MILLION = 10 ** 6


def mixture(parts: Sequence[tuple[Source, float]], repeat: bool = True) -> Source:
  """Returns a mixture of sources, each of which gives a share of the training tokens in proportion to its weight.

  Validation reads all held-out documents of all sources, once. A mixture has the splits that all of its sources have.

  Args:
    parts: (source, weight) pairs. A weight of 0 omits a source. Shares with more than six digits are rounded to a
      millionth, and to no less.
    repeat: whether a source that ends begins again; otherwise, training stops at the step at which the first one ends.

  Raises ValueError if a weight is negative or infinite, or if all are 0.
  """
  weights = [weight for _, weight in parts]
  if not all(0 <= weight < math.inf for weight in weights) or not any(weights):
    raise ValueError(f'mixture: weights {weights} must be 0 or positive, and at least one of them positive')
  # The string is the number as it was written: 0.3 is 3 / 10.
  parts = [(part, fractions.Fraction(str(weight))) for part, weight in parts if weight]
  return _joined(parts, repeat) if len(parts) > 1 else parts[0][0]


@source.deferred
def _joined(parts, repeat):
  sources, weights = [], []   # a mixture of mixtures is a mixture of their sources
  for part, weight in parts:
    inner = part.mixing or source.Mixing((part,), (1,))
    sources += inner.sources
    weights += [weight * fractions.Fraction(inner_weight, sum(inner.weights)) for inner_weight in inner.weights]
  mixing = source.Mixing(tuple(sources), _whole(weights), repeat)
  counts, notes = collections.Counter(), []

  def places(sequences):
    counts.clear()
    sizes = [len(sequence) for sequence in sequences]   # before counts and notes: this reads the sources
    for part in sources:
      counts.update(part.counts)
      notes.extend(note for note in part.notes if note not in notes)
    ends = np.cumsum(sizes)

    def place(n):
      which = int(np.searchsorted(ends, n, side='right'))
      return sequences[which], n - int(ends[which]) + sizes[which]
    return source.Documents(lambda: range(int(ends[-1])), place)

  splits = {}
  for split in [split for split in sources[0].splits if all(split in part.splits for part in sources)]:
    sequences = [part.splits[split] for part in sources]
    splits[split] = source.Documents(functools.partial(places, sequences), lambda place: place[0][place[1]])
  identity = repr(['mixture', *(part.fingerprint for part in sources)])
  return Source('+'.join(part.name for part in sources), splits, source.digest(identity).hex(),
                ', '.join(dict.fromkeys(part.license for part in sources)), counts, notes, mixing)


def _whole(weights: Sequence[fractions.Fraction]) -> tuple[int, ...]:
  """Returns the smallest whole numbers with the same shares; if their sum is above a million, rounded to that sum.

  The order of rows has their sum as its period, and is stored for one period.
  """
  scale, total = math.lcm(*(weight.denominator for weight in weights)), sum(weights)
  whole = [int(weight * scale) for weight in weights]
  if sum(whole) // math.gcd(*whole) > MILLION:
    whole = [max(round(weight / total * MILLION), 1) for weight in weights]
  return tuple(weight // math.gcd(*whole) for weight in whole)


class SourceOrder:
  """The source of row n, and the number of rows before n that it gives.

  Of the first n rows, each source gives its share to within less than one row (Tijdeman, "The chairman assignment
  problem", 1980): row j of a source with share w has to be in the window [floor(j/w), ceil((j+1)/w)). The source whose
  window ends first is next; this satisfies all windows, because the shares sum to one. The order has the sum of the
  weights as its period.
  """

  def __init__(self, weights: Sequence[int]):
    self._weights, self._period = weights, sum(weights)
    self._row_counts = [0] * len(weights)   # so far, by source
    self._order, self._ranks = array.array('H'), array.array('q')

  def __call__(self, n: int) -> tuple[int, int]:
    cycle, place = divmod(n, self._period)
    for i in range(len(self._order), place + 1):
      self._extend(i)
    which = self._order[place]
    return which, cycle * self._weights[which] + self._ranks[place]

  def _extend(self, n: int) -> None:
    """Appends row n to the order: of the sources whose window has begun, the one whose window ends first."""
    counts, period = self._row_counts, self._period
    _, which = min((-(-(counts[i] + 1) * period // weight), i) for i, weight in enumerate(self._weights)
                   if counts[i] * period < (n + 1) * weight)
    self._order.append(which)
    self._ranks.append(counts[which])
    counts[which] += 1

  def counts(self, rows: int) -> list[int]:
    """Returns how many of the first `rows` rows each source gives."""
    cycles, remainder = divmod(rows, self._period)
    if remainder:
      self(remainder - 1)
    return [cycles * weight + self._order[:remainder].count(i) for i, weight in enumerate(self._weights)]


@dataclasses.dataclass(frozen=True)
class Mixed(Batches):
  """Rows of several streams by weight. Each stream goes through epochs of its own, without end.

  Args:
    mixing: the sources, of which names and weights are used.
    streams: one for each source.

  Raises ValueError if columns are stored.
  """
  mixing: source.Mixing = dataclasses.field(kw_only=True)
  streams: tuple[Stream, ...] = dataclasses.field(kw_only=True)

  def __post_init__(self):
    if self.stored is not None:
      raise ValueError('columns are stored for rows that are the same in every epoch, and a mixture has no such rows; '
                       'give one corpus alone')

  @functools.cached_property
  def _source_order(self) -> SourceOrder:
    return SourceOrder(self.mixing.weights)

  @property
  def rows_per_epoch(self) -> int:
    """The number of rows in which every source is read at least once."""
    total = sum(self.mixing.weights)
    return max(math.ceil(stream.rows_in(1) * total / weight)
               for stream, weight in zip(self.streams, self.mixing.weights))

  def __call__(self, step: int, rows: range | None = None) -> Batch:
    rows = range(self.rows) if rows is None else rows
    batch = blank(self._empty, len(rows))
    for i, n in enumerate(rows):
      n += step * self.rows
      which, rank = self._source_order(n)
      self.streams[which].fill_endless(Row(batch, i), rank, generator(self.seed, n))
    return batch

  def _fill(self, row, epoch, index, rng):
    raise TypeError('the rows of a mixture do not belong to one epoch')

  def end(self) -> tuple[int, str] | None:
    if self.mixing.repeat:
      return None
    total = sum(self.mixing.weights)
    ends = []   # the number of rows after which each source has been read once
    for part, weight, stream in zip(self.mixing.sources, self.mixing.weights, self.streams):
      ends.append((math.floor(stream.rows_in(1)) * total // weight, part.name))
    return min(ends)

  def summary(self, rows: int) -> list[str]:
    total, lines = sum(self.mixing.weights), []
    for part, weight, stream, count in zip(self.mixing.sources, self.mixing.weights, self.streams,
                                           self._source_order.counts(rows)):
      offsets = stream.store.offsets
      lines.append(f'{part.name}: {len(offsets) - 1:,} documents, {int(offsets[-1] - offsets[0]):,} tokens, '
                   f'{weight / total:.4g} of what is read, {count / stream.rows_in(1):.2f} epochs in this run')
    return lines
