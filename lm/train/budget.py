"""How many steps fit a time budget on this machine."""
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
  """A batch of zeros, of one segment a row and targets that count, on the mesh that is set."""
  mesh = jax.sharding.get_mesh()
  rows = len(sharding.local_rows(run.batch, mesh))
  empty = jax.tree.map(lambda s: np.zeros((rows, *s.shape[1:]), s.dtype), abstract_batch(run, mesh))
  return sharding.shard_rows(empty._replace(weights=empty.weights + 1, segments=empty.segments + 1), mesh)


def fit(make: Callable[[int], Run], minutes: float) -> Run:
  """`make(steps)`, with as many steps as take `minutes` on this machine, evaluations included; takes some seconds.

  The step and the evaluation are timed on batches of zeros, before data is read. Call it with a mesh set. ValueError
  where the minutes are not positive.
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
  evaluating, training = np.median(times[1:], axis=0)   # the first one compiles
  steps = _at_least(60 * minutes / training)
  evaluations = steps // make(steps).evaluate_every
  steps = _at_least((60 * minutes - evaluations * (run.evaluate_batches or 0) * evaluating) / training)
  return make(hosts.agreed(steps))   # one clock decides in a cluster


def _at_least(steps: float, least: int = 10) -> int:
  return min(max(int(steps), least), 2 ** 31 - 1)


def planned(make: Callable[..., Run], recorded: Sequence[Mapping[str, Any]]) -> Run:
  """The run of an experiment; where it is given minutes and no steps, with as many steps as fit.

  `make(**knobs)` makes it. Steps are measured once: those in the records of earlier starts, oldest first, stay, and
  follow where the minutes have changed. Steps of a start without minutes are no measure.
  """
  run = make()
  earlier = next(({name: record[name] for name in ('steps', 'minutes') if name in record}
                  for record in reversed(recorded) if 'steps' in record), None)
  if run.minutes is None:
    return run
  earlier = hosts.agreed(earlier)   # all processes measure, or none
  if earlier is None or earlier.get('minutes', run.minutes) is None:
    return dataclasses.replace(fit(lambda steps: make(steps=steps), run.minutes), minutes=run.minutes)
  steps = round(earlier['steps'] * run.minutes / earlier.get('minutes', run.minutes))
  return dataclasses.replace(make(steps=max(steps, 1)), minutes=run.minutes)
