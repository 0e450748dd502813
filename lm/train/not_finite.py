"""What happens at a step whose loss or gradient is not finite: what is kept of it, and how the run goes on."""
import contextlib
import json
import math
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from lm import sharding
from lm.data.batch import Batch
from lm.sharding import hosts
from lm.train.guard import GoBack
from lm.train.run import Run, State, abstract_batch, abstract_state, advance
from lm.workdir import atomic, checkpoint, records, track

FAILURES = 2   # the failures whose state and batch stay on disk
_FIELD = 'left_out_batches'   # of the records of a workdir


class NotFinite(FloatingPointError):
  """The loss or the gradient is infinite or not a number, or spikes too often.

  `step` is the number of the step where the run may go back to before it, and None where it has to stop.
  """

  def __init__(self, message: str, step: int | None = None):
    super().__init__(message)
    self.step = step


def left_out(run: Run, state: State) -> State:
  """Returns the state after a step that is left out: schedules advance, and a guard counts the step."""
  state = advance(state, 1)
  if run.guard is None:
    return state
  nan = np.float32(math.nan)
  return state._replace(seen=jax.jit(lambda history: run.guard.judge(history, nan, nan)[1])(state.seen))


def keep(workdir: pathlib.Path, step: int, state: State | None, batch: Batch, metrics: Mapping[str, float]) -> None:
  """Keeps the state before a step, its batch and its metrics in `workdir/failures/step-N`; the oldest are deleted.

  The state is None where the step has changed it. All processes of a cluster call it. A step that is kept already, with
  this batch, is left as it is; after the run went back, a step of the same number has another batch. Where the disk
  does not take it, a line says so, and nothing of it stays.

  Raises:
    OSError: in a cluster, a process cannot write its part of the state: the others wait for it.
  """
  folder = workdir / 'failures' / f'step-{step}'
  arrays = multihost_utils.process_allgather(batch, tiled=True) if jax.process_count() > 1 else batch
  if hosts.from_process_0(_is_kept(folder, arrays)):
    return
  problem = hosts.from_process_0(_keep_batch(folder, arrays) if jax.process_index() == 0 else '')
  if not problem and state is not None:
    problem = _keep_state(folder, step, state)
  if not problem and jax.process_index() == 0:
    finite = {name: value if math.isfinite(value) else str(value) for name, value in metrics.items()}
    problem = _problem(lambda: atomic.write(folder / 'failure.json', json.dumps({'step': step, 'metrics': finite},
                                                                                indent=1) + '\n'))
  if jax.process_index() == 0:
    for unwanted in [folder] if problem else sorted(_folders(workdir), key=_number)[:-FAILURES]:
      shutil.rmtree(unwanted, ignore_errors=True)
  if problem:
    print(f'step {step} is not kept for a replay: {problem}')


def steps_left_out(workdir: pathlib.Path, start: int) -> list[int]:
  """Returns the steps up to `start` that were not finite, by the log of process 0; all processes call it."""
  rows = track.read_metrics(workdir / 'metrics.jsonl') if start and jax.process_index() == 0 else []
  return hosts.from_process_0([row['step'] for row in rows if row['step'] <= start
                               and None in (row.get('loss', 0.), row.get('grad_norm', 0.))])


def _is_kept(folder: pathlib.Path, batch: Batch) -> bool:
  """Returns whether a step is kept with this batch. Damaged files, which raise errors of any type, do not count."""
  if not (folder / 'failure.json').exists():
    return False
  with contextlib.suppress(Exception), np.load(folder / 'batch.npz') as stored:
    return all(np.array_equal(stored[f'arr_{i}'], np.asarray(leaf)) for i, leaf in enumerate(jax.tree.leaves(batch)))
  return False


def _keep_batch(folder: pathlib.Path, batch: Batch) -> str:
  def write():
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    np.savez(folder / 'batch.npz', *map(np.asarray, jax.tree.leaves(batch)))
  return _problem(write)


