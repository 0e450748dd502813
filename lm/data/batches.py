"""Batches of rows: `batches(step)` is a pure function of (data, seed, step).

`packed_documents` cuts rows from a stream of documents; `packed_records` fills rows with whole dialogues or pairs.
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
  """Returns the random numbers of a row. Philox gives each (seed, row) an independent stream, and is fast to create."""
  return np.random.Generator(np.random.Philox(key=[seed or 0, row]))


def shuffled(seed: int | None, count: int, epoch: int) -> np.ndarray:
  """Returns the order of `count` items in an epoch: a permutation, or 0, 1, 2, ... if the seed is None."""
  return np.arange(count) if seed is None else seeds.generator(seed, epoch, 1).permutation(count)


@dataclasses.dataclass(frozen=True)
class Batches(abc.ABC):
  """Base class of batches: each step reads `rows` rows of an epoch, and each epoch has its rows in a new order.

  Args:
    objective: makes the examples.
    special: the special tokens of the tokenizer.
    length: T.
    rows: B, of the global batch.
    seed: decides the order; None: the order of the data.
    repeat: whether a new epoch follows the last row; otherwise, the rows after it are empty.
    source_length: S, if the objective makes sources.
    stored: arrays [rows_per_epoch, T, ...], which are added to the columns of a batch. The content of each row is then
      that of the first epoch, and only the order of rows is new in later epochs.
    inputs: the dtype, and the shape per row, of inputs that examples have in addition to those of the objective.
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
    """Fills a row with row number `index` of an epoch, counted before rows are shuffled."""

  @functools.cached_property
  def _empty(self) -> Batch:
    row = template(self.objective, self.special, self.length, self.source_length)
    stored = {name: values[:1] for name, values in (self.stored or {}).items()}
    inputs = {name: np.zeros((1, *shape), dtype) for name, (dtype, shape) in self.inputs.items()}
    return row._replace(columns={**(row.columns or {}), **stored} or None,
                        inputs={**(row.inputs or {}), **inputs} or None)

  def summary(self, rows: int) -> list[str]:
    """Returns lines for the user on what a run of `rows` rows reads, one for each source."""
    return [f'one epoch is {self.rows_per_epoch:,} rows; this run reads {rows:,} rows, '
            f'{rows / self.rows_per_epoch:.3g} epochs']

  def end(self) -> tuple[int, str] | None:
    """Returns the number of rows and the name of the source that ends after them; None if rows have no end."""
    return None

  def with_bytes(self) -> 'Batches':
    """Returns batches with the column `bytes`: the number of bytes of the text, in UTF-8, that each target stands for.

    Returns these batches themselves if the table of the tokenizer says it already, or if the text is not known.
    """
    return self

  @property
  def steps_per_epoch(self) -> int:
    return -(-self.rows_per_epoch // self.rows)

  @functools.cached_property
  def _order(self) -> Callable[[int], np.ndarray]:
    """The order of rows, as a function of the epoch. The last two are cached, because a batch may span two epochs."""
    return functools.lru_cache(maxsize=2)(functools.partial(shuffled, self.seed, self.rows_per_epoch))

  def __call__(self, step: int, rows: range | None = None) -> Batch:
    """Returns the batch of a step, or some of its rows (those that a host owns), as NumPy arrays."""
    rows = range(self.rows) if rows is None else rows
    places = [divmod(step * self.rows + row, self.rows_per_epoch) for row in rows]
    return self.compose([(epoch, int(self._order(epoch)[place])) if epoch == 0 or self.repeat else None
                         for epoch, place in places])

  def compose(self, places: list[tuple[int, int] | None]) -> Batch:
    """Returns a batch of rows, each given as (epoch, index before rows are shuffled); None is an empty row."""
    batch = blank(self._empty, len(places))
    for i, place in enumerate(places):
      if place is not None:
        epoch, index = (0, place[1]) if self.stored is not None else place
        self._fill(Row(batch, i), epoch, index, generator(self.seed, epoch * self.rows_per_epoch + index))
        for name, values in (self.stored or {}).items():
          batch.columns[name][i] = values[index]
    return batch
