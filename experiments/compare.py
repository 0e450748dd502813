"""Which is better, and is it? Arms (an experiment with other knobs) on the same seeds, with equal compute.

  python experiments/compare.py --arms='adamw: optimizer=adamw lr=3e-3; muon: optimizer=muon lr=0.015' \
      --common='layers=2 width=128 heads=2 vocab=2048 length=256 batch=8 steps=300' --seeds=5

The first arm is the one that the others are compared with. Of each arm: bits per byte of the whole validation text, the
difference by pairs of seeds, the speed-up to the baseline's final loss, and a verdict, all with intervals.
Arms that do not learn to predict the next token are brought to it, all arms alike, by --adapt steps.
"""
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Literal

import jax

from lm import launch, sharding, train
from lm.objectives.infill import infill
from lm.objectives.next_token import next_token
from lm.studies import costs, statistics, variants
from lm.studies import runs as arms
from lm.workdir import atomic, figures

SCRIPT = pathlib.Path(__file__).with_name('pretrain.py')


def check(found: Sequence[variants.Arm], adapt: int) -> list[train.Run]:
  """The runs; ValueError where they have no common yardstick."""
  runs = [arm.make() for arm in found]
  for arm, run in zip(found, runs):
    if not run.model.causal or run.data.source_length is not None:
      raise ValueError(f'{arm.name} has no common yardstick with other arms: its model does not predict a next token '
                       'from those before it alone; compare decoders')
    arms.check_same_text(arm.name, run, found[0].name, runs[0])
    if not is_next_token(run) and not adapt:
      raise ValueError(f'{arm.name} does not learn to predict the next token, so it has no common yardstick with the '
                       'others yet; let all be adapted to it for some steps, such as --adapt=100')
    if run.constants:
      raise ValueError(f'{arm.name} trains beside constant parameters, which a comparison cannot give it')
    if run.data.columns:
      raise ValueError(f'{arm.name} reads {", ".join(run.data.columns)}, stored with its data for one seed and length; '
                       'compare arms that read text alone')
  return runs


def is_next_token(run: train.Run) -> bool:
  return run.objective.forms == next_token().forms


def told(study: pathlib.Path, arm: variants.Arm, seed: int) -> pathlib.Path:
  return study / arm.name / f'seed-{seed}' / 'final.json'


def finish(run: train.Run, workdir: pathlib.Path, result: train.Result, mesh: jax.sharding.Mesh, equal: str,
           adapt: int, adapt_lr: float) -> None:
  """Writes what is compared of a trained run; its curve is over shares of the compute that it was given.

  NotFinite where the run diverged; an adaptation that does is left out, and why is written too.
  """
  values, left_out = {}, {}
  with jax.set_mesh(mesh):
    if is_next_token(run):
      values['bits/byte'] = finite('bits/byte', arms.score(run, result, next_token())['bits_per_byte'])
    for name, objective, metric in (('adapted bits/byte', next_token(), 'bits_per_byte'),
                                    ('infilling accuracy', infill(1.), 'accuracy')) if adapt else ():
      try:
        short, adapted = arms.adapt(run, workdir / f'adapted-{name.split()[0]}', result, objective, adapt, adapt_lr)
        values[name] = finite(name, arms.score(short, adapted, objective)[metric])
      except train.NotFinite as error:
        left_out[name] = f'adapted from --adapt_lr={adapt_lr}, {error}'
    spent = costs.spending(run, equal if run.stages else 'steps', mesh)
  curve = [(spent(step) / spent(run.steps), value) for step, value in arms.curve(workdir)] if is_next_token(run) else []
  write(workdir, values, curve, left_out)


def finite(name: str, value: float) -> float:
  if not math.isfinite(value):
    raise train.NotFinite(f'its {name} is {value}; lower the learning rate')
  return value


def write(workdir: pathlib.Path, values: dict[str, float], curve: list[tuple[float, float]], left_out: dict[str, str]
          ) -> None:
  """The result of a run; `left_out` says of metrics why it does not have them."""
  for name, why in left_out.items():
    print(f'it has no {name}: {why}')
  atomic.write(workdir / 'final.json', json.dumps({'values': values, 'curve': curve, 'left_out': left_out}))


