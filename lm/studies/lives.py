"""Lives of a run: processes of its own that train it, and that `kill -9` ends at a chosen moment."""
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import signal
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from lm import launch, sharding, train
from lm.train import feed, loop, validation
from lm.workdir import atomic, checkpoint, records, storage, tensorboard, track
from lm.workdir.ledger import Ledger

PATIENCE = 600   # seconds until the first step of a life
STEP = 'after a step'
# Points at which a process may die: before or after the calls of a function.
POINTS: dict[str, tuple[Any, str, bool]] = {
    'before the run has its record': (records, 'add', True),
    'before a file is replaced': (atomic.os, 'replace', True),
    'before the log is repaired': (track.Tracker, '_repair', True),
    'before a restore': (checkpoint.Checkpoints, '_read', True),
    STEP: (loop, 'make_step', False),   # a call of what it returns
    'inside an evaluation': (validation, 'evaluate', False),
    'after an evaluation': (Ledger, 'add', True),
    'after the ledger': (Ledger, 'add', False),
    'inside a record of the log': (tensorboard.TensorBoard, 'write', True),
    'before a save': (checkpoint.Checkpoints, 'save', True),
    'inside a save': (storage.Storage, '_write_checksums', True),
    'at the end of a save': (storage.Storage, '_write_checksums', False),
    'before old checkpoints are deleted': (storage.Storage, 'should_preserve', False),
}


class Place(NamedTuple):
  """Where a run lives for a while."""
  processes: int
  devices: int   # of each process

  @classmethod
  def parse(cls, text: str) -> 'Place':
    """Returns the place of a text such as `2x4`. Raises ValueError where it is none."""
    sizes = text.split('x')
    if len(sizes) != 2 or not all(size.isdigit() and int(size) for size in sizes):
      raise ValueError(f'{text!r} is no place; give processes x devices of each, such as 2x4')
    return cls(*map(int, sizes))

  def __str__(self) -> str:
    return f'{self.processes}x{self.devices}'


class Moment(NamedTuple):
  """When a process dies: after a time, or at the `count`-th call of a point. Its peers die `delay` seconds later."""
  point: str | None
  count: int
  seconds: float
  process: int   # modulo the number of processes
  delay: float

  def __str__(self) -> str:
    return f'{self.seconds:.2f} s' if self.point is None else f'{self.point}, {self.count}'


class Life(NamedTuple):
  """A life of a run.

  Attributes:
    killed: whether it was killed; otherwise the run came to its end.
    seconds: how long it lasted.
    first_step: the seconds until its first step was done; None where there was none.
    last_step: the last step in the log when it ended.
  """
  killed: bool
  seconds: float
  first_step: float | None
  last_step: int


@dataclasses.dataclass(frozen=True)
class Subject:
  """What is killed: an experiment, see `launch`, with the values of its flags, and the folder for its workdirs."""
  experiment: Callable[..., train.Run]
  knobs: dict[str, Any]
  folder: pathlib.Path

  def live(self, name: str, place: Place, moment: Moment | None = None) -> Life:
    """Trains in the workdir `name` until the moment, or to the end.

    Raises RuntimeError, with the end of its output, where a process ends by itself before the end of the run.
    """
    workdir, output, first_step = (self.folder / f'{name}{end}' for end in ('', '.log', '.first_step'))
    workdir.mkdir(parents=True, exist_ok=True)
    output.write_text('')
    first_step.unlink(missing_ok=True)
    victim, address, start = moment.process % place.processes if moment else None, _free_address(), time.monotonic()
    processes = [_start(_train, self, workdir, output, first_step, place, address, rank,
                        moment if rank == victim else None) for rank in range(place.processes)]
    try:
      killed = _await(processes, victim, moment, start, first_step)
    except RuntimeError as error:
      raise RuntimeError(f'{name}, {moment or "to its end"}: {error}; its output ends:\n'
                         + output.read_text()[-4000:]) from None
    finally:
      for process in processes:
        process.kill()
        process.join()
    return Life(killed, time.monotonic() - start,
                float(first_step.read_text()) - start if first_step.exists() else None, last_step(workdir))

  def state(self, name: str) -> dict[str, str]:
    """Returns the step of the newest checkpoint in the workdir `name`, and a hash of each of its arrays."""
    result = self.folder / f'{name}.state'
    process = _start(_write_state, self, self.folder / name, result)
    process.join()
    if process.exitcode:
      raise RuntimeError(f'the checkpoint of {name} cannot be read; see the error above')
    return json.loads(result.read_text())


def last_step(workdir: pathlib.Path) -> int:
  """Returns the last step in the log of a workdir; 0 where there is none."""
  log = workdir / 'metrics.jsonl'
  return max((row['step'] for row in track.read_metrics(log)), default=0) if log.exists() else 0


def _start(function: Callable[..., Any], *arguments: Any) -> multiprocessing.process.BaseProcess:
  """Starts a process that calls a function. It is forked from a server that has imported this module."""
  context = multiprocessing.get_context('forkserver')
  context.set_forkserver_preload(['__main__', 'lm.studies.lives', 'orbax.checkpoint'])
  process = context.Process(target=function, args=arguments)
  process.start()
  return process


