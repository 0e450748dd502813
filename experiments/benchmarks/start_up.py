"""How long is the way to the first step? The probes of the doctor, and a restart with compiled programs in the cache.

  python experiments/benchmarks/start_up.py

Both are measured on the quickstart: first its data is prepared, and its first steps are computed and saved. A restart
lasts from the start of the process to the line of its first step; the doctor has no part in it, since nothing has
changed. Its own probes are then computed in a process without a cache. Seconds of the CPU do not depend on what else
the machine does.
"""
import os
import pathlib
import resource
import runpy
import signal
import statistics
import subprocess
import sys
import tempfile
import time

import interleaved

from lm import launch

EXPERIMENTS, STEPS = pathlib.Path(__file__).parents[1], 10_000


def benchmark(*, restarts: int = 3) -> None:
  """Prints a line for the probes, and one for restarts.

  Args:
    restarts: the number of restarts, of which the median counts.
  """
  if restarts < 1:
    raise ValueError(f'--restarts={restarts} must be 1 or more')
  interleaved.machine('jax')
  with tempfile.TemporaryDirectory() as folder:
    workdir = pathlib.Path(folder, 'run')
    first_step(workdir, signal.SIGTERM)   # which saves
    times = [first_step(workdir, signal.SIGKILL) for _ in range(restarts)]
    wall, cpu = map(statistics.median, zip(*times))
    print(f'restart to first step: {wall:.1f} s, {cpu:.1f} s of CPU time (median of {restarts}; target 15 s)')
    wall, cpu = probes(workdir)
    print(f'probes of the doctor: {wall:.1f} s, {cpu:.1f} s of CPU time (target 5 s)')


def first_step(workdir: pathlib.Path, number: signal.Signals) -> tuple[float, float]:
  """Trains until the line of a step, and sends a signal. Returns the seconds until the line, and those of the CPU.

  Raises RuntimeError where the process ends by itself; its errors are printed.
  """
  start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
  environment = os.environ | {'XDG_CACHE_HOME': str(workdir.parent / 'cache')}
  command = sys.executable, EXPERIMENTS / 'quickstart.py', f'--workdir={workdir}', f'--steps={STEPS}'
  process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
  for line in process.stdout:
    if line.startswith('step '):
      break
  else:
    raise RuntimeError(f'the quickstart ended with exit code {process.wait()} before its first step')
  seconds = time.monotonic() - start
  process.send_signal(number)
  process.communicate()
  after = resource.getrusage(resource.RUSAGE_CHILDREN)
  return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def probes(workdir: pathlib.Path) -> tuple[float, float]:
  """Computes the probes at the start of the quickstart. Returns their seconds, and those of the CPU."""
  import contextlib

  import jax

  from lm import doctor, options, sharding, train
  jax.config.update('jax_enable_compilation_cache', False)
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    experiment = runpy.run_path(str(EXPERIMENTS / 'quickstart.py'))['experiment']
    run = train.build(experiment(budget=options.Budget(steps=STEPS)))
    data = run.data.open(workdir, control=run.objective.control)
    state = jax.block_until_ready(jax.jit(lambda: train.init(run))())
    with contextlib.closing(train.DataFeed(run, data, mesh)) as feed:
      subject = doctor.Subject(run, data, mesh, state.params, {}, feed, state, is_new=True)
      start, cpu = time.monotonic(), time.process_time()
      doctor.examine(subject, doctor.START)
      return time.monotonic() - start, time.process_time() - cpu


if __name__ == '__main__':
  launch.tool(benchmark)
