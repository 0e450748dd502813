"""The ledger of a run: the evaluations that it has done, so that none is done again when a killed run repeats steps.

`ledger.jsonl` has a line for each evaluation: the step, a fingerprint of the parameters, one of the settings of the
evaluation, and its metrics. An evaluation of the same parameters with the same settings has these metrics.
"""
import contextlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping

import jax

from lm.sharding import hosts
from lm.workdir import atomic

_FIELDS = {'step': int, 'parameters': str, 'settings': str, 'metrics': dict}


class Ledger:
  """The evaluations of one run, by their steps. All processes of a cluster have to make one; process 0 writes it.

  Args:
    folder: the workdir.
    settings: a fingerprint of what the evaluations measure, and how.
  """

  def __init__(self, folder: pathlib.Path, settings: str):
    self._path, self._settings = folder / 'ledger.jsonl', settings
    entries = list(_read(self._path)) if jax.process_index() == 0 else []
    if entries and jax.process_index() == 0:   # a line that a kill cut short would damage the next one
      atomic.write(self._path, ''.join(json.dumps(entry) + '\n' for entry in entries))
    entries = hosts.from_process_0([entry for entry in entries if entry['settings'] == settings])
    self._metrics = {(entry['step'], entry['parameters']): entry['metrics'] for entry in entries}

  def metrics(self, step: int, parameters: str) -> dict[str, float] | None:
    """Returns the metrics of an evaluation, or None if it is not done; `parameters` is their fingerprint."""
    return self._metrics.get((step, parameters))

  def add(self, step: int, parameters: str, metrics: Mapping[str, float]) -> None:
    """Adds an evaluation, which is on disk when this returns. Raises OSError if it cannot be written."""
    self._metrics[step, parameters] = dict(metrics)
    if jax.process_index() == 0:
      entry = {'step': step, 'parameters': parameters, 'settings': self._settings, 'metrics': dict(metrics)}
      with atomic.naming(self._path), self._path.open('a') as f:
        f.write(json.dumps(entry) + '\n')
        f.flush()
        os.fsync(f.fileno())


def _read(path: pathlib.Path) -> Iterator[dict]:
  """Yields the entries of a ledger without damaged lines, whose evaluations are done again."""
  for line in path.read_bytes().splitlines() if path.exists() else ():
    with contextlib.suppress(ValueError):   # the line is not UTF-8, or not JSON
      entry = json.loads(line)
      if isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in _FIELDS.items()):
        yield entry
