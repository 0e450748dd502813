"""Runs of an experiment with other knobs, beside one another: what comparisons, sweeps and ladders are made of.

A study is a folder: `<study>/<name>/seed-<n>` is the workdir of a run, as any other; runs whose data are the same share
`<study>/data-<...>/data`, by links. What is done is not done again.
"""
import dataclasses
import hashlib
import inspect
import json
import math
import os
import pathlib
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import atomic, budget, evaluate, flops, launch, lora, optim, records, schedules, scripts, track, train
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
    """The run with these knobs in place of the arm's own. ValueError for adapters without parameters under them."""
    return lora.start_from(dataclasses.replace(self.function(**{**self.knobs, **knobs}), seed=seed), None)

  def with_steps(self, steps: int) -> 'Arm':
    return dataclasses.replace(self, knobs={**self.knobs, 'steps': steps})


def experiment(script: pathlib.Path) -> Callable[..., train.Run]:
  """The function `experiment` of a script. FileNotFoundError or ValueError where there is none."""
  if not script.is_file():
    raise FileNotFoundError(f'there is no script {script}; --experiment takes a file such as experiments/pretrain.py')
  scripts.trust(script)
  if (folder := str(script.resolve().parent)) not in sys.path:
    sys.path.insert(0, folder)   # as for a script that is run
  return scripts.function(script, 'experiment')


def knobs(function: Callable[..., Any], text: str) -> dict[str, Any]:
  """Those in 'lr=1e-3 optimizer=adam', read as the script's flags; the rest at their defaults. Words with spaces are
  quoted, as in a shell; a backslash is one, as in a flag.

  ValueError for a knob that does not exist, with the nearest one, or a value that is none.
  """
  try:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, '', ''   # a backslash is one, as in a flag
    words = [word if word.startswith('--') else f'--{word}' for word in lexer]
  except ValueError as error:
    raise ValueError(f'knobs {text.strip()!r}: {error}') from None
  if help := [word for word in words if word.lstrip('-').partition('=')[0] in ('help', 'helpfull', 'debug', 'script')]:
    raise ValueError(f'{help[0]} is no knob of an experiment')
  try:
    (found,), _ = launch.parse([function], ['', *words])
  except launch.flags.Error as error:
    lists = f'{pathlib.Path(inspect.getfile(function)).name} --help lists all'
    raise ValueError(str(error).replace('--help lists all', lists)) from None
  return found


def arms(function: Callable[..., Any], text: str, common: str = '') -> list[Arm]:
  """Those in 'adam: optimizer=adam lr=1e-3; muon: optimizer=muon', each with the knobs in `common`."""
  found = []
  for part in filter(str.strip, text.split(';')):
    name, colon, own = part.partition(':')
    name = name.strip()
    plain = name.isprintable() and not set(name) & set('/|') and not name.startswith('.')
    if not colon or not name or not plain or name in [arm.name for arm in found]:
      raise ValueError(f"arm {part.strip()!r}: write 'name: knob=value knob=value; other: ...', each name once, "
                       'without / and |')
    found.append(Arm(name, function, knobs(function, f'{common} {own}')))
  if not found:
    raise ValueError("there are no arms; write 'name: knob=value knob=value; other: ...'")
  return found


def cost(run: train.Run, unit: str, mesh: jax.sharding.Mesh, optimizer: bool = True,
         shape: tuple[int, int] | None = None) -> float:
  """Of a step, in `unit`: 1 for steps; tokens; FLOPs of its matrix products, with the optimizer's or without.

  After the stages, or of a batch of another shape [B, T]. FLOPs are the mean of steps 1 to 100, since SOAP and
  Sophia do more at every tenth: all whole scalars of the state are taken for the number of the step.
  """
  if unit == 'flops':
    run = run if optimizer else dataclasses.replace(run, optimizer=optax.identity())
    state, more = jax.eval_shape(lambda: train.init(run)), (train.abstract_batch(run, mesh, shape),
                                                            train.abstract_constants(run))
    program = flops.counter(train.make_step(run), state, *more)
    at = lambda step: jax.tree.map(lambda x: np.int32(step) if (x.shape, x.dtype) == ((), np.int32) else x, state)
    return statistics.mean(program(at(step), *more) for step in range(1, 101))
  return {'steps': 1., 'tokens': float(math.prod(shape or (run.batch, run.data.length)))}[unit]


def spending(run: train.Run, unit: str, mesh: jax.sharding.Mesh) -> Callable[[int], float]:
  """The cost of so many first steps, in `unit`, with each stage at its own."""
  stages = [(stage.until, cost(run, unit, mesh, shape=run.schedule.shape(stage.until - 1))) for stage in run.stages]
  last = cost(run, unit, mesh)

  def spent(steps):
    total = done = 0
    for until, each in stages:
      total += (min(steps, until) - done) * each
      done = min(steps, until)
    return total + (steps - done) * last
  return spent


