"""Signals stop a run, which saves and goes on; a second one ends the process."""
import dataclasses
import json
import os
import pathlib
import pty
import re
import signal
import subprocess
import sys

import jax
import pytest
from helpers.meshes import mesh_of
from helpers.runs import RUN, go, logged, steps_kept

from lm import train
from lm.train.interrupt import Interrupt

pytestmark = pytest.mark.usefixtures('hears_hangup')


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_the_first_signal_asks_to_stop_and_the_second_ends_the_process(monkeypatch, capfd, number):
  ended = []
  monkeypatch.setattr(os, '_exit', ended.append)
  before = signal.getsignal(number)
  with Interrupt() as interrupt:
    assert not interrupt.should_stop(1)
    signal.raise_signal(number)
    assert interrupt.should_stop(2) and not ended and 'to save' in capfd.readouterr().err
    signal.raise_signal(number)
    assert ended == [128 + number]
  assert signal.getsignal(number) is before


PROGRAM = """
import pathlib, sys
import train_test as t
from lm import launch
def experiment(*, steps: int = 1_000_000):
  import dataclasses
  return dataclasses.replace(t.RUN, steps=steps, save_every=10 ** 9, evaluate_every=10 ** 9)
if __name__ == '__main__':
  launch.run(experiment)
"""


def test_a_signal_that_is_ignored_stays_ignored():
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    with Interrupt() as interrupt:
      signal.raise_signal(signal.SIGHUP)
      assert not interrupt.should_stop(1)
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_closed_terminal_is_a_signal_to_save(tmp_path):
  """Writing to it is an error from then on, which must not end the run."""
  program = ('import fcntl, sys, termios, time; from lm.train.interrupt import Interrupt\n'
             'fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n'
             'with Interrupt() as interrupt:\n'
             '  print("ready", flush=True)\n'
             '  while not interrupt.should_stop(1): time.sleep(0.01)\n'
             '  print("stopped", flush=True); open(sys.argv[1], "w").write(str(interrupt.signal))')
  ours, theirs = pty.openpty()
  with subprocess.Popen([sys.executable, '-c', program, str(tmp_path / 'signal')], stdin=theirs, stdout=theirs,
                        stderr=theirs, start_new_session=True, cwd=pathlib.Path(__file__).parents[2]) as process:
    os.close(theirs)
    assert b'ready' in os.read(ours, 100)
    os.close(ours)
    assert process.wait(timeout=60) == 0
  assert (tmp_path / 'signal').read_text() == str(int(signal.SIGHUP))


@pytest.mark.slow
def test_sigterm_saves_exits_with_143_and_the_run_goes_on(tmp_path):
  (tmp_path / 'program.py').write_text(PROGRAM)
  folder = pathlib.Path(__file__).parent
  environment = os.environ | {'PYTHONPATH': f'{folder}:{folder.parent}', 'XDG_CACHE_HOME': str(tmp_path),
                              'PYTHONUNBUFFERED': '1', 'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  command = [sys.executable, '-W', 'error', str(tmp_path / 'program.py'), f'--workdir={tmp_path / "run"}', '--nodoctor']
  with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
    first = next(line for line in process.stdout if line.startswith('step '))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=60)
  assert process.returncode == 143, err
  step = int(re.search(r'stopped at step (\d+) of 1000000', out)[1])
  assert first and steps_kept(tmp_path / 'run') == [step] and 'Traceback' not in err
  result = go(tmp_path / 'run', steps=step + 2, save_every=10 ** 9, evaluate_every=10 ** 9)
  assert result.step == step + 2 and list(logged(tmp_path / 'run')) == list(range(1, step + 3))
  assert json.loads((tmp_path / 'run' / 'run.json').read_text())[0]['knobs'] == {'steps': 1_000_000}


def test_a_result_has_the_signal_that_stopped_the_run_or_none(tmp_path, monkeypatch):
  def stop_requested(self, step):
    self.signal = signal.SIGINT if step == 2 else None
    return step == 2
  monkeypatch.setattr(Interrupt, 'should_stop', stop_requested)
  result = go(tmp_path)
  assert (result.signal, result.finished) == (signal.SIGINT, False)
  with pytest.raises(KeyboardInterrupt) as stop:
    result.raise_if_stopped()
  assert stop.value.code == 130
  result = go(tmp_path)
  assert result.signal is None and result.finished
  result.raise_if_stopped()
  mesh = mesh_of('fsdp:2')
  with jax.set_mesh(mesh):
    run = dataclasses.replace(RUN, evaluate_every=1)
    result = train.train(run, tmp_path / 'ended', mesh, lambda step, metrics: True)
  assert (result.signal, result.finished, result.step) == (None, False, 1)
  result.raise_if_stopped()
