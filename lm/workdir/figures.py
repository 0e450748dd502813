"""Figures of the metrics of a run, of learning rates, and of several runs compared.

Without matplotlib, these functions print one line and draw nothing.
"""
import collections
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.workdir import atomic, track


def curve(metrics_jsonl: pathlib.Path, png: pathlib.Path) -> None:
  """Plots training loss, validation loss and learning rate against the step."""
  figure = _figure(png, (8, 5))
  if figure is None:
    return

  def series(name: str) -> tuple[list[int], list[float]]:
    points = [(row['step'], row[name]) for row in rows if row.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]

  rows = track.read_metrics(metrics_jsonl)
  top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
  steps, losses = series('loss')
  top.plot(steps, losses, _marker(losses), color='tab:blue', alpha=0.25, linewidth=0.8)
  top.plot(steps, _smooth(losses, half=len(losses) // 60), _marker(losses), color='tab:blue', linewidth=1.6,
           label='training')
  top.plot(*series('validation/loss'), 'o-', color='tab:orange', markersize=4, linewidth=1.2, label='validation')
  bottom.plot(*series('learning_rate'), _marker(losses), color='tab:green', linewidth=1.6)
  top.set(ylabel='loss (nats per token)', title=metrics_jsonl.resolve().parent.name)
  bottom.set(xlabel='step', ylabel='learning rate', ylim=(0, None))
  bottom.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
  _finish(figure, png, (top, bottom))


def schedule(rates: Mapping[str, Callable[[Any], Any]], steps: int, png: pathlib.Path) -> None:
  """Plots learning rates, each a function of the step, one below the other."""
  figure = _figure(png, (8, 1.2 + 1.3 * len(rates)))
  if figure is None:
    return
  panels = figure.subplots(len(rates), 1, sharex=True, squeeze=False)[:, 0]
  for axes, (name, rate) in zip(panels, rates.items()):
    axes.plot([float(rate(step)) for step in range(steps)], color='tab:green', linewidth=1.6)
    axes.set(ylabel=name, ylim=(0, None))
    axes.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
  axes.set(xlabel='step')
  _finish(figure, png, panels)
  print(png)


def comparison(png: pathlib.Path, curves: Mapping[str, Sequence[Sequence[tuple[float, float]]]],
               finals: Mapping[str, Sequence[float]], metric: str, compute: str) -> None:
  """Plots for each arm the mean curve over seeds with its range, and the final value of each seed.

  Grey lines join the final values of the same seed. The x axis of the curves is the share of the compute. A curve of a
  single evaluation is drawn as a point with its range. If no arm has a curve, only the final values are drawn.
  """
  has_curves = any(all(runs) and len(runs) for runs in curves.values())
  figure = _figure(png, (11 if has_curves else 6, 5))
  if figure is None:
    return
  curve_axes, final_axes = figure.subplots(1, 2, width_ratios=(3, 2)) if has_curves else (None, figure.subplots())
  for i, (name, runs) in enumerate(curves.items()):
    color = f'C{i % 10}'
    points = [dict(run) for run in runs]
    shared = sorted(set.intersection(*(set(run) for run in points))) if points else []
    if shared:
      columns = [[run[x] for run in points] for x in shared]
      low, high = list(map(min, columns)), list(map(max, columns))
      means = [sum(column) / len(column) for column in columns]
      curve_axes.plot(shared, means, _marker(shared), color=color, linewidth=1.6, label=name)
      curve_axes.fill_between(shared, low, high, color=color, alpha=0.2, linewidth=0 if len(shared) > 1 else 2)
    final_axes.plot([i] * len(finals[name]), finals[name], 'o', color=color, markersize=5, alpha=0.8)
  for pair in zip(*finals.values()):
    final_axes.plot(range(len(pair)), pair, color='0.7', linewidth=0.7, zorder=0)
  final_axes.set_xticks(range(len(finals)), list(finals), rotation=30, ha='right')
  final_axes.set(ylabel=metric)
  if curve_axes is not None:
    curve_axes.set(xlabel=compute, xlim=(0, 1.02), ylabel='validation bits per byte')   # no share is above 1
  _finish(figure, png, [axes for axes in (curve_axes, final_axes) if axes is not None])


def lines(png: pathlib.Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], x: str, y: str,
          log: bool = False) -> None:
  """Plots the lines `{title: {name: points}}` and marks their lowest points; each title has a panel, on shared axes."""
  figure = _figure(png, (5.5 * len(panels) + 2, 5))
  if figure is None:
    return
  all_axes = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
  for axes, (title, panel) in zip(all_axes, panels.items()):
    for i, (name, points) in enumerate(panel.items()):
      axes.plot(*zip(*points), '.-', color=f'C{i % 10}', linewidth=1.4, markersize=4, label=name)
      axes.plot(*min(points, key=lambda point: point[1]), 'o', color=f'C{i % 10}', markersize=8)
    axes.set(title=title, xlabel=x, xscale='log' if log else 'linear')
    if log:
      ticks = sorted({point[0] for points in panel.values() for point in points})
      axes.set_xticks(ticks, [f'{value:g}' for value in ticks])
      axes.minorticks_off()
  all_axes[0].set(ylabel=y)
  _finish(figure, png, all_axes)


