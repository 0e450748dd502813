"""Packs whole dialogues, pairs or rated dialogues into rows."""
import bisect
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lm import seeds
from lm.data.batch import Row
from lm.data.batches import Batches


class RecordStore(Protocol):
  """Dialogues, pairs or rated dialogues; record i is `records[i]`."""
  positions: np.ndarray   # [n]: the positions of each record's example, one less per dialogue than it has tokens

  def __len__(self) -> int: ...
  def __getitem__(self, i: int) -> Any: ...


def best_fit(sizes: Sequence[int], width: int) -> list[list[int]]:
  """Packs pieces into rows of `width`, and returns the indices of the pieces of each row.

  Pieces are packed longest first, each into the row in which it leaves the least free space (best-fit decreasing).
  """
  rows, free_spaces = [], []   # free_spaces: (free positions, row), sorted
  for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
    place = bisect.bisect_left(free_spaces, (sizes[piece], 0))
    if place < len(free_spaces):
      free, row = free_spaces.pop(place)
    else:
      free, row = width, len(rows)
      rows.append([])
    rows[row].append(piece)
    bisect.insort(free_spaces, (free - sizes[piece], row))
  return rows


def check_left_out(line: str, share: float, advice: str, allowed: bool) -> str:
  """Returns the message that a share of the records is left out: `line`, or from a share of 0.1 on a warning.

  Raises ValueError from a share of 0.5 on, unless that is allowed.
  """
  if share >= 0.5 and not allowed:
    raise ValueError(f'{line}; {advice}. To continue with the others, give --allow_left_out')
  return f'warning: {line}; {advice}' if share >= 0.1 else line


@dataclasses.dataclass(frozen=True)
class Packed(Batches):
  """Packs records into rows, with one segment or several for each record. All epochs have the same rows.

  Records that are longer than a row are left out; `left_out` is their number.

  Args:
    records: the records.
    longest: the length of the longest row that the model reads.
  """
  records: RecordStore = dataclasses.field(kw_only=True)
  longest: float = dataclasses.field(default=math.inf, kw_only=True)

  @functools.cached_property
  def _sizes(self) -> np.ndarray:
    """The numbers of positions of the examples of all records, [n]."""
    form, = self.objective.forms
    return np.ceil(form.room.ratio * self.records.positions + form.room.extra).astype(np.int64)

  @property
  def left_out(self) -> int:
    return int((self._sizes > self.length).sum())

  def length_for(self, share: float) -> int:
    """Returns the length of rows that a share of the records fits."""
    return int(np.quantile(self._sizes, share, method='higher'))

  def length_advice(self) -> str:
    """Returns advice on --length: which length keeps which share of the records, up to what the model can read."""
    lengths = {percent: self.length_for(percent / 100) for percent in (90, 99)}
    parts = [f'--length={length} keeps {percent} % of them' for percent, length in lengths.items()
             if self.length < length <= self.longest]
    if lengths[99] > self.longest:
      fitting = int((self._sizes <= self.longest).sum())
      if fitting > int((self._sizes <= self.length).sum()):
        parts.append(f'--length={self.longest}, the most that the model reads at once, keeps '
                     f'{100 * fitting // len(self.records)} % of them')
      else:
        parts.append(f'the model reads {self.longest} positions at once, which is too short for this data (90 % of the '
                     f'records have up to {lengths[90]}): choose a model with a longer context, or shorten the records')
    return ', '.join(parts)

  @functools.cached_property
  def _rows(self) -> list[list[int]]:
    """The numbers of the records in each row."""
    fitting = np.flatnonzero(self._sizes <= self.length)
    if not len(fitting):
      raise ValueError(f'none of {len(self.records)} records fits a row of {self.length} positions; '
                       + self.length_advice())
    if self.seed is not None:   # decides which of several records of equal size share a row
      fitting = seeds.generator(self.seed).permutation(fitting)
    return [[int(fitting[i]) for i in row] for row in best_fit(self._sizes[fitting].tolist(), self.length)]

  @property
  def rows_per_epoch(self) -> int:
    return len(self._rows)

  def _fill(self, row: Row, epoch: int, index: int, rng: np.random.Generator) -> None:
    for record in self._rows[index]:
      row.add(self.objective.forms[0].example(self.records[record], rng, self.special))