def _keep_state(folder: pathlib.Path, step: int, state: State) -> str:
  def write():
    with checkpoint.Checkpoints(folder / 'state', keep=1) as checkpoints:
      checkpoints.save(step - 1, state, {'objective': None})
  problem = _problem(write)
  if problem and jax.process_count() > 1:
    raise OSError(f'step {step} cannot be kept for a replay: {problem}')
  return problem


def _problem(write: Callable[[], None]) -> str:
  """Calls a function that writes. Returns the message of its OSError, '' where there is none."""
  try:
    write()
    return ''
  except OSError as error:
    return str(error)


def steps_kept(workdir: pathlib.Path) -> list[int]:
  """Returns the steps that `keep` has kept, in order."""
  return sorted(_number(folder) for folder in _folders(workdir) if (folder / 'failure.json').exists())


def load(run: Run, workdir: pathlib.Path, mesh: jax.sharding.Mesh, step: int) -> tuple[State | None, Batch]:
  """Returns the state before a step that was kept, and its batch.

  The state is None where it was not kept, or its parameters are not finite. The step is one of `steps_kept`.

  Raises:
    ValueError: a file of the step is damaged.
  """
  folder = workdir / 'failures' / f'step-{step}'
  advice = f'remove {folder}, and the step is computed again from the last checkpoint'
  structure = jax.tree.structure(abstract_batch(run, mesh))
  try:
    with np.load(folder / 'batch.npz') as stored:
      batch = jax.tree.unflatten(structure, [stored[f'arr_{i}'] for i in range(structure.num_leaves)])
  except Exception as error:   # damaged files raise errors of any type
    raise ValueError(f'{folder / "batch.npz"} is damaged ({error}); {advice}') from error
  rows = sharding.local_rows(len(batch.tokens), mesh)
  batch = sharding.shard_rows(jax.tree.map(lambda x: x[rows.start:rows.stop], batch), mesh)
  if not (folder / 'state').exists():
    return None, batch
  try:
    with checkpoint.Checkpoints(folder / 'state', create=False) as checkpoints:
      return checkpoints.restore(abstract_state(run, mesh)).state, batch
  except OSError as error:
    if 'not finite' in str(error):
      return None, batch
    raise ValueError(f'the state of step {step} cannot be read ({error}); {advice}') from error


class LeftOutBatches:
  """The batches that a run leaves out because it went back, as its workdir records them for process 0.

  All processes of a cluster have to make one.

  Attributes:
    entries: (step, count): from that step on, the run reads `count` batches further than before.
  """

  def __init__(self, workdir: pathlib.Path):
    self._workdir = workdir
    stored = [record[_FIELD] for record in records.read(workdir) if _FIELD in record]
    # Processes that read different batches would train on parts of different steps, without an error.
    self.entries: Sequence[Sequence[int]] = hosts.from_process_0(stored[-1] if stored else [])

  @property
  def total(self) -> int:
    return sum(count for _, count in self.entries)

  def index(self, step: int) -> int:
    """Returns the number of the batch of a step, where `step` is the number of steps before it."""
    return step + sum(count for first, count in self.entries if step >= first)

  def go_back(self, policy: GoBack, error: NotFinite, step: int) -> None:
    """Records that the run goes back to `step`, and leaves out the batches from there to the one that failed.

    Raises:
      NotFinite: the run went back as often as it may.
    """
    if len(self.entries) >= policy.most:
      raise NotFinite(f'{error}. The run has gone back {len(self.entries)} times, which is all it may') from error
    count = error.step - step + policy.further
    self.entries = [*self.entries, [step, count]]
    records.add(self._workdir, **{_FIELD: self.entries})
    print(f'{error}\ngoing back to step {step}: the next {count} batches, up to the one of step {error.step}'
          f'{f" and {policy.further} more" if policy.further else ""}, are left out')


def _folders(workdir: pathlib.Path) -> list[pathlib.Path]:
  return [path for path in (workdir / 'failures').glob('step-*') if re.fullmatch(r'step-\d+', path.name)]


_number: Callable[[pathlib.Path], int] = lambda folder: int(folder.name.removeprefix('step-'))


def advice(step: int) -> str:
  """Returns how to find out why a step is not finite."""
  return f'--replay={step}, added to the same command, names the first module that is not finite'
