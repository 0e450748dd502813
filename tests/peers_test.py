"""Two processes train together: a signal to one saves in both, and a lost one ends the other, which names it."""
import os
import pathlib
import re
import signal
import subprocess
import sys
import threading

import pytest
from helpers import as_shipped
from processes_test import address, results

ROOT, PATIENCE = pathlib.Path(__file__).parents[1], 300   # seconds to the first step
PROGRAM = """
import dataclasses, time
import jax
from helpers.runs import RUN
from lm import launch
from lm.workdir import checkpoint
stored_facts = checkpoint.stored_facts
def look_late(folder):
  # Process 1 looks when process 0 has made the folder of checkpoints, and sees it, as process 0 did not.
  while jax.process_index() and not folder.exists():
    time.sleep(0.05)
  return stored_facts(folder)
checkpoint.stored_facts = look_late
def experiment(*, steps: int = 1_000_000):
  return dataclasses.replace(RUN, steps=steps, save_every=10 ** 9, evaluate_every=10 ** 9)
if __name__ == '__main__':
  launch.run(experiment)
"""


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  return tmp_path_factory.mktemp('cache')


@pytest.fixture
def pair(tmp_path, cache, request):
  """Starts two processes and waits until both train. The parameter of the fixture is their heartbeat."""
  script, coordinator = tmp_path / 'program.py', address()
  heartbeat = getattr(request, 'param', 100)   # so long that on a busy machine a broken connection is noticed before
  script.write_text(PROGRAM)
  environment = os.environ | {'PYTHONPATH': f'{ROOT}:{ROOT / "tests"}', 'JAX_PLATFORMS': 'cpu',
                              'XLA_FLAGS': as_shipped.QUICK, 'PYTHONUNBUFFERED': '1',
                              'JAX_DISABLE_MOST_OPTIMIZATIONS': '1', 'JAX_COMPILATION_CACHE_DIR': str(cache)}
  processes = [subprocess.Popen(
      [sys.executable, str(script), f'--workdir={tmp_path / "run"}', f'--coordinator_address={coordinator}',
       '--num_processes=2', f'--process_id={i}', f'--heartbeat={heartbeat}', '--nodoctor'], env=environment, text=True,
      stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]
  patience = threading.Timer(PATIENCE, processes[0].kill)
  patience.start()
  trains = any(line.startswith('step ') for line in processes[0].stdout)
  patience.cancel()
  assert trains, results(processes)
  yield processes
  for process in processes:
    process.kill()
    process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize('receiver', [pytest.param(0, marks=pytest.mark.long), 1])
def test_a_signal_to_one_saves_the_same_step_in_both(pair, tmp_path, receiver):
  pair[receiver].send_signal(signal.SIGTERM)
  (out, _), (other, _) = ends = results(pair)
  assert [process.returncode for process in pair] == [143, 143], ends
  step = re.search(r'stopped at step (\d+) of', out)[1]
  assert other == '' and [path.name for path in (tmp_path / 'run/checkpoints').glob('[0-9]*')] == [step]


@pytest.mark.slow
def test_a_process_that_is_killed_is_named_by_the_other(pair):
  pair[1].kill()
  (_, err), _ = results(pair)
  assert pair[0].returncode == 1 and re.search(r'error: process 1 \(on host .*\) does not answer', err), err


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize('pair', [6], indirect=True)
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
