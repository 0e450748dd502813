"""Search over the knobs of an experiment, learning rate and batch size first: a grid, at random, or by halving.

  python experiments/sweep.py --knobs='lr=1e-3:3e-2:log; batch=8,16' --method=random --trials=8 \
      --common='layers=2 width=128 heads=2 vocab=2048 length=256 steps=200'

Each trial is a run of its own in the workdir; a sweep that was stopped goes on. Needs `pip install -e '.[sweep]'`.
"""
import math
import pathlib
import shlex
from collections.abc import Callable, Mapping
from typing import Literal

import jax

from lm import launch, sharding, train
from lm.studies import runs, search, variants
from lm.workdir import atomic, figures

SCRIPT = pathlib.Path(__file__).with_name('pretrain.py')


def sweep(*, knobs: str, common: str = '', experiment: pathlib.Path = SCRIPT,
          method: Literal['grid', 'random', 'halving'] = 'grid', trials: int | None = None,
          metric: Literal['bits_per_byte', 'loss'] = 'bits_per_byte', seed: int = 0,
          workdir: pathlib.Path = pathlib.Path('runs/sweep'), mesh: str | None = None) -> list[search.Trial]:
  """Trains an experiment with many knobs.

  Args:
    knobs: what is searched, as 'lr=1e-4:1e-2:log; batch=8,16,32', ranges or lists; the first values of all have to go
      together, other combinations that do not have no result.
    common: the other knobs, as 'layers=2 width=128'.
    experiment: the script whose function `experiment` makes the runs.
    method: all combinations of listed values, points at random, or points at random of which only the best third goes
      on at evaluation 1, 3, 9, and so on.
    trials: how many; none for the whole grid, or 20.
    metric: of the validation split, what is to be low.
    seed: of the runs, and of the points.
    workdir: where the runs live; one that was stopped goes on from there.
    mesh: the size of each mesh axis, such as data:4,model:2; none puts all devices on data.
  """
  if trials is not None and trials < 1:
    raise ValueError(f'--trials={trials}: take one at least')
  search.optuna()   # raises
  function, devices = variants.experiment(experiment), sharding.make_mesh(mesh)
  found = search.space(knobs, lambda name, value: variants.knobs(function, f'{common} {written({name: value})}')[name])
  size = search.combinations(found) if method == 'grid' else None
  trials = min(trials or size or 20, size or math.inf)
  first = {name: values.values[0] if isinstance(values, search.Choice) else repr(values.low)
           for name, values in found.items()}
  arm = variants.Arm('', function, variants.knobs(function, f'{common} {written(first)}'))
  with jax.set_mesh(devices):
    train.check(first_run := arm.make(seed), devices)
    check_texts(found, lambda values: variants.Arm(
        '', function, variants.knobs(function, f'{common} {written({**first, **values})}')), first_run)
  settings = {'experiment': experiment.name, 'knobs': knobs, 'common': common, 'method': method, 'metric': metric,
              'seed': seed}
  begun = runs.is_continued(workdir, 'sweep.json', settings)
  with jax.set_mesh(devices):
    runs.open_data(workdir, [arm])
  study = search.Study(workdir / 'trials.jsonl', found, method, seed)
  if not begun:
    runs.begin(workdir, 'sweep.json', settings)
  for asked in study.ask(trials):
    print(f'\n--- trial {asked.number + 1} of {trials}: {written(asked.knobs)}', flush=True)
    arm = variants.Arm(f'trial-{asked.number}', function, variants.knobs(function, f'{common} {written(asked.knobs)}'))
    try:
      asked.tell(value(arm, asked, metric, workdir, seed, devices))
    except (train.NotFinite, Impossible) as error:
      print(f'it has no result: {error}')
      asked.tell(math.inf)
  report(study.done(), found, metric, workdir)
  return study.done()


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
  return ' '.join(f'{before}{name}={shlex.quote(value)}' for name, value in knobs.items())


class Impossible(Exception):
  """Knobs that do not go together."""


def value(arm: variants.Arm, trial: search.RunningTrial, metric: str, workdir: pathlib.Path, seed: int,
          mesh: jax.sharding.Mesh) -> float:
  try:
    run = arm.make(seed)
    with jax.set_mesh(mesh):
      train.check(run, mesh)
      runs.open_data(workdir, [arm])
  except ValueError as error:
    raise Impossible(error) from None
  name = f'validation/{metric}'
  watch = lambda step, metrics: trial.report(-(-step // run.evaluate_every), metrics[name])
  found = runs.go(workdir, arm, seed, mesh, watch)[2].metrics[name]
  if not math.isfinite(found):
    raise train.NotFinite(f'its {metric} is {found}')
  return found


def report(done: list[search.Trial], knobs: search.Space, metric: str, workdir: pathlib.Path) -> None:
  lines = [f'| {" | ".join(knobs)} | {metric} | |', '|---' * (len(knobs) + 2) + '|']
  for trial in done:
    values = [f'{float(v):.4g}' if isinstance(knobs[name], search.Range) else str(v) for name, v in trial.knobs.items()]
    how = f'left at evaluation {trial.evaluations}' if trial.pruned else 'no result' if math.isinf(trial.value) else ''
    lines.append(f'| {" | ".join(values)} | {trial.value:.4f} | {how} |')
  print('\n' + '\n'.join(lines))
  atomic.write(workdir / 'sweep.md', '\n'.join(lines) + '\n')
  figures.sweep(workdir / 'sweep.png', [(t.knobs, t.value, t.pruned) for t in done], metric)
  best = written(done[0].knobs, '--') if math.isfinite(done[0].value) else 'none, no trial has a result'
  print(f'\nthe best: {best}\nwritten to {workdir}: sweep.md, sweep.png, and a folder for each trial')


if __name__ == '__main__':
  launch.tool(sweep)