def sweep(png: pathlib.Path, trials: Sequence[tuple[Mapping[str, Any], float, bool]], metric: str) -> None:
  """Plots the metric of trials (knobs, value, pruned) against each numeric knob, a panel for each.

  Lines join the trials that differ in this knob alone. Pruned trials are grey crosses.
  """
  names = [name for name in trials[0][0] if all(_number(knobs[name]) is not None for knobs, _, _ in trials)]
  names = [name for name in names if len({knobs[name] for knobs, _, _ in trials}) > 1]
  figure = _figure(png, (5.5 * len(names), 4.5)) if names else None
  if figure is None:
    return
  panels = figure.subplots(1, len(names), squeeze=False)[0]
  finite = [trial for trial in trials if math.isfinite(trial[1])]
  for axes, name in zip(panels, names):
    groups = collections.defaultdict(list)
    for knobs, value, pruned in finite:
      if not pruned:
        groups[' '.join(f'{k}={v}' for k, v in knobs.items() if k != name)].append((_number(knobs[name]), value))
    for others, points in groups.items():
      axes.plot(*zip(*sorted(points)), 'o-', markersize=5, linewidth=1.2, label=others if len(groups) < 9 else None)
    pruned_points = [(_number(knobs[name]), value) for knobs, value, pruned in finite if pruned]
    axes.plot(*(zip(*pruned_points) if pruned_points else ((), ())), 'x', color='0.6',
              label='pruned' if pruned_points else None)
    values = [_number(knobs[name]) for knobs, _, _ in trials]
    is_log = min(values) > 0 and max(values) > 5 * min(values)
    axes.set(xlabel=name, ylabel=metric, xscale='log' if is_log else 'linear')
    if is_log:
      from matplotlib.ticker import LogLocator
      axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      axes.xaxis.set_major_formatter('{x:g}')
      axes.minorticks_off()
  _finish(figure, png, panels)


def scaling(png: pathlib.Path, points: Sequence[tuple[float, float, float]], law: Callable[..., Any],
            predicted: tuple[float, float, float, float, float], outcome: float) -> None:
  """Plots the losses of points (N, D, loss) and the law against D, with a colour for each size N.

  `predicted` is (N, D, loss, low, high) of the largest run: it is drawn as an error bar, and its `outcome` as a star.
  """
  figure = _figure(png, (8, 5))
  if figure is None:
    return
  axes, n, d = figure.subplots(), *predicted[:2]
  sizes = sorted({*(point[0] for point in points), n})
  last = max(d, *(point[1] for point in points))
  for i, size in enumerate(sizes):
    own = sorted((tokens, loss) for other, tokens, loss in points if other == size)
    first = own[0][0] if own else min(point[1] for point in points)
    line = [first * (last / first) ** (k / 50) for k in range(51)]
    losses = [float(law(size, tokens)) for tokens in line]
    axes.plot(line, losses, '-' if own else '--', color=f'C{i % 10}', linewidth=1.2, label=f'N = {size:,.0f}')
    axes.plot(*(zip(*own) if own else ((), ())), 'o', color=f'C{i % 10}', markersize=5)
  middle, low, high = predicted[2:]
  axes.errorbar([d], [middle], [[middle - low], [high - middle]], color='0.3', capsize=4, fmt='none', label='predicted')
  axes.plot([d], [outcome], '*', color='black', markersize=11, label='outcome')
  axes.set(xscale='log', xlabel='D (tokens)', ylabel='validation loss (nats per token)')
  _finish(figure, png, (axes,))


def _marker(values: Sequence[float]) -> str:
  """Returns the format of a curve. A single point needs a marker, because a line through it is invisible."""
  return 'o' if len(values) == 1 else '-'


def _smooth(values: Sequence[float], half: int) -> list[float]:
  """Returns the centred mean of `2 * half + 1` values, fewer near the ends. Unlike a running mean, it does not lag."""
  sums = [0.0, *itertools.accumulate(values)]
  halves = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
  return [(sums[i + h + 1] - sums[i - h]) / (2 * h + 1) for i, h in enumerate(halves)]


def intervals(curves: Mapping[str, Mapping[str, Any]], png: pathlib.Path) -> bool:
  """Plots values with their intervals; returns whether there is a figure.

  Each curve, by the name of its line, has `x` and `y`, the names of the axes, `points` with `at` (a number, or the name
  of a range), `value`, `low` and `high`, and `diagonal`: whether the line y = x is drawn to compare with.
  """
  figure = _figure(png, (6, 4.5))
  if figure is None:
    return False
  axes = figure.subplots()
  first = next(iter(curves.values()))
  if first['diagonal']:
    axes.plot([0, 1], [0, 1], '--', color='0.6', linewidth=1)
  for i, (name, curve) in enumerate(curves.items()):
    points = [point for point in curve['points'] if point['value'] is not None]
    x, y = [point['at'] for point in points], [point['value'] for point in points]
    errors = [[0. if point[end] is None else abs(point[end] - point['value']) for point in points]
              for end in ('low', 'high')]
    axes.errorbar(x, y, errors, fmt='o-', color=f'C{i % 10}', markersize=4, linewidth=1.2, capsize=2, label=name)
  axes.set(xlabel=first['x'], ylabel=first['y'])
  if any(isinstance(point['at'], str) for curve in curves.values() for point in curve['points']):
    axes.tick_params('x', rotation=45)
  _finish(figure, png, [axes])
  return True


def _figure(png: pathlib.Path, size: tuple[float, float]) -> Any:
  try:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display
  except ImportError:
    print(f"no {png.name}: matplotlib is missing (pip install 'lm[plot]')")
    return None
  return Figure(figsize=size, dpi=144, layout='constrained')


def _finish(figure: Any, png: pathlib.Path, panels: Sequence[Any]) -> None:
  for axes in panels:
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
      axes.legend(frameon=False)
  with atomic.naming(png):
    figure.savefig(png)


def _number(value: Any) -> float | None:
  try:
    return float(value)
  except (TypeError, ValueError):
    return None
