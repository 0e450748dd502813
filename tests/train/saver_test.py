"""A save that fails is made again; where it fails for good, training ends with the reason, and nothing is lost."""
import errno
import gc
import itertools
import os
import threading
import time

import jax
import numpy as np
import pytest
from helpers.faults import failing, faults
from helpers.runs import go, same, saved, steps_kept
from helpers.slow import slow

from lm.train import saver
from lm.workdir import checkpoint

# Orbax leaves coroutines of a save that failed, which Python reports when it removes them.
pytestmark = [pytest.mark.usefixtures('compiled_once', 'removes_coroutines'),
              pytest.mark.filterwarnings('ignore:coroutine .* was never awaited:RuntimeWarning')]

# Calls during a save, before and after it returns, and the paths that they are given.
CALLS = {'folder': ('makedirs', r'/{}\.orbax[^/]*$'), 'facts': ('open', r'/{}\.orbax.*/facts.*/metadata$'),
         'checksums': ('open', r'/{}\.orbax[^/]*/checksums.json$'), 'name': ('rename', r'/{}\.orbax[^/]*$'),
         'listing': ('listdir', r'/{}\.orbax[^/]*/state$')}


def state(step):
  return {'params': {'w': np.arange(8.) + step}, 'count': np.int32(step)}


@pytest.fixture
def removes_coroutines():
  gc.freeze()   # the collection looks only through what the test has made
  yield
  gc.collect()
  gc.unfreeze()


@pytest.fixture
def train(tmp_path, monkeypatch):
  """Returns a function that saves every second step, like the loop of training, and returns the steps it tried."""
  seconds = []
  monkeypatch.setattr(saver, '_wait', seconds.append)

  def run(steps):
    tried = []
    with checkpoint.Checkpoints(tmp_path, keep=99) as checkpoints:
      first = max(checkpoints.steps(), default=0)
      saves = saver.Saver(checkpoints, first)

      def start(step):
        tried.append(step)
        checkpoints.save(step, state(step), {'step': step})

      for step in range(first + 1, steps + 1):
        while not checkpoints.is_finished():
          time.sleep(1e-3)
        saves.check(step)
        if step % 2 == 0 or saves.is_due(step):
          saves.save(step, lambda step=step: start(step))
      saves.finish(steps, lambda: start(steps))
    return tried

  run.seconds = seconds
  return run


def assert_good(folder, step):
  restored = checkpoint.Checkpoints(folder, create=False).restore(jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0)))
  assert restored.step == step and restored.facts == {'step': step}
  assert all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (restored.state, state(step))), strict=True))


@pytest.mark.parametrize('call', ['checksums', 'name', *slow('folder', 'facts', 'listing')])
def test_what_fails_once_is_saved_at_a_later_step(train, tmp_path, caplog, capfd, call):
  name, pattern = CALLS[call]
  with faults(name, pattern.format(2), failing(errno.ENOSPC)):
    tried = train(5)
  assert tried[0] == 2 and 2 not in steps_of(tmp_path) and max(steps_of(tmp_path)) >= 4
  assert_good(tmp_path, max(steps_of(tmp_path)))
  output = capfd.readouterr().err + caplog.text
  assert 'the disk is full' in output and 'attempt 2 of 5 follows at step' in output and 'Traceback' not in output


@pytest.mark.parametrize('call', ['name', *slow('folder')])
def test_what_fails_for_good_ends_training_and_harms_nothing(train, tmp_path, call):
  train(2)
  name, pattern = CALLS[call]
  fault = failing(errno.EROFS)
  message = (r'Read-only file system.*it was tried 5 times, and training ends at step \d+.*'
             r'newest checkpoint is of step 2: .* give the same command again')
  with faults(name, pattern.format(r'\d+'), fault), pytest.raises(OSError, match=message):
    train(100)
  assert steps_of(tmp_path) == [2]
  assert_good(tmp_path, 2)
  assert fault.calls == saver.ATTEMPTS and not train.seconds


@pytest.mark.parametrize('times', [1, *slow(3)])
def test_the_last_save_is_repeated_after_seconds(train, tmp_path, times):
  name, pattern = CALLS['name']
  with faults(name, pattern.format(4), failing(errno.EIO, times)):
    assert train(4) == [2] + [4] * (times + 1)
  assert train.seconds == [1, 2, 4][:times]
  assert_good(tmp_path, 4)


def test_a_slow_save_does_not_keep_the_steps_waiting(tmp_path):
  finish = threading.Event()
  name, pattern = CALLS['name']
  with faults(name, pattern.format(2), finish.wait), checkpoint.Checkpoints(tmp_path) as checkpoints:
    saves = saver.Saver(checkpoints, 0)
    saves.save(2, lambda: checkpoints.save(2, state(2), {'step': 2}))
    for step in range(3, 9):
      saves.check(step)
    assert not (tmp_path / '2').exists()
    finish.set()
  assert_good(tmp_path, 2)


@pytest.mark.slow
def test_a_clock_that_jumps_changes_nothing(train, tmp_path, monkeypatch):
  """It jumps by days during a save, and back during the next one, and the files of newer steps have older times."""
  clock, jumps = time.time, itertools.chain([1e6], itertools.repeat(-1e6))
  offset = [0.]
  monkeypatch.setattr(time, 'time', lambda: clock() + offset[0])
  name, pattern = CALLS['facts']
  with faults(name, pattern.format(r'\d+'), lambda: offset.__setitem__(0, next(jumps))):
    train(8)
  for step in steps_of(tmp_path):
    os.utime(tmp_path / str(step), (clock() - 1e6 * step,) * 2)
  assert_good(tmp_path, 8)


def test_a_run_whose_saves_fail_loses_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(saver, '_wait', lambda seconds: None)
  go(tmp_path / 'whole')
  name, pattern = CALLS['name']
  with faults(name, pattern.format('2'), failing(errno.EIO)):
    assert go(tmp_path / 'once').finished
  fails = pytest.raises(OSError, match='disk is full.*newest checkpoint is of step 2')
  with faults(name, pattern.format('[3-9]'), failing(errno.ENOSPC)), fails:
    go(tmp_path / 'ended')
  assert steps_kept(tmp_path / 'ended') == [2]
  assert go(tmp_path / 'ended').finished
  for name in 'once', 'ended':
    assert same(saved(tmp_path / name)[1], saved(tmp_path / 'whole')[1])


def test_a_last_step_that_is_saved_is_not_saved_again_where_an_older_one_cannot_be_deleted(tmp_path):
  with faults('rmtree', '/3$', failing(errno.EIO, 1)):
    assert go(tmp_path, save_every=3, keep=1).finished
  assert max(steps_kept(tmp_path)) == 6


def test_permanent_checkpoints_are_never_deleted(tmp_path):
  changes = {'save_every': 4, 'evaluate_every': 99, 'keep': 1}
  go(tmp_path, keep_every=3, **changes)
  assert steps_kept(tmp_path) == [3, 6]
  go(tmp_path, steps=9, **changes)   # also when no more are asked for
  assert steps_kept(tmp_path) == [3, 6, 9]


def test_the_save_that_follows_a_permanent_one_that_failed_is_permanent(tmp_path, monkeypatch):
  save, fault = checkpoint.Checkpoints.save, failing(errno.EIO)

  def fails_at_3(self, step, *args, **kwargs):
    if step == 3:
      fault()
    save(self, step, *args, **kwargs)
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', fails_at_3)
  go(tmp_path, keep_every=3, save_every=5, evaluate_every=99, keep=1)
  assert fault.calls == 1 and steps_kept(tmp_path) == [4, 6]   # not 5


def steps_of(folder):
  return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
