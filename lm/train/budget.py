"""Chooses the number of steps that fit a time budget on this machine."""
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.data.tokenizers.base import Bytes
from lm.sharding import hosts
from lm.train import validation
from lm.train.checks import check
from lm.train.run import Run, abstract_batch, init, load_constants, with_constants
from lm.train.step import make_step


def empty_batch(run: Run) -> Batch:
  """Returns a batch of zeros on the mesh that is set, with one segment in each row, whose targets all have weight 1."""
  mesh = jax.sharding.get_mesh()
  rows = len(sharding.local_rows(run.batch, mesh))
  zeros = jax.tree.map(lambda s: np.zeros((rows, *s.shape[1:]), s.dtype), abstract_batch(run, mesh))
  return sharding.shard_rows(zeros._replace(weights=zeros.weights + 1, segments=zeros.segments + 1), mesh)


def fit(make: Callable[[int], Run], minutes: float) -> Run:
  """Returns `make(steps)` with the steps that take `minutes` on this machine, evaluations included.

  It times the step and the evaluation on batches of zeros, which takes some seconds and reads no data. A mesh has to be
  set.

  Raises:
    ValueError: the minutes are not positive.
  """
  if not 0 < minutes < 1e6:
    raise ValueError(f'minutes={minutes} is not between 0 and a million')
  run, mesh = make(10_000), jax.sharding.get_mesh()
  check(run, mesh)
  batch = empty_batch(run)
  state, step, constants = jax.jit(lambda: init(run))(), make_step(run), load_constants(run)
  evaluation = validation.make_step(run.model.apply, run.objective, Bytes())
  times = []
  for _ in range(4):
    start = time.monotonic()
    jax.block_until_ready(evaluation(with_constants(state.params, constants), batch))
    middle = time.monotonic()
    state = jax.block_until_ready(step(state, batch, constants)[0])
    times.append((middle - start, time.monotonic() - middle))
  evaluation_seconds, step_seconds = np.median(times[1:], axis=0)   # the first round compiles
  steps = _bounded(60 * minutes / step_seconds)
  evaluations = steps // make(steps).evaluate_every
  steps = _bounded((60 * minutes - evaluations * (run.evaluate_batches or 0) * evaluation_seconds) / step_seconds)
  return make(hosts.from_process_0(steps))   # in a cluster, the clock of one process decides


def _bounded(steps: float) -> int:
  return min(max(int(steps), 10), 2 ** 31 - 1)


def plan(make: Callable[..., Run], recorded: Sequence[Mapping[str, Any]]) -> Run:
  """Returns the run `make()`; where it has minutes rather than steps, with the number of steps that fit.

  The steps are measured once, in the first start by minutes. Later starts take them from the records of the workdir,
  and scale them where the minutes have changed.

  Args:
    make: `make(**knobs)` builds the run of an experiment with other values of some flags.
    recorded: the records of earlier starts, the oldest first.
  """
  run = make()
  earlier = next(({name: record[name] for name in ('steps', 'minutes') if name in record}
                  for record in reversed(recorded) if 'steps' in record), None)
  if run.minutes is None:
    return run
  earlier = hosts.from_process_0(earlier)   # either all processes measure or none does
  if earlier is None or earlier.get('minutes', run.minutes) is None:
    return dataclasses.replace(fit(lambda steps: make(steps=steps), run.minutes), minutes=run.minutes)
  steps = round(earlier['steps'] * run.minutes / earlier.get('minutes', run.minutes))
  return dataclasses.replace(make(steps=max(steps, 1)), minutes=run.minutes)
