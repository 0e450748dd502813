"""Logs metrics to the terminal, JSONL and TensorBoard.

A workdir holds `metrics.jsonl` (one line for each record) and `tensorboard/`. The terminal and `plot` know these
metrics by name: `loss`, `learning_rate`, `validation/loss`, `validation/bits_per_byte`. Losses are in nats per token.
"""
import contextlib
import json
import math
import os
import pathlib
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TextIO

import jax

from lm.workdir import atomic
from lm.workdir.tensorboard import TensorBoard
from lm.workdir.throughput import Throughput, mfu


class Phases(dict[str, float]):
  """Seconds of wall time by phase: `with phases('tokenise'): ...`. Times of a phase that is entered again are added."""

  @contextlib.contextmanager
  def __call__(self, name: str) -> Iterator[None]:
    start = time.monotonic()
    try:
      yield
    finally:
      self[name] = self.get(name, 0.0) + time.monotonic() - start


_SHOWN: dict[str, Callable[[float], str]] = {
    'loss': 'loss {:.3f}'.format,
    'preference/accuracy': '{:.0%} right'.format,
    'preference/margin': 'margin {:.3f}'.format,
    'validation/loss': 'val {:.3f}'.format,
    'validation/bits_per_byte': '{:.3f} bits/byte'.format,
    'validation/preference/accuracy': 'val {:.0%} right'.format,
    'validation/preference/margin': 'val margin {:.3f}'.format,
    'learning_rate': lambda value: 'lr ' + f'{value:.1e}'.replace('e-0', 'e-').replace('e+00', ''),
    'skipped': '{:.0f} skipped'.format,
    'tokens_per_second': lambda value: f'{_short(value)} tok/s',
    'mfu': 'MFU {:.0%}'.format,
}