def equal(found: list[Arm], unit: str, amount: float | None, mesh: jax.sharding.Mesh) -> tuple[list[Arm], float]:
  """The arms with as many steps as cost the same: `amount` of a unit (steps, tokens, flops, seconds), or what the first
  arm costs as it is.

  Stages keep their steps, at their own cost. ValueError where an experiment has no knob `steps`, or an arm gets no step
  or fewer than its knobs need.
  """
  if 'steps' not in found[0].knobs:
    raise ValueError('the experiment has no knob `steps`, by which arms could be given equal compute; add one')
  if unit == 'seconds':
    if amount is None or not amount > 0:
      raise ValueError(f'--equal=seconds needs a --budget above 0 in seconds, such as 60, not {amount}')
    if staged := [arm.name for arm in found if arm.make().stages]:
      raise ValueError(f'--equal=seconds measures steps that are all alike, and {staged[0]} begins with smaller ones; '
                       'leave out its warm-up of batch and length, or take equal tokens or flops')
    counts = [budget.fit(lambda steps, arm=arm: arm.make(steps=steps), amount / 60).steps for arm in found]
    return list(map(fitted, found, counts)), amount
  if amount is None:
    first = budget.planned(found[0].make, ())
    amount = spending(first, unit, mesh)(first.steps)
  counts = []
  for arm in found:
    run = arm.make()
    step = cost(run, unit, mesh)
    saved = run.steps * step - spending(run, unit, mesh)(run.steps) if run.stages else 0.   # by smaller first steps
    counts.append(round((amount + saved) / step))
    if counts[-1] < 1:
      raise ValueError(f'--budget={amount:g} {unit} are less than a step of {arm.name}; raise it')
  return list(map(fitted, found, counts)), amount


def fitted(arm: Arm, steps: int) -> Arm:
  """The arm with so many steps; ValueError where its other knobs do not go with them."""
  try:
    arm.make(steps=steps)
  except ValueError as error:
    raise ValueError(f'{arm.name} gets {steps:,} steps, and {error}') from None
  return arm.with_steps(steps)


def go(study: pathlib.Path, arm: Arm, seed: int, mesh: jax.sharding.Mesh,
       watch: Callable[[int, dict[str, float]], bool] | None = None) -> tuple[train.Run, pathlib.Path, train.Result]:
  """Trains an arm, from where it was left, in a workdir of its own.

  KeyboardInterrupt where a signal stopped it.
  """
  workdir = study / arm.name / f'seed-{seed}'
  link(workdir, shared(study, arm.make()) / 'data')
  run, result = launch.start(arm.function, arm.knobs, workdir, mesh, seed=seed, watch=watch)
  return run, workdir, result


def shared(study: pathlib.Path, run: train.Run) -> pathlib.Path:
  """A folder of the study, one for all runs whose data, but for lengths, is the same; they link to `data` in it."""
  told = describe(run.data)
  told = {name: value for name, value in told.items() if name not in ('length', 'source_length')}
  return study / f'data-{hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]}'


def open_data(study: pathlib.Path, found: Sequence[Arm], control: tuple[str, ...] = ()) -> None:
  """Tokenises what the arms read, where that was not done: what cannot be read says so before anything is trained.

  `control` names tokens that are needed beside those of the arms' objectives. ValueError or OSError as `Data.open`, and
  ValueError where a model has too small a vocabulary.
  """
  opened = {}
  for run in (arm.make() for arm in found):
    key = folder, needed = shared(study, run), (*run.objective.control, *control)
    if key not in opened:
      opened[key] = run.data.open(folder, control=needed)
    train.check_vocabulary(run, opened[key])


def link(workdir: pathlib.Path, data: pathlib.Path) -> None:
  workdir.mkdir(parents=True, exist_ok=True)
  data.mkdir(parents=True, exist_ok=True)   # a link to what is not there counts as none
  if not (workdir / 'data').exists():
    (workdir / 'data').symlink_to(os.path.relpath(data, workdir), target_is_directory=True)


def begun(study: pathlib.Path, name: str, settings: Any) -> bool:
  """Whether `<study>/<name>` holds these settings, and not none yet: `begin` writes them.

  ValueError where it holds others, or the study is the workdir of a run; OSError where it cannot be written.
  """
  records.make(study)
  if records.read(study):
    raise ValueError(f'{study} is the workdir of a run; choose another --workdir')
  path = study / name
  if not path.exists():
    return False
  try:
    before = json.loads(path.read_text())
  except ValueError:
    raise ValueError(f'{path} is damaged; delete it, or choose another --workdir') from None
  if lines := differences(before, _as_json(settings)):
    more = [f'... and {len(lines) - 6} more'] if len(lines) > 6 else []
    raise ValueError(f'{study} was begun with other settings; choose another --workdir, or the same ones\n  '
                     + '\n  '.join([*lines[:6], *more]))
  return True


def begin(study: pathlib.Path, name: str, settings: Any) -> None:
  """Writes the settings down, once all that can be checked is: those of a study that was refused are not kept."""
  atomic.write(study / name, json.dumps(_as_json(settings), indent=2))


def _as_json(settings: Any) -> Any:
  return json.loads(json.dumps(settings, default=str))


def score(run: train.Run, result: train.Result, objective: Objective) -> dict[str, float]:
  """Metrics of `objective` over the whole validation split: with half a row of context, where that is possible."""
  step = evaluate.make_step(run.model.apply, objective, result.data.tokenizer)
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
  found.raise_if_stopped()
  return short, found


def curve(workdir: pathlib.Path, name: str = 'validation/bits_per_byte') -> list[tuple[int, float]]:
  """(step, value) of each evaluation."""
  rows = track.read_metrics(workdir / 'metrics.jsonl')
  return [(row['step'], row[name]) for row in rows if row.get(name) is not None]
