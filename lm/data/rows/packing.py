"""Rows that are filled with whole dialogues, pairs or rated dialogues."""
import bisect
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lm import seeds
from lm.data.batch import Batches, Row


class RecordStore(Protocol):
  """Dialogues, pairs or rated dialogues; record i is `records[i]`."""
  positions: np.ndarray   # [n], what an example of each takes: the tokens of its dialogues, less one of each

  def __len__(self) -> int: ...
  def __getitem__(self, i: int) -> Any: ...


def best_fit(sizes: Sequence[int], width: int) -> list[list[int]]:
  """Indices of pieces packed into rows of `width`: the longest first, each where it leaves the least room."""
  rows, room = [], []   # room: (positions left, row), in order
  for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
    at = bisect.bisect_left(room, (sizes[piece], 0))
    left, row = room.pop(at) if at < len(room) else (width, len(rows))
    if row == len(rows):
      rows.append([])
    rows[row].append(piece)
    bisect.insort(room, (left - sizes[piece], row))
  return rows


@dataclasses.dataclass(frozen=True)
class Packed(Batches):
  """Packs records into rows, each a segment, or several, of its own; the rows are the same in every epoch.

  A record that is longer than a row is left out, and `left_out` counts those.
  """
  records: RecordStore = dataclasses.field(kw_only=True)

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

  @functools.cached_property
  def _packed(self) -> list[list[int]]:
    fitting = np.flatnonzero(self._taken <= self.length)
    if not len(fitting):
      raise ValueError(f'none of {len(self.records)} records fits a row of {self.length} positions; --length='
                       f'{self.length_for(0.9)} keeps 90 % of them, --length={self.length_for(0.99)} keeps 99 %')
    if self.seed is not None:   # of equal sizes, the company is drawn
      fitting = seeds.generator(self.seed).permutation(fitting)
    return [[int(fitting[i]) for i in row] for row in best_fit(self._taken[fitting].tolist(), self.length)]

  @property
  def rows_per_epoch(self) -> int:
    return len(self._packed)

  def _fill(self, row: Row, epoch: int, index: int, rng: np.random.Generator) -> None:
    for record in self._packed[index]:
      row.add(self.objective.forms[0].example(self.records[record], rng, self.special))
