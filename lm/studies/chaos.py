"""Kills a run at chosen and at random moments, starts it again, and compares its end with that of a whole run."""
import json
import pathlib
import random
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from lm.studies.lives import POINTS, Life, Moment, Place, Subject
from lm.workdir import tensorboard, track

_TIMES = {'seconds', 'tokens_per_second', 'mfu'}   # metrics that differ from run to run


class Row(NamedTuple):
  """A life in the report; `faults` are those of the files at the end of a run, and None before."""
  name: str
  place: Place
  moment: Moment | None
  life: Life
  faults: list[str] | None

  def __str__(self) -> str:
    first_step = '' if self.life.first_step is None else f'{self.life.first_step:.1f}'
    verdict = '' if self.faults is None else '; '.join(self.faults) or 'as uninterrupted'
    moment = self.moment if self.life.killed else 'to its end'
    return (f'{self.name:<22} {self.place!s:>5}  {moment!s:<38} {self.life.last_step:>5} {first_step:>7} '
            f'{self.life.seconds:>7.1f}  {verdict}')


HEADER = f'{"run":<22} {"place":>5}  {"moment":<38} {"step":>5} {"first s":>7} {"all s":>7}  verdict'


def moments(seed: int) -> Iterator[Moment]:
  """Yields moments: at points in turn, and between them at times, in shares of a life."""
  rng, names = random.Random(seed), list(POINTS)
  while True:
    for name in rng.sample(names, len(names)):
      for point in (name, None):
        yield Moment(point, rng.randint(1, 3), rng.random(), rng.randrange(1 << 30), rng.uniform(0, 0.2))


def kill(subject: Subject, tour: Sequence[Place], kills: int, seed: int = 0, bound: float = 0.) -> Iterator[Row]:
  """Trains a whole run at the first place, then kills others until there are so many kills. Yields each life.

  Each life of a run is at the next place of `tour`. The files are compared at the end of each run, and, where all lives
  are at one place, so is the state, bit for bit.

  Args:
    subject: what is trained.
    tour: the places.
    kills: the number of kills.
    seed: fixes the moments.
    bound: the largest relative difference of a metric.
  """
  label = '-'.join(map(str, tour))
  whole = subject.live(f'whole-{label}', tour[0])
  yield Row(f'whole-{label}', tour[0], None, whole, None)
  # The whole life compiled programs, which later ones find.
  drawn, remaining, number, lives, seconds = moments(seed), kills, 0, 0, whole.seconds / 2
  while remaining:
    name, number, is_killed = f'killed-{label}-{number}', number + 1, True
    while is_killed:
      moment, place, lives = next(drawn) if remaining else None, tour[lives % len(tour)], lives + 1
      life = subject.live(name, place, moment and moment._replace(seconds=moment.seconds * seconds))
      is_killed, seconds = life.killed, seconds if life.killed else life.seconds
      remaining -= is_killed
      differences = None
      if not is_killed:
        differences = faults(subject.folder / name, subject.folder / f'whole-{label}', bound)
        if len(set(tour)) == 1 and subject.state(name) != subject.state(f'whole-{label}'):
          differences.append('the state differs')
      yield Row(name, place, moment and moment._replace(seconds=life.seconds), life, differences)


def summary(rows: Sequence[Row]) -> str:
  """Returns a line on all lives: kills, whole runs, those that differ, and the time until the first step."""
  killed = [row for row in rows if row.life.killed]
  ends = [row for row in rows if row.faults is not None]
  times = sorted(row.life.first_step for row in rows if row.life.first_step is not None)
  return (f'{len(killed)} kills; {len(ends)} runs came to their end, of which {sum(bool(row.faults) for row in ends)} '
          f'differ from the whole one; seconds from a start to its first step: median {times[len(times) // 2]:.1f}, '
          f'longest {times[-1]:.1f}')


def series(workdir: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
  """Returns {name: [(step, value), ...]} of the log, in its order, without the metrics of time."""
  rows: dict[str, list[tuple[int, float]]] = {}
  for row in track.read_metrics(workdir / 'metrics.jsonl'):
    for name, value in row.items():
      if name not in (*_TIMES, 'step'):
        rows.setdefault(name, []).append((row['step'], value))
  return rows


def batches(workdir: pathlib.Path) -> dict[tuple[str, ...], set[str]]:
  """Returns {(step, row): {hash, ...}} of the rows of batches in all lives; a row that is always the same has one."""
  rows: dict[tuple[str, ...], set[str]] = {}
  for path in workdir.glob('batches.*'):
    for words in map(str.split, path.read_text().splitlines()):
      if len(words) == 3 and len(words[2]) == 64:   # a kill may cut a line short
        rows.setdefault((words[0], words[1]), set()).add(words[2])
  return rows


def faults(workdir: pathlib.Path, whole: pathlib.Path, bound: float) -> list[str]:
  """Returns what differs between the files of a run that was killed and of a whole one; none if all is well.

  `bound` is the largest relative difference of a metric.
  """
  lines, logged, expected = [], series(workdir), series(whole)
  if logged.keys() != expected.keys():
    lines.append(f'the log has the metrics {sorted(logged)}, not {sorted(expected)}')
  shown = tensorboard.read(workdir / 'tensorboard')
  for name in (name for name in expected if name in logged):
    (steps, values), (expected_steps, expected_values) = zip(*logged[name]), zip(*expected[name])
    if steps != expected_steps:
      lines.append(f'metrics.jsonl has {name} at steps {steps}, not {expected_steps}')
    elif not np.allclose(np.float64(values), np.float64(expected_values), bound, 0., equal_nan=True):
      lines.append(f'{name} is {values}, not {expected_values}')
    if shown.get(name) != [(step, float(np.float32(value))) for step, value in logged[name]]:
      lines.append(f'TensorBoard shows {name} as {shown.get(name)}, and metrics.jsonl has {logged[name]}')
  entries = [json.loads(line)['step'] for line in (workdir / 'ledger.jsonl').read_text().splitlines()]
  evaluated = [step for step, _ in expected['validation/loss']]
  if len(entries) != len(set(entries)) and bound == 0. or set(entries) != set(evaluated):
    lines.append(f'the ledger has evaluations of the steps {entries}, not {evaluated}')
  if batches(workdir) != batches(whole):
    lines.append('batches differ')
  return lines
