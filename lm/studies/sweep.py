"""Searches the values of an experiment's flags: the points of a grid, at random, or by halving."""
import math
import pathlib
import shlex
from collections.abc import Callable, Mapping
from typing import Literal

import jax

from lm import sharding, train
from lm.studies import runs, search, variants
from lm.workdir import atomic, figures


def sweep(*, knobs: str, experiment: pathlib.Path, workdir: pathlib.Path, common: str = '',
          method: Literal['grid', 'random', 'halving'] = 'grid', trials: int | None = None,
          metric: Literal['bits_per_byte', 'loss'] = 'bits_per_byte', seed: int = 0,
          mesh: str | None = None) -> list[search.Trial]:
  """Trains an experiment with many values of its flags, and returns the trials, the best first.

  `knobs` is as in `search.space`, and `method` as in `search.Study`; without `trials` they are the whole grid, or 20.
  A sweep that was stopped goes on in its workdir. ImportError without Optuna; ValueError for knobs or settings that do
  not fit the experiment.
  """
  if trials is not None and trials < 1:
    raise ValueError(f'--trials={trials}: take one at least')
  search.optuna()   # raises
  function, devices = variants.experiment(experiment), sharding.make_mesh(mesh)
  space = search.space(knobs, lambda name, value: variants.knobs(function, f'{common} {written({name: value})}')[name])
  size = search.combinations(space) if method == 'grid' else None
  trials = min(trials or size or 20, size or math.inf)
  first = {name: values.values[0] if isinstance(values, search.Choice) else repr(values.low)
           for name, values in space.items()}
  arm = variants.Arm('', function, variants.knobs(function, f'{common} {written(first)}'))
  with jax.set_mesh(devices):
    train.check(first_run := arm.make(seed), devices)
    check_texts(space, lambda values: variants.Arm(
        '', function, variants.knobs(function, f'{common} {written({**first, **values})}')), first_run)
  settings = {'experiment': experiment.name, 'knobs': knobs, 'common': common, 'method': method, 'metric': metric,
              'seed': seed}
  continued = runs.is_continued(workdir, 'sweep.json', settings)
  with jax.set_mesh(devices):
    runs.open_data(workdir, [arm])
  study = search.Study(workdir / 'trials.jsonl', space, method, seed)
  if not continued:
    runs.begin(workdir, 'sweep.json', settings)
  for trial in study.ask(trials):
    print(f'\n--- trial {trial.number + 1} of {trials}: {written(trial.knobs)}', flush=True)
    arm = variants.Arm(f'trial-{trial.number}', function, variants.knobs(function, f'{common} {written(trial.knobs)}'))
    try:
      trial.tell(value(arm, trial, metric, workdir, seed, devices))
    except (train.NotFinite, Impossible) as error:
      print(f'it has no result: {error}')
      trial.tell(math.inf)
  report(study.finished(), space, metric, workdir)
  return study.finished()


def check_texts(space: search.Space, arm: Callable[[dict[str, str]], variants.Arm], first: train.Run) -> None:
  """ValueError where a listed value of a knob gives runs another text to be validated on than the first trial's."""
  for name, values in space.items():
    for value in values.values[1:] if isinstance(values, search.Choice) else ():
      try:
        run = arm({name: value}).make()
      except ValueError:   # it does not go with the other first values, perhaps with others
        continue
      runs.check_same_text(f'--{name}={value}', run, f'--{name}={values.values[0]}', first)


def written(knobs: Mapping[str, str], before: str = '') -> str:
  """Returns knobs as text that `variants.knobs` reads, each with `before` in front."""
  return ' '.join(f'{before}{name}={shlex.quote(value)}' for name, value in knobs.items())


class Impossible(Exception):
  """Knobs that do not go together."""


def value(arm: variants.Arm, trial: search.RunningTrial, metric: str, workdir: pathlib.Path, seed: int,
          mesh: jax.sharding.Mesh) -> float:
  """Returns the last value of the metric of a trial. Impossible where its knobs do not go together; NotFinite."""
  try:
    run = arm.make(seed)
    with jax.set_mesh(mesh):
      train.check(run, mesh)
      runs.open_data(workdir, [arm])
  except ValueError as error:
    raise Impossible(error) from None
  name = f'validation/{metric}'
  watch = lambda step, metrics: trial.report(-(-step // run.evaluate_every), metrics[name])
  last = runs.go(workdir, arm, seed, mesh, watch)[2].metrics[name]
  if not math.isfinite(last):
    raise train.NotFinite(f'its {metric} is {last}')
  return last


def report(trials: list[search.Trial], knobs: search.Space, metric: str, workdir: pathlib.Path) -> None:
  """Prints the table of a sweep, and writes it and the figure to its workdir."""
  lines = [f'| {" | ".join(knobs)} | {metric} | |', '|---' * (len(knobs) + 2) + '|']
  for trial in trials:
    values = [f'{float(v):.4g}' if isinstance(knobs[name], search.Range) else str(v) for name, v in trial.knobs.items()]
    remark = 'no result' if math.isinf(trial.value) else ''
    if trial.pruned:
      remark = f'stopped at evaluation {trial.evaluations}'
    lines.append(f'| {" | ".join(values)} | {trial.value:.4f} | {remark} |')
  print('\n' + '\n'.join(lines))
  atomic.write(workdir / 'sweep.md', '\n'.join(lines) + '\n')
  figures.sweep(workdir / 'sweep.png', [(trial.knobs, trial.value, trial.pruned) for trial in trials], metric)
  best = written(trials[0].knobs, '--') if math.isfinite(trials[0].value) else 'none, no trial has a result'
  print(f'\nthe best: {best}\nwritten to {workdir}: sweep.md, sweep.png, and a folder for each trial')
