"""Runs of an experiment with other knobs, beside one another: what comparisons, sweeps and ladders are made of.

A study is a folder: `<study>/<name>/seed-<n>` is the workdir of a run, as any other; runs whose data are the same share
`<study>/data-<...>/data`, by links. What is done is not done again.
"""
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lm import launch, optim, train
from lm.data.batch import Room
from lm.objectives.objective import Objective
from lm.optim import schedules
from lm.studies.variants import Arm
from lm.train import validation
from lm.workdir import atomic, records, track
from lm.workdir.describe import describe, differences


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
  step = validation.make_step(run.model.apply, objective, result.data.tokenizer)
  plain = all(form.room == Room() for form in objective.forms)
  context = {'context': run.data.length // 2} if plain else {}
  held_out = result.data.batches('validation', objective, run.batch, seed=None if plain else 0, repeat=False, **context)
  return validation.evaluate(step, result.params, held_out, result.mesh)


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
