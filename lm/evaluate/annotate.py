"""Data with additional columns that a fixed model computes once, such as log-probabilities: see `Annotated`."""
import dataclasses
import hashlib
import json
import pathlib
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm import sharding
from lm.data import dataset
from lm.data.batch import Batch
from lm.data.batches import Batches
from lm.data.chat.conversation import Template
from lm.data.chat.messages import Messages
from lm.objectives.objective import Objective
from lm.sharding import hosts
from lm.train import interfaces
from lm.workdir import atomic, integrity
from lm.workdir.describe import describe, differences

_EVERY = 20   # batches between two commits, which a kill may lose


@dataclasses.dataclass(frozen=True)
class Annotated:
  """A data set with columns that a model computes for each position, such as the logits of a teacher.

  The columns are computed when the data is first read, for its rows as they are packed; the rows are then the same in
  every epoch. After an interruption, the computation continues from the rows that were stored.

  Args:
    data: the data set.
    model: the model and its parameters, `model.load(model.model)`, which are loaded only if rows remain to compute.
    columns: dtype and shape, beyond [B, T], of each column by name.
    annotate: `(apply, params, batch) -> {name: [B, T, ...]}`, which runs inside `jit`.
    folder: the folder of the columns; None for one in the workdir.
  """
  data: interfaces.Data
  model: interfaces.Constants
  columns: Mapping[str, tuple[Any, tuple[int, ...]]]
  annotate: Callable[[Callable, Any, Batch], Mapping[str, jax.Array]]
  folder: pathlib.Path | None = None

  @property
  def length(self) -> int:
    return self.data.length

  @property
  def source_length(self) -> int | None:
    return self.data.source_length

  @property
  def kind(self) -> type:
    return self.data.kind

  @property
  def template(self) -> Template | None:
    return self.data.template

  @property
  def text_fingerprint(self) -> str:
    return self.data.text_fingerprint

  def questions(self, split: str, count: int) -> list[tuple[Messages, str]]:
    return self.data.questions(split, count)

  @property
  def inputs(self) -> Mapping[str, tuple[Any, tuple[int, ...]]]:
    return self.data.inputs

  def open(self, workdir: pathlib.Path, *, control: tuple[str, ...] = (), check: dataset.Check = dataset.unchecked
           ) -> 'OpenAnnotated':
    data = self.data.open(workdir, control=control,
                          check=lambda data, tokenizer: check(self.fingerprint(data), tokenizer))
    return OpenAnnotated(self, data, self._folder(workdir))

  def to_store(self) -> 'Annotated':
    """Returns the data without its text. Its columns are in the workdir, and are computed there if they are missing."""
    data = self.data.to_store() if hasattr(self.data, 'to_store') else self.data
    return dataclasses.replace(self, data=data, folder=None)

  def _folder(self, workdir: pathlib.Path) -> pathlib.Path:
    return self.folder or workdir / 'data' / 'columns'

  def fingerprint(self, data: str) -> str:
    """Returns the fingerprint of the annotated data, given that of the data."""
    facts = [data, describe(self.model.model), describe(self.model.load)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

  def load_tokenizer(self, workdir: pathlib.Path) -> Any:
    return self.data.load_tokenizer(workdir)

  def verify(self, workdir: pathlib.Path) -> list[str]:
    unverified = self.data.verify(workdir)
    for path in sorted(self._folder(workdir).glob('*/columns.json')):
      stored = _read(path)
      if 'checksums' in stored:
        integrity.compare({path.with_name(name): number for name, number in stored['checksums'].items()},
                          f'delete {path.parent}, and it is made again')
      else:   # not finished, or written by a version without checksums
        unverified = [*unverified, str(path.parent)]
    return unverified


@dataclasses.dataclass(frozen=True)
class OpenAnnotated:
  """Annotated data, open for reading."""
  annotated: Annotated
  data: interfaces.OpenData
  folder: pathlib.Path

  @property
  def tokenizer(self) -> Any:
    return self.data.tokenizer

  @property
  def validation_sets(self) -> tuple[str, ...]:
    return self.data.validation_sets

  @property
  def stores(self) -> Mapping[str, Sequence[np.ndarray]]:
    return self.data.stores

  @property
  def fingerprint(self) -> str:
    return self.annotated.fingerprint(self.data.fingerprint)

  def batches(self, split: str, objective: Objective, rows: int, seed: int | None = 0, repeat: bool = True) -> Batches:
    """Returns the batches of the data with the columns. It computes missing columns, and prints its progress."""
    batches = self.data.batches(split, objective, rows, seed, repeat)
    # An empty `stored` composes rows like stored columns will: each row is the same in every epoch.
    batches = dataclasses.replace(batches, stored={})
    shapes = {name: (np.dtype(dtype), (batches.rows_per_epoch, batches.length, *shape))
              for name, (dtype, shape) in self.annotated.columns.items()}
    origin = {'split': split, 'seed': seed, 'length': batches.length, 'data': self.fingerprint,
              'forms': describe(objective.forms), 'annotate': describe(self.annotated.annotate),
              'columns': {name: f'{dtype}{list(shape)}' for name, (dtype, shape) in shapes.items()}}
    stored = _Stored(self.folder / split.replace('/', '-'), shapes, origin)
    if stored.rows_done < batches.rows_per_epoch:
      self._compute(stored, batches)
    return dataclasses.replace(batches, stored=stored.read())

  def _compute(self, stored: '_Stored', batches: Batches) -> None:
    params = self.annotated.model.load(self.annotated.model.model)
    mesh, total = jax.sharding.get_mesh(), batches.rows_per_epoch

    @jax.jit
    def annotate(params, batch):
      columns = self.annotated.annotate(self.annotated.model.model.apply, params, batch)
      # Columns are replicated, so that process 0 can write those of all processes.
      return {name: sharding.constrain(x, '-' * x.ndim) for name, x in columns.items()}

    start = last_report = time.monotonic()
    first, arrays = stored.rows_done, stored.write()
    local, pending = sharding.local_rows(batches.rows, mesh), None
    for first_row in (*range(first, total, batches.rows), None):
      running = None
      if first_row is not None:
        rows = [(0, first_row + i) if first_row + i < total else None for i in local]
        running = first_row, annotate(params, sharding.shard_rows(batches.compose(rows), mesh))
      if pending is not None:   # write one batch while the device computes the next
        begin, columns = pending
        end = min(begin + batches.rows, total)
        for name, values in columns.items():
          if arrays is not None:
            arrays[name][begin:end] = np.asarray(values)[:end - begin]
        if (end // batches.rows) % _EVERY == 0 or end == total:
          stored.commit(arrays, end)
        now = time.monotonic()
        if now - last_report > 10 or end == total:
          last_report = now
          print(f'{self.folder.name}: {end:,} of {total:,} rows of {stored.folder.name} annotated, '
                f'{(end - first) * batches.length / (now - start):,.0f} tokens/s', flush=True)
      pending = running


class _Stored:
  """Columns on disk: an array `<name>.npy` for each, and `columns.json`, their origin and how many rows are computed.

  Raises ValueError if the folder holds columns of another origin.
  """

  def __init__(self, folder: pathlib.Path, shapes: Mapping[str, tuple[np.dtype, tuple[int, ...]]], origin: Mapping):
    self.folder, self._shapes, self._origin = folder, shapes, dict(origin)
    self.rows_done = 0
    path = folder / 'columns.json'
    if path.exists():
      stored = _read(path)
      self.rows_done = stored['rows_done']
      lines = differences(stored['made_of'], self._origin)
      if lines:
        raise ValueError(f'the columns in {folder} were made from other settings; choose another --workdir\n  '
                         + '\n  '.join(lines))

  def write(self) -> dict[str, np.memmap] | None:
    """Returns the arrays, open for writing; None on processes other than the first, which do not write."""
    if jax.process_index() > 0:
      return None
    self.folder.mkdir(parents=True, exist_ok=True)
    mode = 'r+' if self.rows_done else 'w+'
    return {name: np.lib.format.open_memmap(self.folder / f'{name}.npy', mode, dtype, shape)
            for name, (dtype, shape) in self._shapes.items()}

  def commit(self, arrays: Mapping[str, np.memmap] | None, rows: int) -> None:
    if arrays is not None:
      for array in arrays.values():
        array.flush()
      facts = {'rows_done': rows, 'made_of': self._origin}
      if all(rows == shape[0] for _, shape in self._shapes.values()):
        facts['checksums'] = {f'{name}.npy': integrity.checksum(self.folder / f'{name}.npy') for name in arrays}
      atomic.write(self.folder / 'columns.json', integrity.json_with_checksum(facts))
    self.rows_done = rows

  def read(self) -> dict[str, np.memmap]:
    hosts.wait_for_all()
    return {name: np.load(self.folder / f'{name}.npy', mmap_mode='r') for name in self._shapes}


def _read(path: pathlib.Path) -> dict[str, Any]:
  """Returns the content of `columns.json`. Raises ValueError, which names the file, if it is damaged."""
  try:
    stored, _ = integrity.parse_json_with_checksum(path.read_text())
    if not {'rows_done', 'made_of'} <= stored.keys():
      raise ValueError('it lacks the number of computed rows or their origin')
    return stored
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error}); delete {path.parent}, and it is made again') from None