def table(names: Sequence[str], results: dict[str, list[dict]], metric: str) -> list[str]:
  """Lines of Markdown: each arm beside the first of those that have the metric. Lower is better, but for an accuracy.
  """
  sign = -1 if 'accuracy' in metric else 1
  names = having(names, results, metric)
  values = {name: [result['values'][metric] for result in results[name]] for name in names}
  sooner = {name: times(statistics.speed_up(*([result['curve'] for result in results[n]] for n in (name, names[0]))))
            for name in names[1:] if metric == 'bits/byte'}
  has_speed_up = any(sooner.values())   # none is, of curves of one evaluation
  speed_up = ["speed-up to the baseline's final loss"] if has_speed_up else []
  titles = ['arm', metric, f'difference to {names[0]}', *speed_up, 'verdict']
  lines = [f'| {" | ".join(titles)} |', '|---' * len(titles) + '|']
  for name in names:
    own = statistics.interval(values[name])
    if name == names[0]:
      lines.append(f'| {name} | {own} ' + '| ' * (len(titles) - 2) + '|')
      continue
    verdict = statistics.judge([sign * v for v in values[name]], [sign * v for v in values[names[0]]], len(names) - 1)
    low, high = sorted((sign * verdict.difference.low, sign * verdict.difference.high))
    difference = statistics.Interval(sign * verdict.difference.mean, low, high)
    columns = [name, str(own), str(difference), *([sooner[name]] if has_speed_up else []), str(verdict)]
    lines.append(f'| {" | ".join(columns)} |')
  return lines


def having(names: Sequence[str], results: dict[str, list[dict]], metric: str) -> list[str]:
  """The arms that have a metric, for each seed."""
  return [name for name in names if all(metric in result['values'] for result in results[name])]


def times(sooner: statistics.Interval | None) -> str:
  if sooner is None:
    return ''
  return f'{sooner.mean:.2f}x [{sooner.low:.2f}, {sooner.high:.2f}]'


def compare(*, arms_text: str, workdir: pathlib.Path, experiment: pathlib.Path = SCRIPT, common: str = '',
            seeds: int = 5, equal: str = 'steps', budget: float | None = None, adapt: int = 0, adapt_lr: float = 1e-3,
            mesh: str | None = None) -> dict[str, list[dict]]:
  """Results of each arm, a dict a seed; prints the tables and draws `compare.png`."""
  if seeds < 2:
    raise ValueError(f'--seeds={seeds} is too few for an interval; give --seeds=2 or more')
  if adapt < 0 or not 0 < adapt_lr < math.inf:
    raise ValueError(f'--adapt={adapt} steps from --adapt_lr={adapt_lr}: steps are 0 or more, a rate is above 0')
  function = variants.experiment(experiment)
  found = variants.arms(function, arms_text, common)
  if len(found) < 2:
    raise ValueError(f'--arms names {found[0].name} alone; a comparison has two arms at least')
  devices = sharding.make_mesh(mesh)
  with jax.set_mesh(devices):
    for run in check(found, adapt):
      train.check(run, devices)
    asked = {'experiment': experiment.name, 'arms': {arm.name: arm.knobs for arm in found}, 'equal': equal,
             'budget': budget, 'adapt': adapt, 'adapt_lr': adapt_lr}
    begun = arms.is_continued(workdir, 'compare.json', asked)
    found, amount = steps_once(workdir, begun, found, equal, budget, devices)
    arms.open_data(workdir, found, control=infill().control if adapt else ())
  if not begun:
    arms.begin(workdir, 'compare.json', asked)
  print(f'equal {equal}: {amount:,.4g} each; ' + ', '.join(f'{arm.name} {arm.knobs["steps"]:,} steps' for arm in found))
  missing = {arm.name: [seed for seed in range(seeds) if not told(workdir, arm, seed).exists()] for arm in found}
  for seed in range(seeds):   # by seed, so that a comparison that is stopped has pairs
    for i, arm in enumerate(found):
      if seed in missing[arm.name]:
        print(f'\n--- run {seed * len(found) + i + 1} of {seeds * len(found)}: {arm.name}, seed {seed}', flush=True)
        try:
          finish(*arms.go(workdir, arm, seed, devices), devices, equal, adapt, adapt_lr)
        except train.NotFinite as error:
          write(told(workdir, arm, seed).parent, {}, [], {'result': str(error)})
  results = {arm.name: [json.loads(told(workdir, arm, seed).read_text()) for seed in range(seeds)] for arm in found}
  report(results, workdir, f'share of {amount:,.4g} {equal}')
  return results


