"""Runs that are killed several times, at points and at any time, end as one that nothing stopped.

The lives are processes of their own, which start from a program without JAX. This file is that program too.
"""
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from helpers import as_shipped
from helpers.runs import RUN, Data

from lm import optim, train
from lm.optim import schedules
from lm.studies import chaos, lives
from lm.train.guard import Guard
from lm.workdir import tensorboard, track

STEPS = 30
# Sums over rows and devices in other orders: the relative difference of a loss after a few tens of steps, with Adam.
BOUND = 1e-5


def small(*, steps: int = STEPS) -> train.Run:
  """Returns a run with dropout, an average of the parameters, a guard, and parts of a step."""
  optimizer = optim.with_average(optim.adamw(schedules.warmup_linear(0.05, steps, 2)), 0.9)
  return dataclasses.replace(RUN, data=Data(), steps=steps, batch=16, accumulate=2, guard=Guard(window=8, most=4),
                             save_every=2, optimizer=optimizer)


def kill(subject, *tours):
  """Kills runs; a tour is `kills,place`. Prints for each life: the workdir, whether it was killed, and its faults."""
  for tour in tours:
    kills, place = tour.split(',')
    for row in chaos.kill(subject, [lives.Place.parse(place)], int(kills)):
      print(json.dumps([row.name, row.life.killed, row.faults]), flush=True)


def move(subject, *places):
  """Trains a whole run at the first place, and one that is killed after ten steps of a life and goes on at the next."""
  places = [lives.Place.parse(text) for text in places]
  subject.live('whole', places[0])
  for place in places:
    moment = None if place is places[-1] else lives.Moment(lives.STEP, 10, 0., 1, 0.)
    print(json.dumps(subject.live('moved', place, moment)), flush=True)


def rows_of(folder, function, *arguments):
  """Runs a function of this file in a program of its own, and returns what it prints."""
  root = pathlib.Path(__file__).parents[2]
  environment = os.environ | {
      'XLA_FLAGS': as_shipped.QUICK,
      'PYTHONPATH': f'{root}:{root / "tests"}', 'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  program = subprocess.run([sys.executable, __file__, str(folder), function.__name__, *arguments], env=environment,
                           text=True, capture_output=True, timeout=1800)
  assert program.returncode == 0, program.stderr[-4000:]
  return [json.loads(line) for line in program.stdout.splitlines()]


def losses(workdir, name='loss'):
  return [(row['step'], row[name]) for row in track.read_metrics(workdir / 'metrics.jsonl') if name in row]


@pytest.mark.slow
@pytest.mark.parametrize('kills, place', [
    (6, '1x2'), (1, '2x1'), pytest.param(19, '1x2', marks=pytest.mark.long)])
def test_runs_that_are_killed_end_as_whole_ones(tmp_path, kills, place):
  """In one process and in two: the state and the log bit for bit, and each record once in all files."""
  rows = rows_of(tmp_path, kill, f'{kills},{place}')
  assert sum(killed for _, killed, _ in rows) == kills
  ends = {name: faults for name, _, faults in rows if faults is not None}
  assert {name.split('-')[1] for name in ends} == {place} and not any(ends.values()), ends
  for name in ends:
    workdir, whole = tmp_path / name, tmp_path / f'whole-{name.split("-")[1]}'
    assert losses(workdir) == losses(whole) and [step for step, _ in losses(workdir)] == [*range(1, STEPS + 1)]
    evaluations = losses(workdir, 'validation/loss')
    assert evaluations == losses(whole, 'validation/loss') and [step for step, _ in evaluations] == [*range(3, 31, 3)]
    shown = tensorboard.read(workdir / 'tensorboard')
    assert shown['loss'] == [(step, np.float32(value)) for step, value in losses(workdir)]
    assert shown['validation/loss'] == [(step, np.float32(value)) for step, value in evaluations]
    assert not [*workdir.rglob('*.orbax-checkpoint-tmp*')]


@pytest.mark.slow
def test_a_run_goes_on_with_other_processes_and_devices(tmp_path):
  """Of 1 process with 8 devices, then 2 with 4 each, then 1 with 1: batches bit for bit, losses within the bound."""
  ends = [lives.Life(*row) for row in rows_of(tmp_path, move, '1x8', '2x4', '1x1')]
  assert [life.killed for life in ends] == [True, True, False]
  assert 5 < ends[0].last_step < 12 < ends[1].last_step < ends[2].last_step == STEPS
  workdir, whole = tmp_path / 'moved', tmp_path / 'whole'
  assert chaos.faults(workdir, whole, BOUND) == []
  assert len(chaos.batches(workdir)) == 16 * STEPS and all(len(rows) == 1 for rows in chaos.batches(workdir).values())
  for name in ('loss', 'grad_norm', 'validation/loss', 'skipped'):
    np.testing.assert_allclose(losses(workdir, name), losses(whole, name), rtol=BOUND)


def test_what_differs_is_a_fault(tmp_path):
  """Each kind of fault in the files of a run that was killed is named."""
  with track.Tracker(tmp_path / 'whole', 3, devices=[]) as tracker:
    for step in (1, 2, 3):
      tracker.log(step, {'loss': 1. / step})
    tracker.log(3, {'validation/loss': 2.})
  (tmp_path / 'whole' / 'ledger.jsonl').write_text('{"step": 3}\n')
  (tmp_path / 'whole' / 'batches.0').write_text(f'\n0 0 {"a" * 64}\n1 0 {"b" * 64}')

  def faults(change, bound=0.):
    shutil.rmtree(tmp_path / 'other', ignore_errors=True)
    shutil.copytree(tmp_path / 'whole', tmp_path / 'other')
    change(tmp_path / 'other')
    return chaos.faults(tmp_path / 'other', tmp_path / 'whole', bound)

  def replace(name, old, new):
    return lambda workdir: (workdir / name).write_text((workdir / name).read_text().replace(old, new))
  def log_again(step):
    return lambda workdir: track.Tracker(workdir, 3, devices=[], step=step).__exit__(None, None, None)
  assert faults(lambda workdir: None) == [] and faults(log_again(3)) == []
  assert any('loss is (1.0, 0.5000001, 0.3' in line for line in faults(replace('metrics.jsonl', '0.5', '0.5000001')))
  assert faults(replace('metrics.jsonl', '0.5', '0.50000001'), 1e-5) == []
  assert 'TensorBoard shows loss' in faults(lambda workdir: next((workdir / 'tensorboard').iterdir()).unlink())[0]
  doubled = faults(lambda workdir: (workdir / 'metrics.jsonl').write_text((workdir / 'metrics.jsonl').read_text() * 2))
  assert any('has loss at steps (1, 2, 3, 1, 2, 3), not (1, 2, 3)' in line for line in doubled)
  assert faults(replace('ledger.jsonl', '}\n', '}\n{"step": 3}\n')) == [
      'the ledger has evaluations of the steps [3, 3], not [3]']
  assert faults(replace('batches.0', 'b' * 64, 'c' * 64)) == ['batches differ']
  assert faults(lambda workdir: (workdir / 'batches.1').write_text(f'1 0 {"c" * 64}')) == ['batches differ']


if __name__ == '__main__':
  globals()[sys.argv[2]](lives.Subject(small, {}, pathlib.Path(sys.argv[1])), *sys.argv[3:])
