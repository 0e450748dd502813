"""Batches of rows: `batches(step)` is a pure function of (data, seed, step).

`stream` cuts rows from documents that follow one another; `packing` fills rows with whole dialogues or pairs.
"""
import abc
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from lm import seeds
from lm.data.batch import Batch, ExampleMaker, Row, Special, blank, template


def generator(seed: int | None, row: int) -> np.random.Generator:
  """The random numbers of a row. Philox: a stream of its own for each, at the cost of making it."""
  return np.random.Generator(np.random.Philox(key=[seed or 0, row]))


@dataclasses.dataclass(frozen=True)
class Batches(abc.ABC):
  """Base of what makes batches: rows of an epoch in a new order each epoch, `rows` of them a step.

  Args:
    objective: makes the examples.
    special: of the tokenizer.
    length: T. source_length: S, where the objective makes sources.
    rows: B, of the global batch.
    seed: fixes the order; None keeps the data's own.
    repeat: whether a new epoch follows; otherwise rows after the last are empty.
    stored: arrays [rows_per_epoch, T, ...] that are added to the columns of a batch. What was stored of a row needs the
      row to be the same in every epoch; only their order then is new.
    inputs: dtype and shape, of a row, of each of the inputs that examples have beside those of the objective.
  """
  objective: ExampleMaker
  special: Special
  length: int
  rows: int
  seed: int | None = 0
  repeat: bool = True
  source_length: int | None = None
  stored: Mapping[str, np.ndarray] | None = None
  inputs: Mapping[str, tuple[Any, tuple[int, ...]]] = dataclasses.field(default_factory=dict)

  context = None   # positions at the start of a row that repeat the end of the row before; None: rows are not cut

  @property
  @abc.abstractmethod
  def rows_per_epoch(self) -> int: ...

  @abc.abstractmethod
  def _fill(self, row: Row, epoch: int, index: int, rng: np.random.Generator) -> None:
    """Row `index` of the epoch, before rows are shuffled."""

  @functools.cached_property
  def _empty(self) -> Batch:
    row = template(self.objective, self.special, self.length, self.source_length)
    stored = {name: values[:1] for name, values in (self.stored or {}).items()}
    inputs = {name: np.zeros((1, *shape), dtype) for name, (dtype, shape) in self.inputs.items()}
    return row._replace(columns={**(row.columns or {}), **stored} or None,
                        inputs={**(row.inputs or {}), **inputs} or None)

  def summary(self, rows: int) -> list[str]:
    """What so many rows read, a line for each source where there are several."""
    return [f'one epoch is {self.rows_per_epoch:,} rows; this run reads {rows:,} rows, '
            f'{rows / self.rows_per_epoch:.3g} epochs']

  def end(self) -> tuple[int, str] | None:
    """How many rows there are, and the name of the source that then ends; None where rows have no end."""
    return None

  def with_bytes(self) -> 'Batches':
    """These, with a column `bytes` where the table of the tokenizer does not say it, and the text is known.

    Those are bytes of the text's own UTF-8 that each target stands for.
    """
    return self

  @property
  def steps_per_epoch(self) -> int:
    return -(-self.rows_per_epoch // self.rows)

  @functools.cached_property
  def _order(self) -> Callable[[int], np.ndarray]:
    """The order of the rows of an epoch; a batch spans two epochs at most, or is larger than either."""
    return functools.lru_cache(maxsize=2)(lambda epoch: np.arange(self.rows_per_epoch) if self.seed is None else
                                          seeds.generator(self.seed, epoch, 1).permutation(self.rows_per_epoch))

  def __call__(self, step: int, rows: range | None = None) -> Batch:
    """The batch of a step, or only some of its rows (those that a host owns): NumPy arrays."""
    rows = range(self.rows) if rows is None else rows
    places = [divmod(step * self.rows + row, self.rows_per_epoch) for row in rows]
    return self.compose([(epoch, int(self._order(epoch)[index])) if epoch == 0 or self.repeat else None
                         for epoch, index in places])

  def compose(self, places: list[tuple[int, int] | None]) -> Batch:
    """Rows by (epoch, index before rows are shuffled); None is an empty one."""
    batch = blank(self._empty, len(places))
    for i, place in enumerate(places):
      if place is not None:
        epoch, index = (0, place[1]) if self.stored is not None else place
        self._fill(Row(batch, i), epoch, index, generator(self.seed, epoch * self.rows_per_epoch + index))
        for name, values in (self.stored or {}).items():
          batch.columns[name][i] = values[index]
    return batch
