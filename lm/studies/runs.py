"""The runs of a study: a comparison, a sweep, or a ladder of sizes.

A study is a folder. `<study>/<name>/seed-<n>` is the workdir of a run like any other. Runs that read the same data
share it: each links to `<study>/data-<digest>/data`. A run that is finished is not trained again.
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
  """Trains an arm in its own workdir, from its newest checkpoint. KeyboardInterrupt where a signal stops it."""
  workdir = study / arm.name / f'seed-{seed}'
  link(workdir, shared(study, arm.make()) / 'data')
  run, result = launch.start(arm.function, arm.knobs, workdir, mesh, seed=seed, watch=watch)
  return run, workdir, result


def shared(study: pathlib.Path, run: train.Run) -> pathlib.Path:
  """Returns the folder of the data of a run, which all runs share whose data differ in nothing but lengths."""
  facts = {name: value for name, value in describe(run.data).items() if name not in ('length', 'source_length')}
  return study / f'data-{hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]}'


def open_data(study: pathlib.Path, arms: Sequence[Arm], control: tuple[str, ...] = ()) -> None:
  """Tokenises the data of the arms, unless that was done before, so that errors in it come before any training.

  `control` names tokens that are needed beside those of the arms' objectives. Raises what `Data.open` raises, and
  ValueError where the vocabulary of a model is too small.
  """
  opened = {}
  for run in (arm.make() for arm in arms):
    folder, tokens = shared(study, run), (*run.objective.control, *control)
    if (folder, tokens) not in opened:
      opened[folder, tokens] = run.data.open(folder, control=tokens)
    train.check_vocabulary(run, opened[folder, tokens])


def check_same_text(name: str, run: train.Run, other_name: str, other: train.Run) -> None:
  """ValueError where two runs are not validated on the same text, so that their losses cannot be compared."""
  if run.data.text_fingerprint != other.data.text_fingerprint:
    raise ValueError(f'{name} and {other_name} cannot be compared: they are validated on different texts; give all of '
                     'them the same corpus, cut and cleaned in the same way')


def link(workdir: pathlib.Path, data: pathlib.Path) -> None:
  workdir.mkdir(parents=True, exist_ok=True)
  data.mkdir(parents=True, exist_ok=True)   # a link to what is not there counts as none
  if not (workdir / 'data').exists():
    (workdir / 'data').symlink_to(os.path.relpath(data, workdir), target_is_directory=True)


def is_continued(study: pathlib.Path, name: str, settings: Any) -> bool:
  """Whether the study was started before, with these settings, which `begin` wrote to `<study>/<name>`.

  ValueError where it was started with others, or is the workdir of a run; OSError where it cannot be written.
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
    omitted = [f'... and {len(lines) - 6} others'] if len(lines) > 6 else []
    raise ValueError(f'{study} was started with other settings; choose another --workdir, or give the same settings\n  '
                     + '\n  '.join([*lines[:6], *omitted]))
  return True


def begin(study: pathlib.Path, name: str, settings: Any) -> None:
  """Writes the settings of a study. Call it after all checks, so that a refused study leaves no settings behind."""
  atomic.write(study / name, json.dumps(_as_json(settings), indent=2))


def _as_json(settings: Any) -> Any:
  return json.loads(json.dumps(settings, default=str))


def score(run: train.Run, result: train.Result, objective: Objective) -> dict[str, float]:
  """Returns metrics of `objective` over the whole validation split, with half a row of context where forms allow it."""
  step = validation.make_step(run.model.apply, objective, result.data.tokenizer)
  plain = all(form.room == Room() for form in objective.forms)
  context = {'context': run.data.length // 2} if plain else {}
  held_out = result.data.batches('validation', objective, run.batch, seed=None if plain else 0, repeat=False, **context)
  return validation.evaluate(step, result.params, held_out, result.mesh)


def adapt(run: train.Run, workdir: pathlib.Path, result: train.Result, objective: Objective, steps: int, rate: float
          ) -> tuple[train.Run, train.Result]:
  """Trains the result of a run on `objective` for some further steps: AdamW, the rate falls from `rate` to 0."""
  schedule = schedules.warmup_linear(rate, steps, steps // 10)
  short = train.Run(run.model, objective, run.data, optim.adamw(schedule), steps, run.batch, run.accumulate, run.seed,
                    steps, run.evaluate_batches, steps, 1, start=lambda model: jax.tree.map(jnp.copy, result.params))
  link(workdir, workdir.parent / 'data')
  adapted = train.train(short, workdir, result.mesh)
  adapted.raise_if_stopped()
  return short, adapted


def curve(workdir: pathlib.Path, name: str = 'validation/bits_per_byte') -> list[tuple[int, float]]:
  """Returns (step, value) of each evaluation."""
  rows = track.read_metrics(workdir / 'metrics.jsonl')
  return [(row['step'], row[name]) for row in rows if row.get(name) is not None]
