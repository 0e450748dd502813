"""A run keeps to its minutes: on a slow machine it skips steps, and skips the same ones when it resumes."""
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from helpers.clusters import Service
from helpers.runs import RUN, go, logged, same, saved, steps_kept

from lm import optim
from lm.optim import schedules
from lm.sharding import hosts
from lm.train import budget, loop, pace
from lm.train.interrupt import Interrupt

pytestmark = pytest.mark.usefixtures('compiled_once')


class Clock:
  now = 0.

  def __call__(self):
    return self.now


def walk(workdir, seconds_of, steps=1000, seconds=1000., stops=(125,), start=0, until=None):
  """Returns (the time at the end, the steps that ran), where step n takes `seconds_of(n)`."""
  clock = Clock()
  workdir.mkdir(exist_ok=True)
  run, step, steps_taken = pace.Pace(workdir, steps, seconds, stops, start, clock), start, []
  while step < (until or steps):
    clock.now += seconds_of(step)
    steps_taken.append(step)
    later = run.next_step(step + 1)
    assert later == step + 1 or not any(step + 1 <= stop * n < later for stop in stops for n in range(steps))
    step = later
  assert run.left_out == step - start - len(steps_taken)
  return clock.now, steps_taken


@pytest.mark.parametrize('slow', [1.5, 6.])
def test_steps_are_left_out_where_they_would_take_too_long(tmp_path, slow):
  assert walk(tmp_path / 'quiet', lambda step: 1.005) == (pytest.approx(1005), list(range(1000)))
  assert walk(tmp_path / 'fast', lambda step: 0.5)[1] == list(range(1000))
  for begin, stop in ((0, 125), (300, 10), (900, 250)):
    workdir = tmp_path / str(begin)
    time, steps_taken = walk(workdir, lambda step, begin=begin: 1. if step < begin else slow, stops=(stop,))
    assert 950 < time < 1030 + 10 * slow and steps_taken[:begin] == list(range(begin))
    gaps = np.diff(steps_taken)
    assert gaps.max() < 20 * slow   # the steps that run are spread over the schedule


def test_processes_that_share_no_disk_decide_together(monkeypatch, tmp_path):
  """Process 0 has a workdir with decisions. Process 1 has an empty one, and gets the values of process 0."""
  whole = walk(tmp_path / '0', lambda step: 3. if step > 300 else 1., until=600)[1]
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  record = {'steps': 50, 'minutes': 3.}
  make = lambda steps=1000: dataclasses.replace(RUN, steps=steps, minutes=3.)
  monkeypatch.setattr(budget, 'fit', lambda make, minutes: pytest.fail('one process measures by itself'))
  service = Service()
  monkeypatch.setattr(hosts, '_client', lambda: service)
  monkeypatch.setattr(hosts, '_values', hosts.Channel('test'))
  steps = walk(tmp_path / '0', lambda step: 1., start=200)[1]
  assert budget.plan(make, (record,)).steps == 50
  assert steps[:len(whole) - 200] == [step for step in whole if step >= 200]
  monkeypatch.setattr(jax, 'process_index', lambda: 1)
  monkeypatch.setattr(hosts, '_values', hosts.Channel('test'))
  assert walk(tmp_path / '1', lambda step: 9., start=200)[1] == steps
  assert budget.plan(make, ()).steps == 50
  assert not service.values and not (tmp_path / '1' / 'pace.json').exists()


@pytest.fixture
def timed(monkeypatch):
  """Returns a function that trains 48 steps in 48 seconds by a fake clock, whose steps take three seconds from the 10th
  on.
  """
  run = {'steps': 48, 'minutes': 48 / 60, 'evaluate_every': 16, 'save_every': 8, 'keep': 99,
         'optimizer': optim.adam(schedules.warmup_linear(0.05, 48, 3))}

  def train_it(workdir, slow=3., dies=None):
    clock, steps_seen = Clock(), train_it.steps
    steps_seen.clear()

    def stop_requested(self, step):
      if step not in steps_seen:   # a step with a validation calls this more than once
        clock.now += slow if step > 10 else 1.
        steps_seen.append(step)
      if step == dies:
        raise InterruptedError('as if killed')
      return False
    monkeypatch.setattr(Interrupt, 'should_stop', stop_requested)
    monkeypatch.setattr(loop, 'Pace', functools.partial(pace.Pace, clock=clock))
    return go(workdir, **run), clock.now
  train_it.run, train_it.steps = run, []
  return train_it


