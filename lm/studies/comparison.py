"""Compares arms, which are an experiment with other values of its flags, on the same seeds with equal compute."""
import json
import math
import pathlib
from collections.abc import Sequence

import jax

from lm import sharding, statistics, train
from lm.objectives.infill import infill
from lm.objectives.next_token import next_token
from lm.studies import costs, runs, speed_up, variants
from lm.workdir import atomic, figures


def check(arms: Sequence[variants.Arm], adapt: int) -> list[train.Run]:
  """Returns the runs of the arms. ValueError where their losses cannot be compared."""
  arm_runs = [arm.make() for arm in arms]
  for arm, run in zip(arms, arm_runs):
    if not run.model.causal or run.data.source_length is not None:
      raise ValueError(f'{arm.name} has no common yardstick with other arms: its model does not predict a next token '
                       'from those before it alone; compare decoders')
    runs.check_same_text(arm.name, run, arms[0].name, arm_runs[0])
    if not is_next_token(run) and not adapt:
      raise ValueError(f'{arm.name} does not learn to predict the next token, so it has no common yardstick with the '
                       'others yet; let all be adapted to it for some steps, such as --adapt=100')
    if run.constants:
      raise ValueError(f'{arm.name} trains beside constant parameters, which a comparison cannot give it')
    if run.data.columns:
      raise ValueError(f'{arm.name} reads {", ".join(run.data.columns)}, stored with its data for one seed and length; '
                       'compare arms that read text alone')
  return arm_runs


def is_next_token(run: train.Run) -> bool:
  return run.objective.forms == next_token().forms


def final_file(study: pathlib.Path, arm: variants.Arm, seed: int) -> pathlib.Path:
  return study / arm.name / f'seed-{seed}' / 'final.json'


def finish(run: train.Run, workdir: pathlib.Path, result: train.Result, mesh: jax.sharding.Mesh, equal: str,
           adapt: int, adapt_lr: float) -> None:
  """Writes what is compared of a trained run; its curve is over shares of the compute that it was given.

  NotFinite where the run diverged; an adaptation that does is left out, and why is written too.
  """
  values, left_out = {}, {}
  with jax.set_mesh(mesh):
    if is_next_token(run):
      values['bits/byte'] = finite('bits/byte', runs.score(run, result, next_token())['bits_per_byte'])
    for name, objective, metric in (('adapted bits/byte', next_token(), 'bits_per_byte'),
                                    ('infilling accuracy', infill(1.), 'accuracy')) if adapt else ():
      try:
        short, adapted = runs.adapt(run, workdir / f'adapted-{name.split()[0]}', result, objective, adapt, adapt_lr)
        values[name] = finite(name, runs.score(short, adapted, objective)[metric])
      except train.NotFinite as error:
        left_out[name] = f'adapted from --adapt_lr={adapt_lr}, {error}'
    spent = costs.spending(run, equal if run.stages else 'steps', mesh)
  curve = [(spent(step) / spent(run.steps), value) for step, value in runs.curve(workdir)] if is_next_token(run) else []
  write(workdir, values, curve, left_out)


def finite(name: str, value: float) -> float:
  if not math.isfinite(value):
    raise train.NotFinite(f'its {name} is {value}; lower the learning rate')
  return value


def write(workdir: pathlib.Path, values: dict[str, float], curve: list[tuple[float, float]], left_out: dict[str, str]
          ) -> None:
  """Writes the result of a run; `left_out` says of metrics why it does not have them."""
  for name, why in left_out.items():
    print(f'it has no {name}: {why}')
  atomic.write(workdir / 'final.json', json.dumps({'values': values, 'curve': curve, 'left_out': left_out}))


def table(names: Sequence[str], results: dict[str, list[dict]], metric: str) -> list[str]:
  """Lines of Markdown: each arm beside the first of those that have the metric. Lower is better, but for an accuracy.
  """
  sign = -1 if 'accuracy' in metric else 1
  names = having(names, results, metric)
  values = {name: [result['values'][metric] for result in results[name]] for name in names}
  sooner = {name: times(speed_up.speed_up(*([result['curve'] for result in results[n]] for n in (name, names[0]))))
            for name in names[1:] if metric == 'bits/byte'}
  has_speed_up = any(sooner.values())   # none is, of curves of one evaluation
  speed_up_title = ["speed-up to the baseline's final loss"] if has_speed_up else []
  titles = ['arm', metric, f'difference to {names[0]}', *speed_up_title, 'verdict']
  lines = [f'| {" | ".join(titles)} |', '|---' * len(titles) + '|']
  for name in names:
    own = statistics.interval(values[name])
    if name == names[0]:
      lines.append(f'| {name} | {own} ' + '| ' * (len(titles) - 2) + '|')
      continue
    verdict = statistics.judge([sign * v for v in values[name]], [sign * v for v in values[names[0]]], len(names) - 1)
    low, high = sorted((sign * verdict.difference.low, sign * verdict.difference.high))
    difference = statistics.Interval(sign * verdict.difference.value, low, high)
    columns = [name, str(own), str(difference), *([sooner[name]] if has_speed_up else []), str(verdict)]
    lines.append(f'| {" | ".join(columns)} |')
  return lines


