"""Warm-up of shapes: the first steps read fewer rows, or rows that are cut into shorter ones.

Nothing is read twice or skipped, the order is the data's own, and `batch(step)` stays a pure function.
"""
import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from lm.data.batch import Batch


@dataclasses.dataclass(frozen=True)
class Stage:
  """Steps before `until` read so many `rows` of the data, each cut into rows of `length` positions."""
  until: int
  rows: int
  length: int


def stages(rows: Sequence[tuple[int, int]], lengths: Sequence[tuple[int, int]], batch: int, length: int
           ) -> tuple[Stage, ...]:
  """From (until, rows) and (until, length), each in order; `batch` and `length` are those of the run, which follow.

  ValueError where either is out of order.
  """
  for name, given in (('rows', rows), ('lengths', lengths)):
    ends = [until for until, _ in given]
    if ends != sorted(set(ends)) or ends and ends[0] < 1:
      raise ValueError(f'{name} of a warm-up end at steps {", ".join(map(str, ends))}, which do not rise from 1 on')

  def at(given, step, final):
    return next((value for until, value in given if step < until), final)

  found = sorted({until for until, _ in (*rows, *lengths)})
  return tuple(Stage(until, at(rows, until - 1, batch), at(lengths, until - 1, length)) for until in found)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """What each step reads: after the stages, `rows` rows of `length` positions.

  ValueError where stages are out of order, have no row, or a length does not divide `length`.
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
        raise ValueError(f'a stage of {stage.rows} rows: give it one at least')
      if stage.length < 1 or self.length % stage.length:
        raise ValueError(f'rows of {self.length} positions cannot be cut into rows of {stage.length}; take a divisor')

  def _stage(self, step: int) -> Stage:
    return next((stage for stage in self.stages if step < stage.until), Stage(step + 1, self.rows, self.length))

  def shape(self, step: int) -> tuple[int, int]:
    """[B, T] of the batch of a step."""
    stage = self._stage(step)
    return stage.rows * self.length // stage.length, stage.length

  def shapes(self) -> list[tuple[int, int]]:
    """All that there are, each once, in their order."""
    steps = [0, *(stage.until for stage in self.stages)]
    return list(dict.fromkeys(map(self.shape, steps)))

  def rows_before(self, step: int) -> int:
    """Rows of the data that the steps before it have read."""
    total = done = 0
    for stage in self.stages:
      total += (min(step, stage.until) - done) * stage.rows
      done = min(step, stage.until)
    return total + (step - done) * self.rows

  def tokens_before(self, step: int) -> int:
    return self.rows_before(step) * self.length


@dataclasses.dataclass(frozen=True)
class Staged:
  """Batches that follow a schedule: `batch(step, rows)`, as `batches.Batches`, whose rows it reads in turn."""
  batches: Callable[[int, range], Batch]
  schedule: Schedule

  def __call__(self, step: int, rows: range | None = None) -> Batch:
    """The batch of a step, or only some of its rows."""
    count, length = self.schedule.shape(step)
    parts, first = self.schedule.length // length, self.schedule.rows_before(step)
    rows = range(count) if rows is None else rows
    begin, end = rows.start // parts, -(-rows.stop // parts)   # of the data's rows
    batch = self.batches(0, range(first + begin, first + end))
    if parts == 1:
      return batch
    return jax.tree.map(lambda x: x[rows.start - begin * parts:rows.stop - begin * parts], cut(batch, parts))


def cut(batch: Batch, parts: int) -> Batch:
  """[B, T] as [B * parts, T / parts]. Positions stay; documents of a row are counted from 1 again, as `Batch` has it.

  A document that is cut sees, in each part, what of it is there. ValueError where rows have inputs, which are of all of
  a row.
  """
  if batch.inputs:
    raise ValueError(f'rows with inputs ({", ".join(batch.inputs)}) cannot be cut: inputs are of the whole row; leave '
                     'out the stages of length')
  batch = jax.tree.map(lambda x: x.reshape(x.shape[0] * parts, x.shape[1] // parts, *x.shape[2:]), batch)
  first = np.min(np.where(batch.segments > 0, batch.segments, np.iinfo(np.int32).max), axis=1, keepdims=True)
  return batch._replace(segments=np.where(batch.segments > 0, batch.segments - first + 1, 0).astype(np.int32))
