"""Runs that differ in their seed alone, trained side by side in one program: a `vmap` over states, batches and keys."""
import contextlib
import dataclasses
import io
import math
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm import averaging, budget, checkpoint, evaluate, records, track, train


def fits(run: train.Run) -> bool:
  """Whether runs like this one can be trained so: from new parameters, on batches of one shape, to the last step."""
  return not (run.stages or run.patience or run.guard or run.augment or run.constants or run.start)


def make_step(run: train.Run) -> Callable[..., Any]:
  """`(states, batches, keys) -> (states, metrics)`, of arrays that have a first axis of seeds; states are donated."""
  step = lambda state, batch, key: train.step_of(run)(state, batch, {}, key)
  return jax.jit(jax.vmap(step), donate_argnums=0)


def init(run: train.Run, keys: jax.Array) -> train.State:
  return jax.jit(jax.vmap(lambda key: train.init(run, key)))(keys)


def keys_of(seeds: Sequence[int]) -> jax.Array:
  return jnp.stack([jax.random.key(seed) for seed in seeds])


def faster(run: train.Run, seeds: Sequence[int]) -> float:
  """How many times sooner a step of all seeds at once is done than their steps in turn, on the mesh that is set.

  Measured on batches that hold no text, in some seconds; compilation does not count.
  """
  batch, keys = budget.empty_batch(run), keys_of(seeds)
  states, together, alone = init(run, keys), make_step(run), train.make_step(run)
  singles = [jax.jit(lambda key: train.init(run, key))(key) for key in keys]
  batches = jax.jit(lambda batch: jax.tree.map(lambda x: jnp.stack([x] * len(seeds)), batch))(batch)
  times = []
  for _ in range(5):
    start = time.monotonic()
    states = jax.block_until_ready(together(states, batches, keys)[0])
    middle = time.monotonic()
    singles = jax.block_until_ready([alone(state, batch, {}, key)[0] for state, key in zip(singles, keys)])
    times.append((middle - start, time.monotonic() - middle))
  at_once, in_turn = np.median(times[1:], axis=0)   # the first one compiles
  return float(in_turn / at_once)


def go(run: train.Run, seeds: Sequence[int], workdirs: Sequence[pathlib.Path], mesh: jax.sharding.Mesh
       ) -> list[train.Result]:
  """What `train.train` gives of each seed in its workdir, but for rounding; on the mesh that is set, of one process.

  Only the last state is saved: what is stopped begins anew. NotFinite where the loss of a seed is.
  """
  train.check(run, mesh)
  runs = [dataclasses.replace(run, seed=seed) for seed in seeds]
  data = [run.data.open(workdir, control=run.objective.control) for workdir in workdirs]
  train.check_vocabulary(run, data[0])
  batches = [opened.batches('train', r.objective, r.batch, r.seed) for r, opened in zip(runs, data)]
  held_out = data[0].batches('validation', run.objective, run.batch, seed=0, repeat=False)
  evaluation = evaluate.make_step(run.model.apply, run.objective, data[0].tokenizer.byte_lengths())
  keys, step = keys_of(seeds), make_step(run)
  states, metrics, pending = init(run, keys), [], None
  with contextlib.ExitStack() as open_trackers:
    trackers = [open_trackers.enter_context(track.Tracker(
        workdir, run.steps, tokens_before=lambda n: n * len(seeds) * run.batch * run.data.length,
        output=None if i == 0 else io.StringIO())) for i, workdir in enumerate(workdirs)]
    for done in range(1, run.steps + 1):
      rows = jax.tree.map(lambda *x: np.stack(x), *(make(done - 1) for make in batches))
      states, found = step(states, jax.device_put(rows, NamedSharding(mesh, P(None, 'data'))), keys)
      if pending is not None:
        _log(trackers, *pending)   # of the step before, while this one runs
      pending = done, found
      if done == run.steps or done % run.evaluate_every == 0:
        _log(trackers, *pending)
        pending = None
        metrics = [evaluate.evaluate(evaluation, params, held_out, mesh, run.evaluate_batches)
                   for params in _params(states, len(seeds))]
        for tracker, values in zip(trackers, metrics):
          tracker.log(done, {f'validation/{name}': value for name, value in values.items()})
  for i, (r, opened, workdir) in enumerate(zip(runs, data, workdirs)):
    with checkpoint.Checkpoints(workdir / 'checkpoints') as saved:
      saved.save(run.steps, _of(states, i), train.identity(r, opened), metrics[i]['loss'])
    records.add(workdir, data=opened.fingerprint, steps=run.steps)
  return [train.Result(run.steps, 0, params, opened, mesh, values, True, track.Phases())
          for params, opened, values in zip(_params(states, len(seeds)), data, metrics)]


def _of(tree: Any, i: int) -> Any:
  return jax.tree.map(lambda x: x[i], tree)


def _params(states: train.State, count: int) -> list[Any]:
  return [averaging.evaluated(state.opt_state, state.params) for state in (_of(states, i) for i in range(count))]


def _log(trackers: Sequence[track.Tracker], step: int, metrics: dict[str, jax.Array]) -> None:
  found = jax.tree.map(np.asarray, metrics)
  for i, tracker in enumerate(trackers):
    values = {name: float(of_seeds[i]) for name, of_seeds in found.items()}
    tracker.log(step, values)
    if not math.isfinite(values['loss'] + values['grad_norm']):
      raise train.NotFinite(f'step {step}: the loss of run {i + 1} is {values["loss"]}, the norm of its gradient '
                            f'{values["grad_norm"]}. Lower the learning rate, or warm up longer')