def having(names: Sequence[str], results: dict[str, list[dict]], metric: str) -> list[str]:
  """Returns the arms that have a metric, for each seed."""
  return [name for name in names if all(metric in result['values'] for result in results[name])]


def times(sooner: statistics.Interval | None) -> str:
  if sooner is None:
    return ''
  return f'{sooner.value:.2f}x [{sooner.low:.2f}, {sooner.high:.2f}]'


def compare(*, arms_text: str, workdir: pathlib.Path, experiment: pathlib.Path, common: str = '', seeds: int = 5,
            equal: str = 'steps', budget: float | None = None, adapt: int = 0, adapt_lr: float = 1e-3,
            mesh: str | None = None) -> dict[str, list[dict]]:
  """Returns the results of each arm, a dict for each seed; prints the tables and draws `compare.png`.

  `arms_text` names the arms as in `variants.arms`, and `experiment` is the script whose runs they are. A comparison
  that was stopped goes on in its workdir. ValueError for arms or settings that cannot be compared.
  """
  if seeds < 2:
    raise ValueError(f'--seeds={seeds} is too few for an interval; give --seeds=2 or more')
  if adapt < 0 or not 0 < adapt_lr < math.inf:
    raise ValueError(f'--adapt={adapt} steps from --adapt_lr={adapt_lr}: steps are 0 or more, a rate is above 0')
  function = variants.experiment(experiment)
  arms = variants.arms(function, arms_text, common)
  if len(arms) < 2:
    raise ValueError(f'--arms names {arms[0].name} alone; a comparison has two arms at least')
  devices = sharding.make_mesh(mesh)
  with jax.set_mesh(devices):
    for run in check(arms, adapt):
      train.check(run, devices)
    settings = {'experiment': experiment.name, 'arms': {arm.name: arm.knobs for arm in arms}, 'equal': equal,
                'budget': budget, 'adapt': adapt, 'adapt_lr': adapt_lr}
    continued = runs.is_continued(workdir, 'compare.json', settings)
    arms, amount = steps_once(workdir, continued, arms, equal, budget, devices)
    runs.open_data(workdir, arms, control=infill().control if adapt else ())
  if not continued:
    runs.begin(workdir, 'compare.json', settings)
  print(f'equal {equal}: {amount:,.4g} each; ' + ', '.join(f'{arm.name} {arm.knobs["steps"]:,} steps' for arm in arms))
  missing = {arm.name: [seed for seed in range(seeds) if not final_file(workdir, arm, seed).exists()] for arm in arms}
  for seed in range(seeds):   # by seed, so that a comparison that is stopped has pairs
    for i, arm in enumerate(arms):
      if seed in missing[arm.name]:
        print(f'\n--- run {seed * len(arms) + i + 1} of {seeds * len(arms)}: {arm.name}, seed {seed}', flush=True)
        try:
          finish(*runs.go(workdir, arm, seed, devices), devices, equal, adapt, adapt_lr)
        except train.NotFinite as error:
          write(final_file(workdir, arm, seed).parent, {}, [], {'result': str(error)})
  results = {arm.name: [json.loads(final_file(workdir, arm, seed).read_text()) for seed in range(seeds)]
             for arm in arms}
  report(results, workdir, f'share of {amount:,.4g} {equal}')
  return results


def steps_once(study: pathlib.Path, continued: bool, arms: list[variants.Arm], equal: str, budget: float | None,
               mesh: jax.sharding.Mesh) -> tuple[list[variants.Arm], float]:
  """Returns what `costs.equal` does, and stores it, since seconds are measured: a continued study reads it again."""
  path = study / 'steps.json'
  if continued:
    before = json.loads(path.read_text())
    return [arm.with_steps(before['steps'][arm.name]) for arm in arms], before['amount']
  arms, amount = costs.equal(arms, equal, budget, mesh)
  atomic.write(path, json.dumps({'amount': amount, 'steps': {arm.name: arm.knobs['steps'] for arm in arms}}))
  return arms, amount


def report(results: dict[str, list[dict]], workdir: pathlib.Path, compute: str) -> None:
  """Prints the tables of a comparison, and writes them and the figure to its workdir."""
  names = list(results)
  metrics = dict.fromkeys(metric for seeds in results.values() for result in seeds for metric in result['values'])
  lines = []
  for metric in metrics:
    if having(names, results, metric):
      lines += ['', *table(names, results, metric)]
  for name, seeds in results.items():
    for metric in dict.fromkeys(metric for result in seeds for metric in result['left_out']):
      why = {seed: result['left_out'][metric] for seed, result in enumerate(seeds) if metric in result['left_out']}
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
