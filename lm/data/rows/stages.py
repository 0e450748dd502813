"""Warm-up of shapes: the first steps read fewer rows, or rows that are cut into shorter ones.

Each row of the data is read once, in its order, and `batch(step)` is still a pure function.
"""
import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lm.data.batch import Batch


@dataclasses.dataclass(frozen=True)
class Stage:
  """The steps before step `until`, each of which reads `rows` rows of the data, cut into rows of `length` positions."""
  until: int
  rows: int
  length: int


def stages(rows: Sequence[tuple[int, int]], lengths: Sequence[tuple[int, int]], batch: int, length: int
           ) -> tuple[Stage, ...]:
  """Returns the stages of a warm-up.

  Args:
    rows: (until, rows) pairs, in order of `until`.
    lengths: (until, length) pairs, in order of `until`.
    batch: the rows of the steps after the last pair of `rows`.
    length: the length of the steps after the last pair of `lengths`.

  Raises ValueError if pairs are out of order.
  """
  for name, pairs in (('rows', rows), ('lengths', lengths)):
    ends = [until for until, _ in pairs]
    if ends != sorted(set(ends)) or ends and ends[0] < 1:
      raise ValueError(f'{name} of a warm-up end at steps {", ".join(map(str, ends))}, which do not rise from 1 on')

  def value_of(pairs, step, final):
    return next((value for until, value in pairs if step < until), final)

  ends = sorted({until for until, _ in (*rows, *lengths)})
  return tuple(Stage(end, value_of(rows, end - 1, batch), value_of(lengths, end - 1, length)) for end in ends)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The shape of the batch of each step: that of its stage or, after the stages, `rows` rows of `length` positions.

  Raises ValueError if stages are out of order, a stage has no row, or its length does not divide `length`.
  """
  stages: tuple[Stage, ...]
  rows: int
  length: int

  def __post_init__(self):
    ends = [stage.until for stage in self.stages]
    if ends != sorted(set(ends)) or ends and ends[0] < 1:
      raise ValueError(f'stages end at steps {", ".join(map(str, ends))}, which do not rise from 1 on')
    for stage in self.stages:
      if stage.rows < 1:
        raise ValueError(f'a stage of {stage.rows} rows: give it at least one')
      if stage.length < 1 or self.length % stage.length:
        raise ValueError(f'rows of {self.length} positions cannot be cut into rows of {stage.length}; use a divisor')

  def _stage(self, step: int) -> Stage:
    return next((stage for stage in self.stages if step < stage.until), Stage(step + 1, self.rows, self.length))

  def shape(self, step: int) -> tuple[int, int]:
    """Returns (B, T) of the batch of a step."""
    stage = self._stage(step)
    return stage.rows * self.length // stage.length, stage.length

  def shapes(self) -> list[tuple[int, int]]:
    """Returns the shapes of all batches, each once, in the order of their first steps."""
    steps = [0, *(stage.until for stage in self.stages)]
    return list(dict.fromkeys(map(self.shape, steps)))

  def rows_before(self, step: int) -> int:
    """Returns how many rows of the data the steps before a step read."""
    total = start = 0
    for stage in self.stages:
      end = min(step, stage.until)
      total += (end - start) * stage.rows
      start = end
    return total + (step - start) * self.rows

  def tokens_before(self, step: int) -> int:
    return self.rows_before(step) * self.length


@dataclasses.dataclass(frozen=True)
class Staged:
  """Batches that follow a schedule, called as `batches.Batches`, whose rows they read in order."""
  batches: Callable[[int, range], Batch]
  schedule: Schedule

  def __call__(self, step: int, rows: range | None = None) -> Batch:
    """Returns the batch of a step, or some of its rows."""
    count, length = self.schedule.shape(step)
    parts, first = self.schedule.length // length, self.schedule.rows_before(step)
    rows = range(count) if rows is None else rows
    begin, end = rows.start // parts, -(-rows.stop // parts)   # in rows of the data
    batch = self.batches(0, range(first + begin, first + end))
    if parts == 1:
      return batch
    return jax.tree.map(lambda x: x[rows.start - begin * parts:rows.stop - begin * parts], cut(batch, parts))


def cut(batch: Batch, parts: int) -> Batch:
  """Cuts the rows of a batch: [B, T] becomes [B * parts, T / parts].

  Positions are unchanged; the segments of each new row are counted from 1. A document that is cut sees only what the
  same new row holds of it. Raises ValueError if rows have inputs, because inputs belong to a whole row.
  """
  if batch.inputs:
    raise ValueError(f'rows with inputs ({", ".join(batch.inputs)}) cannot be cut: inputs are of the whole row; leave '
                     'out the stages of length')
  batch = jax.tree.map(lambda x: x.reshape(x.shape[0] * parts, x.shape[1] // parts, *x.shape[2:]), batch)
  first = np.min(np.where(batch.segments > 0, batch.segments, np.iinfo(np.int32).max), axis=1, keepdims=True)
  return batch._replace(segments=np.where(batch.segments > 0, batch.segments - first + 1, 0).astype(np.int32))