class Tracker(contextlib.AbstractContextManager):
  """Logs the metrics of one run to `folder`. Processes other than the first only measure, and write nothing.

  Args:
    folder: the workdir.
    total_steps: the last step.
    tokens_before: returns how many tokens the run has read when it reaches a step; without it there is no throughput.
    flops_per_token: returns the FLOPs per token of a step, forward and backward; without it there is no MFU.
    devices: the devices that the run uses, for the MFU; by default all.
    step: the step from which the run resumes. Later records (all, if it is 0) are dropped, as the run logs them again.
    records: the records of that step from the checkpoint; those that the file has lost are written again.
    shown: further metrics of evaluations that a line has, such as the one that chooses the best checkpoint.
    every: seconds between lines if the output is not a terminal. Each evaluation prints a line anyway.
  """

  def __init__(self, folder: pathlib.Path, total_steps: int, *, tokens_before: Callable[[int], int] | None = None,
               flops_per_token: Callable[[int], float] | None = None, devices: Sequence[Any] | None = None,
               step: int = 0, records: Sequence[Mapping[str, Any]] = (), shown: Sequence[str] = (), every: float = 15.0,
               output: TextIO | None = None, clock: Callable[[], float] = time.monotonic):
    self.throughput = Throughput(tokens_before or (lambda step: 0), total_steps, clock=clock)
    self._total, self._flops, self._every, self._clock = total_steps, flops_per_token, every, clock
    self._devices = jax.devices() if devices is None else devices
    self._output = sys.stdout if output is None else output
    self._live = self._output.isatty()
    self._latest: dict[str, float] = {}
    self._validated: int | None = None   # the step of the latest metrics under `validation/`
    self._start, self._printed, self._pending = clock(), -math.inf, False
    self._records, self._shown = list(records), [name for name in shown if name not in _SHOWN]
    self._path, self._jsonl = folder / 'metrics.jsonl', None
    if jax.process_index() == 0:
      folder.mkdir(parents=True, exist_ok=True)
      self._repair(step)
      self._jsonl = self._path.open('a')
      self._tensorboard = TensorBoard(folder / 'tensorboard', step)
      for record in self._records:
        self._tensorboard.write(step, _metrics(record))

  def pause(self) -> contextlib.AbstractContextManager[None]:
    """Excludes the time inside, such as of evaluation and checkpoints, from training time."""
    return self.throughput.pause()

  def log(self, step: int, metrics: Mapping[str, float]) -> None:
    """Logs one record. A record with `loss` belongs to a training step, and counts for the throughput."""
    metrics = {name: float(value) for name, value in metrics.items()}
    if 'loss' in metrics:
      self.throughput.update(step)
      speed = self.throughput.tokens_per_second
      if speed:
        metrics['tokens_per_second'] = speed
      utilisation = mfu(self._flops(step), speed, self._devices) if speed and self._flops else None
      if utilisation:
        metrics['mfu'] = utilisation
    if self._jsonl is None:
      return
    # JSON has neither inf nor NaN; null keeps the line readable by all tools.
    finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
    seconds = round(self._clock() - self._start, 3)
    is_logged = any(record.keys() >= finite.keys() for record in self._of_step(step))
    if not is_logged:   # an earlier process may have died after it had logged the evaluation of a checkpoint
      record = {'step': step, 'seconds': seconds, **finite}
      self._records = [*self._of_step(step), record]
      with atomic.naming(self._path):
        self._jsonl.write(json.dumps(record, allow_nan=False) + '\n')
        self._jsonl.flush()
      self._tensorboard.write(step, finite)
    self._latest.update(metrics)
    milestone = any(name.startswith('validation/') for name in metrics)
    self._validated = step if milestone else self._validated
    self._print(step, milestone)

  def commit(self, step: int) -> list[Mapping[str, Any]]:
    """Returns the records of `step`, the last one that was logged, when all records so far are on disk.

    A run that continues from the checkpoint of a step logs no step until there again.
    """
    if self._jsonl is not None:
      with atomic.naming(self._path):
        os.fsync(self._jsonl.fileno())
      self._tensorboard.sync()
    return self._of_step(step)

  def _of_step(self, step: int) -> list[Mapping[str, Any]]:
    return [record for record in self._records if record['step'] == step]

  def line(self, step: int) -> str:
    """Returns the line for the terminal. It has validation metrics only if they belong to this step."""
    shown = [name for name in _SHOWN if name in self._latest
             and (step == self._validated or not name.startswith('validation/'))]
    sets = {name.split('/', 1)[1].removesuffix('/loss'): value for name, value in self._latest.items()
            if step == self._validated and name.startswith('validation/') and name.endswith('/loss')}
    parts = [f'step {step}/{self._total}', *(_SHOWN[name](self._latest[name]) for name in shown),
             *(f'{name} {value:.3f}' for name, value in sets.items() if name != 'loss'),
             *(f'{name} {self._latest[name]:.4g}' for name in self._shown
               if step == self._validated and name in self._latest)]
    eta = self.throughput.eta
    return '  '.join(parts if eta is None or step >= self._total else [*parts, f'ETA {_duration(eta)}'])

  def _print(self, step: int, milestone: bool) -> None:
    now = self._clock()
    if not milestone and now - self._printed < (0.2 if self._live else self._every):
      return
    self._printed = now
    self._pending = self._live and not milestone
    line = self.line(step)
    if self._live:  # '\x1b[K' clears the end of a longer line
      line = f'\r{line[:shutil.get_terminal_size().columns - 1]}\x1b[K'
    print(line, end='' if self._pending else '\n', file=self._output, flush=True)
    self._tensorboard.flush()

  def __exit__(self, *error: Any) -> None:
    if self._pending:
      print(file=self._output)
    if self._jsonl is not None:
      with contextlib.suppress(OSError) if error[0] else contextlib.nullcontext():   # raise the first error
        try:
          self._tensorboard.close()
        finally:
          self._jsonl.close()

  def _repair(self, step: int) -> None:
    """Removes damaged lines and records after `step`; adds the records of `step` that the file has lost."""
    stored, damaged = _read(self._path) if self._path.exists() else ([], 0)
    stored = [record for record in stored if step > 0 and record['step'] <= step]
    lost = [record for record in self._of_step(step) if record not in stored]
    if damaged:
      print(f'{self._path}: {damaged} lines could not be read, and are left out', file=self._output, flush=True)
    atomic.write(self._path, ''.join(json.dumps(record) + '\n' for record in (*stored, *lost)))
    self._records = [record for record in (*stored, *lost) if record['step'] == step]


def read_metrics(metrics_jsonl: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records of a metrics file without damaged lines, such as one that a kill cut short."""
  return _read(metrics_jsonl)[0]


def _read(metrics_jsonl: pathlib.Path) -> tuple[list[dict[str, Any]], int]:
  """Returns the records, and the number of damaged lines."""
  lines, records = metrics_jsonl.read_bytes().splitlines(), []
  for line in lines:
    with contextlib.suppress(ValueError):   # the line is not UTF-8, or not JSON
      record = json.loads(line)
      if (isinstance(record, dict) and all(isinstance(value, int | float | None) for value in record.values())
          and isinstance(record.get('step'), int)):
        records.append(record)
  return records, len(lines) - len(records)


def _metrics(record: Mapping[str, Any]) -> dict[str, Any]:
  return {name: value for name, value in record.items() if name not in ('step', 'seconds')}


def _short(number: float) -> str:
  # The exponent is that of the rounded number, so that 999.9 is 1k.
  exponent = int(f'{number:.2e}'.partition('e')[2])
  unit = min(max(exponent // 3, 0), 3)
  return f'{number / 1000**unit:.3g}{("", "k", "M", "G")[unit]}'


def _duration(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
