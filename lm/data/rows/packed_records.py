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
  positions: np.ndarray   # [n]: positions that the example of a record takes, one less per dialogue than tokens

  def __len__(self) -> int: ...
  def __getitem__(self, i: int) -> Any: ...


def best_fit(sizes: Sequence[int], width: int) -> list[list[int]]:
  """Packs pieces into rows of `width`: the longest first, into the row that it fills best. Returns indices by row."""
  rows, room = [], []   # room: (free positions, row), in order
  for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
    place = bisect.bisect_left(room, (sizes[piece], 0))
    free, row = room.pop(place) if place < len(room) else (width, len(rows))
    if row == len(rows):
      rows.append([])
    rows[row].append(piece)
    bisect.insort(room, (free - sizes[piece], row))
  return rows


def check_left_out(line: str, share: float, advice: str, allowed: bool) -> str:
  """`line`, which says that a share of the records is left out, as it is to be printed: from 0.1 on as a warning.

  ValueError from a share of 0.5 on, but where that is allowed.
  """
  if share >= 0.5 and not allowed:
    raise ValueError(f'{line}; {advice}. To go on with the others, give --allow_left_out')
  return f'warning: {line}; {advice}' if share >= 0.1 else line


@dataclasses.dataclass(frozen=True)
class Packed(Batches):
  """Packs records into rows, each a segment, or several, of its own; the rows are the same in every epoch.

  A record that is longer than a row is left out, and `left_out` counts those. `longest` is the length of the longest
  row that the model reads.
  """
  records: RecordStore = dataclasses.field(kw_only=True)
  longest: float = dataclasses.field(default=math.inf, kw_only=True)

  @functools.cached_property
  def _taken(self) -> np.ndarray:
    form, = self.objective.forms
    return np.ceil(form.room.ratio * self.records.positions + form.room.extra).astype(np.int64)

  @property
  def left_out(self) -> int:
    return int((self._taken > self.length).sum())

  def length_for(self, share: float) -> int:
    """The length of rows that a share of the records fits."""
    return int(np.quantile(self._taken, share, method='higher'))

  def length_advice(self) -> str:
    """Says which --length keeps how many of the records, as far as the model can read such rows."""
    lengths = {percent: self.length_for(percent / 100) for percent in (90, 99)}
    parts = [f'--length={length} keeps {percent} % of them' for percent, length in lengths.items()
             if self.length < length <= self.longest]
    if lengths[99] > self.longest:
      kept = int((self._taken <= self.longest).sum())
      if kept > int((self._taken <= self.length).sum()):
        parts.append(f'--length={self.longest}, the most that the model reads at once, keeps '
                     f'{100 * kept // len(self.records)} % of them')
      else:
        parts.append(f'the model reads {self.longest} positions at once, which is too short for this data (90 % of the '
                     f'records have up to {lengths[90]}): choose a model with a longer context, or shorten the records')
    return ', '.join(parts)

  @functools.cached_property
  def _packed(self) -> list[list[int]]:
    fitting = np.flatnonzero(self._taken <= self.length)
    if not len(fitting):
      raise ValueError(f'none of {len(self.records)} records fits a row of {self.length} positions; '
                       + self.length_advice())
    if self.seed is not None:   # of equal sizes, the company is drawn
      fitting = seeds.generator(self.seed).permutation(fitting)
    return [[int(fitting[i]) for i in row] for row in best_fit(self._taken[fitting].tolist(), self.length)]

  @property
  def rows_per_epoch(self) -> int:
    return len(self._packed)

  def _fill(self, row: Row, epoch: int, index: int, rng: np.random.Generator) -> None:
    for record in self._packed[index]:
      row.add(self.objective.forms[0].example(self.records[record], rng, self.special))
