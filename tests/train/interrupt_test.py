"""Signals that arrive while the main thread computes: in a part of a step, in an evaluation, and while XLA compiles."""
import ctypes
import dataclasses
import os
import signal
import threading

import jax
import pytest
from helpers.faults import faults
from helpers.meshes import mesh_of
from helpers.runs import RUN, Bigram, go, logged, same, saved, steps_kept

from lm import exits, train
from lm.data.rows.stages import Stage
from lm.train import gradient, loop
from lm.train.interrupt import Interrupt
from lm.workdir import checkpoint, records

pytestmark = pytest.mark.usefixtures('compiled_once', 'hears_hangup')


def terminate():
  os.kill(os.getpid(), signal.SIGTERM)


class Parts:
  """Counts the parts of steps down to the one in which the process gets a signal."""
  until_signal = 0

  @classmethod
  def count(cls):
    cls.until_signal -= 1
    if cls.until_signal == 0:
      terminate()


def counted(loss, params, batch, key, parts):
  def counted_loss(params, part, key):
    jax.debug.callback(Parts.count)
    return loss(params, part, key)
  return gradient.accumulate_gradients(counted_loss, params, batch, key, parts)


@pytest.fixture
def ended(monkeypatch):
  """Records the exit codes of the process, which goes on; `ended.event` is set at the first."""
  codes = type('Codes', (list,), {'event': threading.Event()})()
  codes.hook = lambda: None

  def at_once(code):
    codes.hook()
    codes.append(code)
    codes.event.set()
  monkeypatch.setattr(exits, 'at_once', at_once)
  monkeypatch.setattr(Interrupt, 'patience', 0.)
  return codes


@pytest.mark.slow   # a program with a callback is compiled anew for each run
def test_a_signal_within_an_accumulated_step_saves_after_all_its_parts(tmp_path, monkeypatch):
  changes = {'accumulate': 4, 'save_every': 10 ** 9, 'gradient': counted}
  assert go(tmp_path / 'whole', **changes).finished
  monkeypatch.setattr(Parts, 'until_signal', 6)   # in the second of four parts of the second step
  result = go(tmp_path / 'parts', **changes)
  assert not result.finished and result.signal == signal.SIGTERM and steps_kept(tmp_path / 'parts') == [result.step]
  assert result.step >= 2
  assert go(tmp_path / 'parts', **changes).finished
  assert same(saved(tmp_path / 'parts')[1], saved(tmp_path / 'whole')[1])
  assert logged(tmp_path / 'parts') == logged(tmp_path / 'whole')


def test_a_signal_in_an_evaluator_that_does_not_return_saves_the_step(tmp_path, ended):
  steps_at_end = []

  def stuck(run, data, mesh):
    def evaluator(params, step):
      if step == 3 and not ended:
        terminate()
        assert ended.event.wait(20)
        raise InterruptedError('as if ended')
      return {'step': step}
    return evaluator

  ended.hook = lambda: steps_at_end.extend(steps_kept(tmp_path / 'run'))
  changes = {'evaluators': {'own': stuck}, 'save_every': 10 ** 9}
  with pytest.raises(InterruptedError):
    go(tmp_path / 'run', **changes)
  assert ended == [128 + signal.SIGTERM] and steps_at_end == [3]
  assert go(tmp_path / 'run', **changes).finished
  go(tmp_path / 'whole', **changes)
  assert same(saved(tmp_path / 'run')[1], saved(tmp_path / 'whole')[1])
  for name in ('loss', 'validation/loss', 'own/step'):
    assert logged(tmp_path / 'run', name) == logged(tmp_path / 'whole', name)


