"""Two processes train together: a signal to one saves in both, and a lost one ends the other, which names it."""
import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest
from processes_test import address, results

ROOT = pathlib.Path(__file__).parents[1]
PROGRAM = """
import dataclasses
from helpers.runs import RUN
from lm import launch
def experiment(*, steps: int = 1_000_000):
  return dataclasses.replace(RUN, steps=steps, save_every=10 ** 9, evaluate_every=10 ** 9)
if __name__ == '__main__':
  launch.run(experiment)
"""


@pytest.fixture
def pair(tmp_path):
  """Starts two processes and waits until both train."""
  script, coordinator = tmp_path / 'program.py', address()
  script.write_text(PROGRAM)
  environment = os.environ | {'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}', 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': '',
                              'PYTHONUNBUFFERED': '1', 'XDG_CACHE_HOME': str(tmp_path / 'cache')}
  processes = [subprocess.Popen(
      [sys.executable, str(script), f'--workdir={tmp_path / "run"}', f'--coordinator_address={coordinator}',
       '--num_processes=2', f'--process_id={i}', '--heartbeat=6'], env=environment, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]
  next(line for line in processes[0].stdout if line.startswith('step '))
  yield processes
  for process in processes:
    process.kill()
    process.communicate()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize('receiver', [0, 1])
def test_a_signal_to_one_saves_the_same_step_in_both(pair, tmp_path, receiver):
  pair[receiver].send_signal(signal.SIGTERM)
  (out, _), (other, _) = ends = results(pair)
  assert [process.returncode for process in pair] == [143, 143], ends
  step = re.search(r'stopped at step (\d+) of', out)[1]
  assert other == '' and [path.name for path in (tmp_path / 'run/checkpoints').glob('[0-9]*')] == [step]


@pytest.mark.long
@pytest.mark.slow
def test_a_process_that_is_killed_is_named_by_the_other(pair):
  pair[1].kill()
  (_, err), _ = results(pair)
  assert pair[0].returncode == 1 and re.search(r'error: process 1 \(on host .*\) does not answer', err), err


@pytest.mark.long
@pytest.mark.slow
def test_a_process_that_hangs_is_named_by_the_coordination_service(pair):
  pair[1].send_signal(signal.SIGSTOP)
  err = pair[0].communicate(timeout=60)[1]
  assert pair[0].returncode == -signal.SIGABRT and re.search(r'stopped sending heartbeats\):\s+(/job.*)?1\n', err), err


@pytest.mark.long
@pytest.mark.slow
def test_the_loss_of_process_0_ends_the_other(pair):
  pair[0].kill()
  _, (_, err) = results(pair)
  assert pair[1].returncode in (1, -signal.SIGABRT)
  assert 'process 0 (which coordinates' in err or 'the leader task was preempted/died' in err, err
