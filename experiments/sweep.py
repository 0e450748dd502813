"""Search over the knobs of an experiment, learning rate and batch size first: a grid, at random, or by halving.

  python experiments/sweep.py --knobs='lr=1e-3:3e-2:log; batch=8,16' --method=random --trials=8 \
      --common='layers=2 width=128 heads=2 vocab=2048 length=256 steps=200'

Each trial is a run of its own in the workdir; a sweep that was stopped goes on. Needs `pip install -e '.[sweep]'`.
"""
import math
import pathlib
from typing import Literal

import jax

from lm import arms, atomic, launch, plot, search, sharding, train

SCRIPT = pathlib.Path(__file__).with_name('pretrain.py')


def sweep(*, knobs: str, common: str = '', experiment: pathlib.Path = SCRIPT,
          method: Literal['grid', 'random', 'halving'] = 'grid', trials: int | None = None,
          metric: Literal['bits_per_byte', 'loss'] = 'bits_per_byte', seed: int = 0,
          workdir: pathlib.Path = pathlib.Path('runs/sweep'), mesh: str | None = None) -> list[search.Trial]:
  """Trains an experiment with many knobs.

  Args:
    knobs: what is searched, as 'lr=1e-4:1e-2:log; batch=8,16,32', ranges or lists.
    common: the other knobs, as 'layers=2 width=128'.
    experiment: the script whose function `experiment` makes the runs.
    method: all combinations of listed values, points at random, or points at random of which only the best third goes
      on at evaluation 1, 3, 9, and so on.
    trials: how many; none for the whole grid, or 20.
    metric: of the validation split, what is to be low.
    seed: of the runs, and of the points.
    workdir: where the runs live; one that was stopped goes on from there.
    mesh: the devices as DATAxMODEL, such as 8x1; none puts all of them on data.
  """
  function, devices = arms.experiment(experiment), sharding.make_mesh(mesh)
  convert = lambda name, value: arms.knobs(function, f'{common} {name}={value}')[name]
  found = search.space(knobs, convert)
  with jax.set_mesh(devices):
    train.check(arms.Arm('', function, arms.knobs(function, common)).make(seed), devices)
  arms.check_same(workdir, 'sweep.json', {'experiment': experiment.name, 'knobs': knobs, 'common': common,
                                          'method': method, 'metric': metric, 'seed': seed})
  study = search.Study(workdir / 'trials.jsonl', found, method, seed)
  trials = trials or study.size or 20
  for asked in study.ask(min(trials, study.size or trials)):
    written = ' '.join(f'{name}={value}' for name, value in asked.knobs.items())
    print(f'\n--- trial {asked.number + 1} of {trials}: {written}', flush=True)
    arm = arms.Arm(f'trial-{asked.number}', function, arms.knobs(function, f'{common} {written}'))
    try:
      asked.tell(value(arm, asked, metric, workdir, seed, devices))
    except (train.NotFinite, Impossible) as error:
      print(f'it has no result: {error}')
      asked.tell(math.inf)
  report(study.done(), found, metric, workdir)
  return study.done()


class Impossible(Exception):
  """Knobs that do not go together."""


def value(arm: arms.Arm, asked: search.Asked, metric: str, workdir: pathlib.Path, seed: int, mesh: jax.sharding.Mesh
          ) -> float:
  try:
    every = arm.make(seed).evaluate_every
  except ValueError as error:
    raise Impossible(error) from None
  watch = lambda step, metrics: asked.report(-(-step // every), metrics[metric])
  return arms.go(workdir, arm, seed, mesh, watch)[2].metrics[metric]


def report(done: list[search.Trial], knobs: search.Space, metric: str, workdir: pathlib.Path) -> None:
  lines = [f'| {" | ".join(knobs)} | {metric} | |', '|---' * (len(knobs) + 2) + '|']
  for trial in done:
    values = [f'{float(v):.4g}' if isinstance(knobs[name], search.Range) else str(v) for name, v in trial.knobs.items()]
    how = f'left at evaluation {trial.evaluations}' if trial.pruned else 'no result' if math.isinf(trial.value) else ''
    lines.append(f'| {" | ".join(values)} | {trial.value:.4f} | {how} |')
  print('\n' + '\n'.join(lines))
  atomic.write(workdir / 'sweep.md', '\n'.join(lines) + '\n')
  plot.sweep(workdir / 'sweep.png', [(t.knobs, t.value, t.pruned) for t in done], metric)
  best = ' '.join(f'--{name}={value}' for name, value in done[0].knobs.items())
  print(f'\nthe best: {best}\nwritten to {workdir}: sweep.md, sweep.png, and a folder for each trial')


if __name__ == '__main__':
  launch.tool(sweep)