@pytest.mark.parametrize('last_step', [0, 2])
def test_a_signal_while_a_step_compiles_saves_what_there_is(tmp_path, ended, monkeypatch, last_step):
  """Before the first step, there is nothing. Later, a stage with another shape of batches compiles again.

  The save of the last step is still in progress then, and goes on once the process waits for it, or ends.
  """
  stages, original = (Stage(2, 4, 16),), loop.make_step
  shapes, steps_at_end, goes_on, wait = [], [], threading.Event(), checkpoint.Checkpoints.wait

  def ends():
    steps_at_end.extend(steps_kept(tmp_path / 'run'))
    goes_on.set()

  def waits(checkpoints, alone=False):
    if threading.current_thread() is not threading.main_thread():
      goes_on.set()
    wait(checkpoints, alone)

  ended.hook = ends

  def make_step(run):
    step = original(run)

    class Slow:
      def lower(self, state, batch, *args):
        shapes.append(batch.tokens.shape)
        if shapes[-1] == ((4, 16) if last_step == 0 else (8, 16)):
          terminate()
          assert ended.event.wait(20)
          raise InterruptedError('as if ended')
        return step.lower(state, batch, *args)

      def __call__(self, *args):
        return step(*args)
    return Slow()

  with monkeypatch.context() as patch:
    patch.setattr(loop, 'make_step', make_step)
    patch.setattr(checkpoint.Checkpoints, 'wait', waits)
    with faults('rename', r'/2\.orbax[^/]*$', goes_on.wait), pytest.raises(InterruptedError):
      go(tmp_path / 'run', stages=stages)
  assert ended == [128 + signal.SIGTERM] and steps_at_end == ([last_step] if last_step else [])
  if last_step:
    go(tmp_path / 'run', stages=stages)
    go(tmp_path / 'whole', stages=stages)
    assert same(saved(tmp_path / 'run')[1], saved(tmp_path / 'whole')[1])


def test_a_signal_while_a_run_is_examined_ends_the_process_and_leaves_no_accepted_start(tmp_path, ended):
  def examine(start):
    terminate()
    assert ended.event.wait(20)
    raise InterruptedError('as if ended')

  with jax.set_mesh(mesh_of('fsdp:2')), pytest.raises(InterruptedError):
    train.train(RUN, tmp_path, mesh_of('fsdp:2'), examine=examine)
  assert ended == [128 + signal.SIGTERM] and not records.read(tmp_path)


def test_a_step_is_compiled_once(tmp_path, caplog):
  """Though it is compiled before its first call."""
  run = dataclasses.replace(RUN, steps=2, seed=5)
  with jax.log_compiles(True), caplog.at_level('WARNING', 'jax'):
    go(tmp_path, run)
  assert sum('Compiling jit(step) with' in record.getMessage() for record in caplog.records) == 2   # and validation's


def test_a_step_is_traced_once(tmp_path):
  """Though it is checked with shapes alone before data is opened."""
  traced = []

  @dataclasses.dataclass(frozen=True)
  class Counted(Bigram):
    def apply(self, params, batch, *, key=None, cache=None):
      traced.append(key is not None)   # validation has no key
      return super().apply(params, batch, key=key, cache=cache)
  go(tmp_path, model=Counted(), steps=2)
  assert sum(traced) == 1


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_second_signal_ends_a_process_whose_main_thread_is_in_c(ended, capfd, number):
  library, mutex = ctypes.CDLL(None), (ctypes.c_char * 64)()
  library.pthread_mutex_lock(mutex)
  ended.hook = lambda: library.pthread_mutex_unlock(mutex)
  with Interrupt() as interrupt:
    def send():
      os.kill(os.getpid(), number)
      while interrupt.signal is None:   # two pending signals of one number would be one
        pass
      os.kill(os.getpid(), number)
    sender = threading.Thread(target=send)
    sender.start()
    library.pthread_mutex_lock(mutex)   # no handler of Python runs in here
    assert ended == [128 + number] and interrupt.signal == number
    sender.join()
  assert 'to save' in capfd.readouterr().err


def test_a_block_that_returns_after_a_signal_saves_as_usual(ended, monkeypatch):
  monkeypatch.setattr(Interrupt, 'patience', 60.)
  with Interrupt() as interrupt, interrupt.during(lambda: ended.append('rescued')):
    terminate()
    assert interrupt.should_stop(1)
  assert not ended
