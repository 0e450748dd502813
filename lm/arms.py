"""Runs of an experiment with other knobs, beside one another: what comparisons, sweeps and ladders are made of.

A study is a folder: `<study>/<name>/seed-<n>` is the workdir of a run, as any other; runs whose data are the same share
`<study>/data-<...>`, by links. What is done is not done again.
"""
import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm import atomic, budget, evaluate, flops, launch, optim, schedules, side_by_side, track, train
from lm.data.batches import Room
from lm.describe import describe, differences
from lm.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class Arm:
  """An experiment with knobs, by a name."""
  name: str
  function: Callable[..., train.Run]
  knobs: dict[str, Any]

  def make(self, seed: int = 0, **knobs: Any) -> train.Run:
    """The run with these knobs in place of the arm's own."""
    return dataclasses.replace(self.function(**{**self.knobs, **knobs}), seed=seed)

  def with_steps(self, steps: int) -> 'Arm':
    return dataclasses.replace(self, knobs={**self.knobs, 'steps': steps})


def experiment(script: pathlib.Path) -> Callable[..., train.Run]:
  """The function `experiment` of a script. FileNotFoundError or ValueError where there is none."""
  if not script.is_file():
    raise FileNotFoundError(f'there is no script {script}; --experiment takes a file such as experiments/pretrain.py')
  spec = importlib.util.spec_from_file_location(script.stem, script)
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module
  if (folder := str(script.resolve().parent)) not in sys.path:
    sys.path.insert(0, folder)   # as for a script that is run
  spec.loader.exec_module(module)
  if not callable(found := getattr(module, 'experiment', None)):
    raise ValueError(f'{script} has no function `experiment` that returns a run')
  return found


def knobs(function: Callable[..., Any], text: str) -> dict[str, Any]:
  """Those in 'lr=1e-3 optimizer=adam' (quoted as in a shell), read as the script's flags; the rest at their defaults.

  ValueError for a knob that does not exist, with the nearest one, or a value that is none.
  """
  words = [word if word.startswith('--') else f'--{word}' for word in shlex.split(text)]
  if help := [word for word in words if word.lstrip('-') in ('help', 'helpfull', 'debug')]:
    raise ValueError(f'{help[0]} is no knob of an experiment')
  try:
    (found,), _ = launch.parse([function], ['', *words])
  except launch.flags.Error as error:
    raise ValueError(f'in {text!r}: {error}') from None
  return found


def arms(function: Callable[..., Any], text: str, common: str = '') -> list[Arm]:
  """Those in 'adam: optimizer=adam lr=1e-3; muon: optimizer=muon', each with the knobs in `common`."""
  found = []
  for part in filter(str.strip, text.split(';')):
    name, colon, own = part.partition(':')
    name = name.strip()
    if not colon or not name or '/' in name or name.startswith('.') or name in [arm.name for arm in found]:
      raise ValueError(f"arm {part.strip()!r}: write 'name: knob=value knob=value; other: ...', each name once, "
                       'without /')
    found.append(Arm(name, function, knobs(function, f'{common} {own}')))
  if not found:
    raise ValueError("there are no arms; write 'name: knob=value knob=value; other: ...'")
  return found


def cost(run: train.Run, unit: str, mesh: jax.sharding.Mesh, optimizer: bool = True) -> float:
  """Of a step, in `unit`: 1 for steps; tokens; FLOPs of its matrix products, with the optimizer's or without."""
  if unit == 'flops':
    run = run if optimizer else dataclasses.replace(run, optimizer=optax.identity())
    constants = train.abstract_constants(run)
    return flops.count(train.make_step(run), jax.eval_shape(lambda: train.init(run)), train.abstract_batch(run, mesh),
                       constants)
  return {'steps': 1., 'tokens': float(run.batch * run.data.length)}[unit]


def equal(found: list[Arm], unit: str, amount: float | None, mesh: jax.sharding.Mesh) -> tuple[list[Arm], float]:
  """The arms with as many steps as cost the same: `amount` of a unit (steps, tokens, flops, seconds), or what the first
  arm costs as it is.

  ValueError where an experiment has no knob `steps`, or an arm gets no step.
  """
  if 'steps' not in found[0].knobs:
    raise ValueError('the experiment has no knob `steps`, by which arms could be given equal compute; add one')
  if unit == 'seconds':
    if amount is None:
      raise ValueError('equal seconds need a --budget in seconds, such as 60')
    return [arm.with_steps(budget.fit(lambda steps, arm=arm: arm.make(steps=steps), amount / 60).steps)
            for arm in found], amount
  if amount is None:
    first = found[0].make()
    amount = first.steps * cost(first, unit, mesh)
  counts = []
  for arm in found:
    steps = round(amount / cost(arm.make(), unit, mesh))
    if steps < 1:
      raise ValueError(f'--budget={amount:g} {unit} are less than a step of {arm.name}; raise it')
    counts.append(arm.with_steps(steps))
  return counts, amount