def steps_once(study: pathlib.Path, begun: bool, found: list[variants.Arm], equal: str, budget: float | None,
               mesh: jax.sharding.Mesh) -> tuple[list[variants.Arm], float]:
  """As `costs.equal`; what was found when the study was begun (seconds are measured) stays."""
  path = study / 'steps.json'
  if begun:
    before = json.loads(path.read_text())
    return [arm.with_steps(before['steps'][arm.name]) for arm in found], before['amount']
  found, amount = costs.equal(found, equal, budget, mesh)
  atomic.write(path, json.dumps({'amount': amount, 'steps': {arm.name: arm.knobs['steps'] for arm in found}}))
  return found, amount


def report(results: dict[str, list[dict]], workdir: pathlib.Path, compute: str) -> None:
  names = list(results)
  metrics = dict.fromkeys(metric for found in results.values() for result in found for metric in result['values'])
  lines = []
  for metric in metrics:
    if having(names, results, metric):
      lines += ['', *table(names, results, metric)]
  for name, found in results.items():
    for metric in dict.fromkeys(metric for result in found for metric in result['left_out']):
      why = {seed: result['left_out'][metric] for seed, result in enumerate(found) if metric in result['left_out']}
      lines += ['', f'{name} has no {metric}, for {len(why)} of its seeds; seed {min(why)}: {why[min(why)]}']
  count = len(results[names[0]])
  lines += ['', f'{count} seeds; [95 % intervals over seeds]; the intervals of a table hold for all of '
            'its rows at once. '
            'Bits/byte are of the whole validation text, read with half a row before it where rows allow it; curves '
            'are of the evaluations during training, which read rows as they are.']
  print('\n'.join(lines))
  atomic.write(workdir / 'compare.md', '\n'.join(lines[1:]) + '\n')
  metric = max(metrics, key=lambda metric: len(having(names, results, metric)), default='')   # that most arms have
  if names := having(names, results, metric):
    figures.comparison(workdir / 'compare.png', {name: [r['curve'] for r in results[name]] for name in names},
                    {name: [r['values'][metric] for r in results[name]] for name in names}, metric, compute)
  print(f'\nwritten to {workdir}: compare.md, {"compare.png, " if names else ""}and a folder for each arm and seed')


def main(*, arms: str, common: str = '', experiment: pathlib.Path = SCRIPT, seeds: int = 5,
         equal: Literal['steps', 'tokens', 'flops', 'seconds'] = 'steps', budget: float | None = None, adapt: int = 0,
         adapt_lr: float = 1e-3,
         workdir: pathlib.Path = pathlib.Path('runs/compare'), mesh: str | None = None) -> None:
  """Compares arms.

  Args:
    arms: the arms, as 'name: knob=value knob=value; other: ...'; knobs are the flags of the experiment.
    common: knobs of all arms.
    experiment: the script whose function `experiment` makes the runs.
    seeds: how many, of each arm the same; more can be added later.
    equal: in what arms are equal, steps, tokens, FLOPs of matrix products, or seconds on this machine.
    budget: how much of it each arm gets; none for what the first arm takes as it is.
    adapt: steps of next-token prediction, and of infilling, after which all arms are scored too; 0 for none.
    adapt_lr: the rate at which these begin.
    workdir: where the runs live; one that was stopped goes on from there.
    mesh: the size of each mesh axis, such as data:4,model:2; none puts all devices on data.
  """
  compare(arms_text=arms, workdir=workdir, experiment=experiment, common=common, seeds=seeds, equal=equal,
          budget=budget, adapt=adapt, adapt_lr=adapt_lr, mesh=mesh)


if __name__ == '__main__':
  launch.tool(main)