def _await(processes: Sequence[multiprocessing.process.BaseProcess], victim: int | None, moment: Moment | None,
           start: float, first_step: pathlib.Path) -> bool:
  """Waits for processes, and kills one where its moment comes. Returns whether it was killed; its peers are not yet.

  Raises RuntimeError where a process ends by itself, and not at the end of the run, or no step is done in time.
  """
  while any(process.exitcode != 0 for process in processes):
    seconds = time.monotonic() - start
    if moment and moment.point is None and seconds >= moment.seconds:
      processes[victim].kill()
    if moment and processes[victim].exitcode == -signal.SIGKILL:
      time.sleep(moment.delay)
      return True
    codes = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
    if codes and not (moment and _dies(processes[victim])):
      raise RuntimeError(f'processes ended with the codes {codes}, after {seconds:.0f} s')
    if seconds > PATIENCE and not first_step.exists():
      raise RuntimeError(f'no step was done in {PATIENCE} s')
    time.sleep(0.01)
  return False


def _dies(process: multiprocessing.process.BaseProcess) -> bool:
  """Whether a process has just been killed: a peer may notice that first."""
  process.join(1)
  return process.exitcode == -signal.SIGKILL


def _train(subject: Subject, workdir: pathlib.Path, output: pathlib.Path, first_step: pathlib.Path, place: Place,
           address: str, rank: int, moment: Moment | None) -> None:
  """Trains in this process."""
  with output.open('a', buffering=1) as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  for name, value in {'jax_num_cpu_devices': place.devices, 'jax_compilation_cache_dir': str(subject.folder / 'cache'),
                      'jax_persistent_cache_min_compile_time_secs': 0.}.items():
    jax.config.update(name, value)
  if place.processes > 1:
    sharding.join(address, place.processes, rank)
  _watch_steps(first_step, moment)
  _watch_batches(workdir / f'batches.{rank}')
  if moment and moment.point not in (None, STEP):
    _arm(moment)
  launch.start(subject.experiment, subject.knobs, workdir, sharding.make_mesh())


class _Fuse:
  """Kills this process at the `count`-th call."""

  def __init__(self, count: int):
    self._remaining = count

  def __call__(self) -> None:
    self._remaining -= 1
    if self._remaining == 0:
      os.kill(os.getpid(), signal.SIGKILL)


def _arm(moment: Moment) -> None:
  """Replaces the function of a point by one that dies at a call."""
  owner, name, is_before = POINTS[moment.point]
  function, fuse = getattr(owner, name), _Fuse(moment.count)

  @functools.wraps(function)
  def call(*args, **kwargs):
    if is_before:
      fuse()
    result = function(*args, **kwargs)
    if not is_before:
      fuse()
    return result
  setattr(owner, name, call)


def _watch_steps(first_step: pathlib.Path, moment: Moment | None) -> None:
  """Replaces the function of a step by one that writes the time of the first one, and that dies after a step."""
  make_step = loop.make_step
  fuse = _Fuse(moment.count if moment and moment.point == STEP else 0)

  def make(run):
    step = make_step(run)

    def call(*args):
      result = jax.block_until_ready(step(*args))
      with contextlib.suppress(FileExistsError), first_step.open('x') as file:
        file.write(str(time.monotonic()))
      fuse()
      return result
    call.lower = step.lower   # the loop compiles the step before it calls it
    return call
  loop.make_step = make


def _watch_batches(path: pathlib.Path) -> None:
  """Makes feeds add to a file, for each row of each batch: the step, the number of the row, and a hash of its bytes."""
  read = feed.DataFeed.__call__

  def call(self, step, state):
    batch, rows = read(self, step, state), {}
    for leaf in jax.tree.leaves(batch):
      shards = {shard.index[0].indices(leaf.shape[0])[0]: np.asarray(shard.data) for shard in leaf.addressable_shards}
      for start, data in shards.items():
        for i, row in enumerate(data):
          rows.setdefault(start + i, hashlib.sha256()).update(row.tobytes())
    with path.open('a') as file:
      file.write(''.join(f'\n{step} {row} {digest.hexdigest()}' for row, digest in rows.items()))
    return batch
  feed.DataFeed.__call__ = call


def _write_state(subject: Subject, workdir: pathlib.Path, result: pathlib.Path) -> None:
  run, mesh = train.build(subject.experiment(**subject.knobs)), sharding.make_mesh()
  with jax.set_mesh(mesh), checkpoint.Checkpoints(workdir / 'checkpoints', create=False) as checkpoints:
    restored = checkpoints.restore(train.abstract_state(run, mesh))
  hashes = {jax.tree_util.keystr(path): hashlib.sha256(np.asarray(x).tobytes()).hexdigest()
            for path, x in jax.tree_util.tree_leaves_with_path(restored.state)}
  result.write_text(json.dumps({'step': restored.step, **hashes}))


def _free_address() -> str:
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return f'localhost:{free.getsockname()[1]}'
