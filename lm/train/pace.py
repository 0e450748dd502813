"""A run that keeps to a time: where the machine becomes slower than its steps were planned for, steps are left out.

The number of a step decides its batch, its learning rate, and when it is evaluated. To leave steps out is to pass over
their numbers, so that the schedule follows the share of the time that is spent. What was decided is in `pace.json`, and
a run that goes on from an earlier checkpoint decides the same again.
"""
import contextlib
import json
import pathlib
import time
from collections.abc import Callable, Iterator

import jax

from lm.sharding import hosts
from lm.workdir import atomic

SLACK = 0.01   # of all steps: so much later than planned is no reason to leave steps out


class Pace:
  """Decides which steps to leave out, of `steps` that were planned for so many `seconds`.

  It decides a hundred times in a run, or ten times between stops where that is more often, but no more than a thousand
  times, by the clock of process 0. No multiple of one of `stops` is left out, for what is done after it. `start` is the
  step to go on from; the time between the last decision before it and the end of the earlier process is not counted.
  """

  def __init__(self, workdir: pathlib.Path, steps: int, seconds: float, stops: tuple[int, ...], start: int = 0,
               clock: Callable[[], float] = time.monotonic):
    self._path, self._clock, self._stops = workdir / 'pace.json', clock, stops
    self._steps, self._seconds = steps, seconds
    self._every = max(min(steps // 100, *(stop // 10 for stop in stops)), steps // 1000, 1)
    plan, rows = hosts.agreed(_read(self._path))   # else some would decide where others know the decision
    same = plan == [steps, seconds]
    self._rows = [row for row in rows if same or row[1] <= start]   # [step, the step to go on from, seconds by then]
    passed = [row for row in self._rows if row[1] <= start]
    _, self._last, self._spent = passed[-1] if passed else (0, 0, 0.)
    self._since = clock()

  @property
  def left_out(self) -> int:
    """How many steps, so far."""
    return sum(to - step for step, to, _ in self._rows if to <= self._last)

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Time inside, such as that of compiling, does not count."""
    begin = self._clock()
    yield
    self._since += self._clock() - begin

  def after(self, step: int) -> int:
    """The step to go on from after `step`: the same, or a later one."""
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
    spent = self._spent + self._clock() - self._since
    due = int(self._steps * spent / self._seconds)
    late = due - step > SLACK * self._steps
    due = min(due, self._steps, *(-(-step // stop) * stop for stop in self._stops)) if late else step
    return hosts.agreed([step, due, round(spent, 3)])


def _read(path: pathlib.Path) -> tuple[list | None, list]:
  """What was planned, and the decisions; None and none where there is no such file, or it is damaged."""
  try:
    plan, rows = json.loads(path.read_text())
    return plan, [[int(step), int(to), float(seconds)] for step, to, seconds in rows]
  except FileNotFoundError:
    return None, []
  except (ValueError, TypeError) as error:
    print(f'{path} is damaged ({error}); which steps to leave out is decided anew')
    return None, []
