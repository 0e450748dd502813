"""Sources mixed by weight: shares of the tokens that training reads, exact at every row.

A mixture is first a source like any other, all documents of one source after all of another; its `mixing` says how the
rows of training are to be taken from them. `Mixed` takes them.
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
  """Sources of which each gives its weight's share of the tokens of training.

  A source that ends begins anew or, without `repeat`, training stops at the step at which the first source ends.
  A weight of 0 leaves a source out. Shares with more than six digits are rounded to a millionth, and to no less than
  that. Validation reads all held-out documents of all sources, once. A mixture has the splits that all of its sources
  have.

  Raises ValueError for weights that are no shares.
  """
  given = [weight for _, weight in parts]
  if not all(0 <= weight < math.inf for weight in given) or not any(given):
    raise ValueError(f'mixture: weights {given} must be 0 or positive, one of them positive at least')
  # As they are written: 0.3 is 3 / 10.
  parts = [(part, fractions.Fraction(str(weight))) for part, weight in parts if weight]
  return _joined(parts, repeat) if len(parts) > 1 else parts[0][0]


@source.deferred
def _joined(parts, repeat):
  flat = []   # a mixture of mixtures is one of all their sources
  for part, weight in parts:
    inner = part.mixing
    flat += [(part, weight)] if inner is None else [
        (one, weight * fractions.Fraction(own, sum(inner.weights))) for one, own in zip(inner.sources, inner.weights)]
  sources = tuple(part for part, _ in flat)
  mixing = source.Mixing(sources, _whole([weight for _, weight in flat]), repeat)
  counts, notes = collections.Counter(), []

  def places(sequences):
    counts.clear()
    sizes = [len(sequence) for sequence in sequences]   # reads what was not read
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
  """Whole numbers with the same shares, as small as possible; of a sum near a million where they would be larger.

  The order of rows repeats after their sum, and is computed up to there.
  """
  scale, total = math.lcm(*(weight.denominator for weight in weights)), sum(weights)
  whole = [int(weight * scale) for weight in weights]
  if sum(whole) // math.gcd(*whole) > MILLION:
    whole = [max(round(weight / total * MILLION), 1) for weight in weights]
  return tuple(weight // math.gcd(*whole) for weight in whole)


class SourceOrder:
  """Which source gives row n, and how many it gave before.

  Of the first n rows, each source has given its share to within less than one (Tijdeman, "The chairman assignment
  problem", 1980): row j of a source with share w is due in the window [floor(j/w), ceil((j+1)/w)), and the earliest
  due goes first, which keeps every window, as the shares sum to one. The order repeats after the sum of the weights.
  """

  def __init__(self, weights: Sequence[int]):
    self._weights, self._period = weights, sum(weights)
    self._taken = [0] * len(weights)
    self._order, self._ranks = array.array('H'), array.array('q')

  def __call__(self, n: int) -> tuple[int, int]:
    cycle, place = divmod(n, self._period)
    for i in range(len(self._order), place + 1):
      self._extend(i)
    which = self._order[place]
    return which, cycle * self._weights[which] + self._ranks[place]

  def _extend(self, n: int) -> None:
    taken, period = self._taken, self._period
    _, which = min((-(-(taken[i] + 1) * period // weight), i) for i, weight in enumerate(self._weights)
                   if taken[i] * period < (n + 1) * weight)
    self._order.append(which)
    self._ranks.append(taken[which])
    taken[which] += 1

  def counts(self, rows: int) -> list[int]:
    """How many of the first rows each source gives."""
    cycles, remainder = divmod(rows, self._period)
    if remainder:
      self(remainder - 1)
    return [cycles * weight + self._order[:remainder].count(i) for i, weight in enumerate(self._weights)]


@dataclasses.dataclass(frozen=True)
class Mixed(Batches):
  """Rows of several streams in turn, by weight; each goes through epochs of its own, without an end.

  Args:
    mixing: of the sources, whose names and weights are used.
    streams: one for each source.
  """
  mixing: source.Mixing = dataclasses.field(kw_only=True)
  streams: tuple[Stream, ...] = dataclasses.field(kw_only=True)

  def __post_init__(self):
    if self.stored is not None:
      raise ValueError('columns are stored for rows that are the same in every epoch, and a mixture has none: give one '
                       'corpus alone')

  @functools.cached_property
  def _turns(self) -> SourceOrder:
    return SourceOrder(self.mixing.weights)

  @property
  def rows_per_epoch(self) -> int:
    """Rows in which every source is read once, at least."""
    total = sum(self.mixing.weights)
    return max(math.ceil(stream.rows_in(1) * total / weight)
               for stream, weight in zip(self.streams, self.mixing.weights))

  def __call__(self, step: int, rows: range | None = None) -> Batch:
    rows = range(self.rows) if rows is None else rows
    batch = blank(self._empty, len(rows))
    for i, n in enumerate(rows):
      n += step * self.rows
      which, rank = self._turns(n)
      self.streams[which].fill_endless(Row(batch, i), rank, generator(self.seed, n))
    return batch

  def _fill(self, row, epoch, index, rng):
    raise TypeError('rows of a mixture belong to no epoch of the whole')

  def end(self) -> tuple[int, str] | None:
    if self.mixing.repeat:
      return None
    total = sum(self.mixing.weights)   # by then a source has given no more than it has
    return min((math.floor(stream.rows_in(1)) * total // weight, part.name) for part, weight, stream in zip(
        self.mixing.sources, self.mixing.weights, self.streams))

  def summary(self, rows: int) -> list[str]:
    total, lines = sum(self.mixing.weights), []
    for part, weight, stream, count in zip(self.mixing.sources, self.mixing.weights, self.streams,
                                           self._turns.counts(rows)):
      offsets = stream.store.offsets
      lines.append(f'{part.name}: {len(offsets) - 1:,} documents, {int(offsets[-1] - offsets[0]):,} tokens, '
                   f'{weight / total:.4g} of what is read, {count / stream.rows_in(1):.2f} epochs in this run')
    return lines
