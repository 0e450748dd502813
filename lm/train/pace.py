"""Keeps a run to its time: it leaves steps out where the machine becomes slower than planned.

The number of a step decides its batch, its learning rate and whether an evaluation follows. To leave steps out is to
skip their numbers, so that the schedule follows the share of the time that has passed. The decisions are stored in
`pace.json`, so that a run that continues from an earlier checkpoint skips the same steps.
"""
import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator

import jax

from lm.sharding import hosts
from lm.workdir import atomic

SLACK = 0.01   # steps are left out once the run is late by more than this share of all steps


class Pace:
  """Decides which steps to leave out.

  It decides a hundred times in a run, or ten times between stops where that is more often, and at most a thousand
  times, by the clock of process 0. Where a run continues, the time between its last decision and the end of the earlier
  process does not count.

  Args:
    workdir: the folder of `pace.json`.
    steps: the planned steps.
    seconds: the time that they were planned for.
    stops: multiples of these numbers are never left out, since an evaluation or a checkpoint follows them.
    start: the step to continue from.
    clock: returns the time in seconds.
  """

  def __init__(self, workdir: pathlib.Path, steps: int, seconds: float, stops: tuple[int, ...], start: int = 0,
               clock: Callable[[], float] = time.monotonic):
    self._path, self._clock, self._stops = workdir / 'pace.json', clock, stops
    self._steps, self._seconds = steps, seconds
    self._every = max(min(steps // 100, *(stop // 10 for stop in stops)), steps // 1000, 1)
    plan, rows = hosts.from_process_0(_read(self._path))   # so that all processes have the same decisions
    is_same_plan = plan == [steps, seconds]
    # Decisions: [step, the next step, the seconds until then].
    self._rows = [row for row in rows if is_same_plan or row[1] <= start]
    passed = [row for row in self._rows if row[1] <= start]
    _, self._last, self._spent = passed[-1] if passed else (0, 0, 0.)
    self._since = clock()

  @property
  def left_out(self) -> int:
    """The number of steps that were left out so far."""
    return sum(to - step for step, to, _ in self._rows if to <= self._last)

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Excludes the time of a block, such as one that compiles."""
    begin = self._clock()
    yield
    self._since += self._clock() - begin

  def next_step(self, step: int) -> int:
    """Returns the step to continue with when `step` steps have been taken: that number, or a larger one."""
    if step - self._last < self._every or any(step % stop == 0 for stop in self._stops):
      return step
    row = next((row for row in self._rows if row[0] == step), None)
    if row is None:
      row = self._decide(step)
      self._rows = [*(other for other in self._rows if other[0] < step), row]
      if jax.process_index() == 0:
        atomic.write(self._path, json.dumps([[self._steps, self._seconds], self._rows]))
    else:
      self._spent, self._since = row[2], self._clock()
    self._last = row[1]
    return row[1]

  def _decide(self, step: int) -> list:
    """Returns a decision."""
    spent = self._spent + self._clock() - self._since
    target = int(self._steps * spent / self._seconds)
    if target - step > SLACK * self._steps:
      next_stops = [-(-step // stop) * stop for stop in self._stops]
      target = min(target, self._steps, *next_stops)
    else:
      target = step
    return hosts.from_process_0([step, target, round(spent, 3)])


def _read(path: pathlib.Path) -> tuple[list | None, list]:
  """Returns the plan and the decisions of a file; None and no decisions where it does not exist or is damaged."""
  try:
    plan, rows = json.loads(path.read_text())
    return plan, [[int(step), int(to), float(seconds)] for step, to, seconds in rows]
  except FileNotFoundError:
    return None, []
  except (ValueError, TypeError) as error:
    print(f'{path} is damaged ({error}); the steps to leave out are decided again')
    return None, []
