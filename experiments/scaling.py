"""Fits a scaling law: trains several sizes at several budgets, predicts the loss of a larger run, and trains that too.

  python experiments/scaling.py

The law is L(N, D) = E + A / N^alpha + B / D^beta, fitted to the validation losses. D is the number of tokens. N is the
FLOPs of a token divided by 6, which includes the output head and attention, and is about the number of parameters of a
large model. 17 runs take 7 minutes on 2 CPU cores and give L = 1.934 + 93.4 / N^0.381 + 668 / D^0.490, where the
interval of E is [0, 2.8]. The prediction for N = 1.2 M and D = 0.82 M is 3.233 [3.073, 3.473], and the outcome is
3.457, at the upper end of the interval. The larger sizes lose by having the same learning rate as the small ones: the
fourth size, too, ends 0.16 above the law.
"""
import json
import math
import pathlib

import jax
import numpy as np

from lm import launch, sharding, train
from lm.studies import costs, scaling, variants
from lm.studies import runs as arms
from lm.workdir import atomic, figures

SCRIPT = pathlib.Path(__file__).with_name('pretrain.py')
SIZES = 'width=32 heads=1; width=64 heads=1; width=96 heads=2; width=128 heads=2'
COMMON = ('layers=2 vocab=1024 length=128 batch=8 optimizer=muon lr=0.015 schedule=linear warmup=20 '
          'evaluate_batches=none')


def ladder(*, sizes: str = SIZES, budgets: tuple[int, ...] = (100, 200, 400, 800),
           next_size: str = 'width=192 heads=3', next_budget: int = 800, common: str = COMMON,
           experiment: pathlib.Path = SCRIPT, seed: int = 0,
           workdir: pathlib.Path = pathlib.Path('runs/scaling'), mesh: str | None = None) -> None:
  """Fits a scaling law and tests it.

  Args:
    sizes: knobs of each size, separated by ; (knobs are flags of the experiment).
    budgets: numbers of training steps; each size is trained for each number, with a complete schedule.
    next_size: knobs of the size that is predicted.
    next_budget: number of its training steps.
    common: knobs of all runs.
    experiment: script whose function `experiment` makes the runs.
    seed: seed of all runs.
    workdir: folder of the runs; a stopped study continues from there.
    mesh: the size of each mesh axis, such as fsdp:4,tensor:2; none puts all devices on fsdp.
  """
  function, devices = variants.experiment(experiment), sharding.make_mesh(mesh)
  written = [' '.join(size.split()) for size in sizes.split(';') if size.strip()]
  if len(set(written)) < 2 or len(set(budgets)) < 2 or len(set(written)) * len(set(budgets)) < 6:
    raise ValueError(f'{len(set(written))} sizes at {len(set(budgets))} budgets do not determine a law of 5 numbers; '
                     'give at least 2 of each, and 6 runs in all')
  rungs = [(size, steps) for size in written for steps in sorted(budgets)]
  runs = [variants.Arm(name(size, steps), function, variants.knobs(function, f'{common} {size} steps={steps}'))
          for size, steps in [*rungs, (next_size, next_budget)]]
  with jax.set_mesh(devices):
    places = [place(arm.make(seed), devices) for arm in runs]
    if early := [arm.name for arm in runs if arm.make(seed).patience]:
      raise ValueError(f'{early[0]} has a patience, but the runs of a law must train to their end; leave it out')
  settings = {'experiment': experiment.name, 'common': common, 'seed': seed}
  continued = arms.is_continued(workdir, 'scaling.json', settings)
  with jax.set_mesh(devices):
    arms.open_data(workdir, runs)
  if not continued:
    arms.begin(workdir, 'scaling.json', settings)
  points = []
  for i, (arm, (n, d)) in enumerate(zip(runs[:-1], places)):
    print(f'\n--- run {i + 1} of {len(runs)}: {arm.name}, N = {n:,.0f}, D = {d:,.0f}', flush=True)
    points.append((n, d, loss(workdir, arm, seed, devices)))
  law = scaling.fit(points)
  laws = scaling.bootstrap(points, law)
  predicted = scaling.predict(points, law, laws, *places[-1])
  lines = summary(points, law, laws)
  lines += ['', f'predicted for {runs[-1].name}, N = {places[-1][0]:,.0f}, D = {places[-1][1]:,.0f}: '
            f'{predicted[0]:.4f} [{predicted[1]:.4f}, {predicted[2]:.4f}]']
  print('\n' + '\n'.join(lines) + f'\n\n--- run {len(runs)} of {len(runs)}: {runs[-1].name}', flush=True)
  outcome = loss(workdir, runs[-1], seed, devices)
  inside = 'inside' if predicted[1] <= outcome <= predicted[2] else 'outside'
  lines.append(f'outcome: {outcome:.4f}, {inside} the interval')
  print('\n' + '\n'.join(lines[-2:]))
  atomic.write(workdir / 'scaling.md', '\n'.join(lines) + '\n')
  figures.scaling(workdir / 'scaling.png', points, law, (*places[-1], *predicted), outcome)
  print(f'\nwritten to {workdir}: scaling.md, scaling.png, and a folder for each run')


def name(size: str, steps: int) -> str:
  return f'{size.replace(" ", ",")}-{steps}'


def place(run: train.Run, mesh: jax.sharding.Mesh) -> tuple[float, float]:
  """Returns (N, D): the FLOPs of a token divided by 6, and the number of tokens."""
  plain = costs.cost(run, 'flops', mesh, optimizer=False)
  return plain / costs.cost(run, 'tokens', mesh) / 6, float(run.schedule.tokens_before(run.steps))


def loss(study: pathlib.Path, arm: variants.Arm, seed: int, mesh: jax.sharding.Mesh) -> float:
  """Returns the validation loss in nats per token; trains the run if its result is not stored yet."""
  result_file = study / arm.name / f'seed-{seed}' / 'final.json'
  if not result_file.exists():
    _, _, result = arms.go(study, arm, seed, mesh)
    if not math.isfinite(nll := result.metrics['validation/nll']):
      raise train.NotFinite(f'{arm.name} diverged; lower its learning rate')
    atomic.write(result_file, json.dumps({'nll': nll}))
  return json.loads(result_file.read_text())['nll']


def summary(points: scaling.Points, law: scaling.Law, laws: list[scaling.Law]) -> list[str]:
  """Returns the lines of a table of the runs, the law, and the intervals of its numbers."""
  lines = ['| N | D | loss | the law |', '|---|---|---|---|']
  lines += [f'| {n:,.0f} | {d:,.0f} | {value:.4f} | {float(law(n, d)):.4f} |' for n, d, value in points]
  intervals = []
  for field in ('E', 'A', 'alpha', 'B', 'beta'):
    low, high = np.quantile([getattr(sample, field) for sample in laws], [0.025, 0.975])
    intervals.append(f'{field} [{low:.3g}, {high:.3g}]')
  return [*lines, '', str(law), f'95 % intervals: {", ".join(intervals)}']


if __name__ == '__main__':
  launch.tool(ladder)