def go(study: pathlib.Path, arm: Arm, seed: int, mesh: jax.sharding.Mesh,
       watch: Callable[[int, dict[str, float]], bool] | None = None) -> tuple[train.Run, pathlib.Path, train.Result]:
  """Trains an arm, from where it was left, in a workdir of its own; KeyboardInterrupt where it was asked to stop."""
  workdir = study / arm.name / f'seed-{seed}'
  share_data(study, workdir, arm.make(seed))
  run, result = launch.start(arm.function, arm.knobs, workdir, mesh, seed=seed, watch=watch)
  if not result.finished and not (watch and result.step % run.evaluate_every == 0):
    raise KeyboardInterrupt
  return run, workdir, result


def go_together(study: pathlib.Path, arm: Arm, seeds: Sequence[int], mesh: jax.sharding.Mesh
                ) -> list[tuple[train.Run, pathlib.Path, train.Result]]:
  """As `go` of each seed, in one program: see `side_by_side`."""
  workdirs = [study / arm.name / f'seed-{seed}' for seed in seeds]
  for seed, workdir in zip(seeds, workdirs):
    share_data(study, workdir, arm.make(seed))
    launch.record(arm.function, arm.knobs, workdir, mesh, seed=seed)
  results = side_by_side.go(arm.make(), seeds, workdirs, mesh)
  return [(arm.make(seed), workdir, result) for seed, workdir, result in zip(seeds, workdirs, results)]


def share_data(study: pathlib.Path, workdir: pathlib.Path, run: train.Run) -> None:
  """Links `data` in the workdir to a folder of the study, one for all runs whose data, but for lengths, is the same.
  """
  told = describe(run.data)
  told = {name: value for name, value in told.items() if name not in ('length', 'source_length')}
  shared = study / f'data-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]}'
  shared.mkdir(parents=True, exist_ok=True)
  link(workdir, shared)


def link(workdir: pathlib.Path, data: pathlib.Path) -> None:
  workdir.mkdir(parents=True, exist_ok=True)
  if not (workdir / 'data').exists():
    (workdir / 'data').symlink_to(os.path.relpath(data, workdir), target_is_directory=True)


def check_same(study: pathlib.Path, name: str, settings: Any) -> None:
  """ValueError where `<study>/<name>` holds other settings; else it holds these."""
  path, now = study / name, json.loads(json.dumps(settings, default=str))
  if path.exists():
    try:
      before = json.loads(path.read_text())
    except ValueError:
      raise ValueError(f'{path} is damaged; delete it, or choose another --workdir') from None
    if lines := differences(before, now):
      raise ValueError(f'{path.parent} was begun with other settings; choose another --workdir, or the same ones\n  '
                       + '\n  '.join(lines))
  else:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write(path, json.dumps(now, indent=2))


def score(run: train.Run, result: train.Result, objective: Objective) -> dict[str, float]:
  """Metrics of `objective` over the whole validation split: with half a row of context, where that is possible."""
  step = evaluate.make_step(run.model.apply, objective, result.data.tokenizer.byte_lengths())
  plain = all(form.room == Room() for form in objective.forms)
  context = {'context': run.data.length // 2} if plain else {}
  held_out = result.data.batches('validation', objective, run.batch, seed=None if plain else 0, repeat=False, **context)
  return evaluate.evaluate(step, result.params, held_out, result.mesh)


def adapt(run: train.Run, workdir: pathlib.Path, result: train.Result, objective: Objective, steps: int, rate: float
          ) -> tuple[train.Run, train.Result]:
  """The run's model, trained on `objective` for some steps more, by AdamW, from `rate` down to 0; in its own folder."""
  schedule = schedules.warmup_linear(rate, steps, steps // 10)
  short = train.Run(run.model, objective, run.data, optim.adamw(schedule), steps, run.batch, run.accumulate, run.seed,
                    steps, run.evaluate_batches, steps, 1, start=lambda model: jax.tree.map(jnp.copy, result.params))
  link(workdir, workdir.parent / 'data')
  found = train.train(short, workdir, result.mesh)
  if not found.finished:
    raise KeyboardInterrupt
  return short, found


def curve(workdir: pathlib.Path, name: str = 'validation/bits_per_byte') -> list[tuple[int, float]]:
  """(step, value) of each evaluation."""
  rows = track.read_metrics(workdir / 'metrics.jsonl')
  return [(row['step'], row[name]) for row in rows if row.get(name) is not None]