def test_a_run_ends_in_time_with_its_schedule_complete(timed, tmp_path, capsys):
  result, time = timed(tmp_path)
  assert result.finished and result.step == 48 and time < 48 + 2 * 3 and 15 < result.left_out < 30
  assert f'{result.left_out} of 48 steps were left out' in capsys.readouterr().out
  rates = logged(tmp_path, 'learning_rate')
  assert len(rates) == 48 - result.left_out and list(logged(tmp_path, 'validation/loss')) == [16, 32, 48]
  schedule = schedules.warmup_linear(0.05, 48, 3)
  np.testing.assert_allclose(list(rates.values()), [float(schedule(step - 1)) for step in rates], rtol=1e-5)
  assert steps_kept(tmp_path) == [8, 16, 24, 32, 40, 48]


def test_compiling_the_evaluation_is_no_reason_to_leave_steps_out(timed, tmp_path, monkeypatch):
  clock, evaluate, calls = Clock(), loop.validation.evaluate, []

  def slow_at_first(*args):
    clock.now += 1000 if not calls else 0
    calls.append(args)
    return evaluate(*args)
  monkeypatch.setattr(loop.validation, 'evaluate', slow_at_first)
  monkeypatch.setattr(loop, 'Pace', functools.partial(pace.Pace, clock=clock))
  result = go(tmp_path, **timed.run)
  assert result.left_out == 0 and len(calls) == 3


@pytest.mark.slow
def test_a_resumed_run_skips_the_same_steps(timed, tmp_path):
  whole, _ = timed(tmp_path / 'whole')
  with pytest.raises(InterruptedError):
    timed(tmp_path / 'parts', dies=max(step for step in timed.steps if step < 32))
  decided = json.loads((tmp_path / 'parts' / 'pace.json').read_text())[1]
  (tmp_path / 'parts' / 'pace.json').write_text((tmp_path / 'whole' / 'pace.json').read_text())
  result, _ = timed(tmp_path / 'parts', slow=1.)   # on a fast machine, earlier decisions stay
  assert result.left_out == whole.left_out and any(to > step for step, to, _ in decided)
  assert logged(tmp_path / 'parts') == logged(tmp_path / 'whole')
  assert same(*(saved(tmp_path / name, **timed.run)[1] for name in ('parts', 'whole')))


def test_minutes_are_planned_once_and_follow_where_they_change(monkeypatch):
  measured = []
  monkeypatch.setattr(budget, 'fit', lambda make, minutes: measured.append(minutes) or make(30))

  def make(minutes=3., steps=None):   # as an experiment makes a run of its knobs
    return dataclasses.replace(RUN, steps=1000 if steps is None else steps, minutes=minutes if steps is None else None)
  assert budget.plan(make, ()).steps == 30 and budget.plan(make, ()).minutes == 3. and measured == [3., 3.]
  record = {'steps': 50, 'minutes': 3.}
  assert budget.plan(make, ({'steps': 7, 'minutes': 3.}, record, {})).steps == 50
  assert budget.plan(functools.partial(make, 6.), (record,)).steps == 100
  assert budget.plan(functools.partial(make, 6.), ({'steps': 50},)).steps == 50
  fixed = budget.plan(functools.partial(make, 3., 20), (record,))
  assert (fixed.steps, fixed.minutes, len(measured)) == (20, None, 2)
  # Without a measurement.
  timed = budget.plan(functools.partial(make, 6.), (record, {'steps': 20, 'minutes': None}))
  assert (timed.steps, timed.minutes, measured[2:]) == (30, 6., [6.])
