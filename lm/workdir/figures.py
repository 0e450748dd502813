"""Figures of what was tracked, of learning rates, and of runs beside one another.

Without matplotlib: one line, no figure.
"""
import collections
import itertools
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.workdir import atomic, track


def curve(metrics_jsonl: pathlib.Path, png: pathlib.Path) -> None:
  """Training and validation loss, and the learning rate, against the step."""
  if (figure := _figure(png, (8, 5))) is None:
    return

  def series(name: str) -> tuple[list[int], list[float]]:
    points = [(r['step'], r[name]) for r in rows if r.get(name) is not None]
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
  """Learning rates by name, each a function of the step, one below the other."""
  if (figure := _figure(png, (8, 1.2 + 1.3 * len(rates)))) is None:
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
  """Of each arm, the mean curve over seeds with their range, and each seed's final value, pairs joined.

  Curves are over shares of the compute. One of a single evaluation is a point with its range; where no arm has a curve,
  there are final values alone.
  """
  has_curves = any(all(runs) and len(runs) for runs in curves.values())
  if (figure := _figure(png, (11 if has_curves else 6, 5))) is None:
    return
  left, right = figure.subplots(1, 2, width_ratios=(3, 2)) if has_curves else (None, figure.subplots())
  for i, (name, runs) in enumerate(curves.items()):
    color = f'C{i % 10}'
    points = [dict(run) for run in runs]
    shared = sorted(set.intersection(*(set(p) for p in points))) if points else []
    if shared:
      columns = [[p[x] for p in points] for x in shared]
      low, high = list(map(min, columns)), list(map(max, columns))
      left.plot(shared, [sum(c) / len(c) for c in columns], _marker(shared), color=color, linewidth=1.6, label=name)
      left.fill_between(shared, low, high, color=color, alpha=0.2, linewidth=0 if len(shared) > 1 else 2)
    right.plot([i] * len(finals[name]), finals[name], 'o', color=color, markersize=5, alpha=0.8)
  for pair in zip(*finals.values()):
    right.plot(range(len(pair)), pair, color='0.7', linewidth=0.7, zorder=0)
  right.set_xticks(range(len(finals)), list(finals), rotation=30, ha='right')
  right.set(ylabel=metric)
  if left is not None:
    left.set(xlabel=compute, xlim=(0, 1.02), ylabel='validation bits per byte')   # no share is above 1
  _finish(figure, png, [axes for axes in (left, right) if axes is not None])


def lines(png: pathlib.Path, panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]], x: str, y: str,
          log: bool = False) -> None:
  """Points joined by lines, of each name, in panels beside one another that share their axes; the lowest is marked."""
  if (figure := _figure(png, (5.5 * len(panels) + 2, 5))) is None:
    return
  found = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
  for axes, (title, named) in zip(found, panels.items()):
    for i, (name, points) in enumerate(named.items()):
      axes.plot(*zip(*points), '.-', color=f'C{i % 10}', linewidth=1.4, markersize=4, label=name)
      axes.plot(*min(points, key=lambda point: point[1]), 'o', color=f'C{i % 10}', markersize=8)
    axes.set(title=title, xlabel=x, xscale='log' if log else 'linear')
    if log:
      at = sorted({point[0] for points in named.values() for point in points})
      axes.set_xticks(at, [f'{value:g}' for value in at])
      axes.minorticks_off()
  found[0].set(ylabel=y)
  _finish(figure, png, found)


def sweep(png: pathlib.Path, trials: Sequence[tuple[Mapping[str, Any], float, bool]], metric: str) -> None:
  """The metric of (knobs, value, pruned) against each knob that is a number; lines join those that differ in it alone.
  """
  names = [name for name in trials[0][0] if all(_number(knobs[name]) is not None for knobs, _, _ in trials)]
  names = [name for name in names if len({knobs[name] for knobs, _, _ in trials}) > 1]
  if not names or (figure := _figure(png, (5.5 * len(names), 4.5))) is None:
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
    left = [(_number(knobs[name]), value) for knobs, value, pruned in finite if pruned]
    axes.plot(*(zip(*left) if left else ((), ())), 'x', color='0.6', label='left early' if left else None)
    values = [_number(knobs[name]) for knobs, _, _ in trials]
    wide = min(values) > 0 and max(values) > 5 * min(values)
    axes.set(xlabel=name, ylabel=metric, xscale='log' if wide else 'linear')
    if wide:
      from matplotlib.ticker import LogLocator
      axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
      axes.xaxis.set_major_formatter('{x:g}')
      axes.minorticks_off()
  _finish(figure, png, panels)


def scaling(png: pathlib.Path, points: Sequence[tuple[float, float, float]], law: Callable[..., Any],
            predicted: tuple[float, float, float, float, float], outcome: float) -> None:
  """Losses (N, D, loss) against D, a colour a size, and the law; the rung (N, D, loss, low, high) and its outcome."""
  if (figure := _figure(png, (8, 5))) is None:
    return
  axes, n, d = figure.subplots(), *predicted[:2]
  sizes, most = sorted({*(point[0] for point in points), n}), max(d, *(point[1] for point in points))
  for i, size in enumerate(sizes):
    own = sorted((at, loss) for other, at, loss in points if other == size)
    begin = min(own)[0] if own else min(point[1] for point in points)
    line = [begin * (most / begin) ** (k / 50) for k in range(51)]
    axes.plot(line, [float(law(size, at)) for at in line], color=f'C{i % 10}', linewidth=1.2, label=f'N = {size:,.0f}',
              linestyle='-' if own else '--')
    axes.plot(*(zip(*own) if own else ((), ())), 'o', color=f'C{i % 10}', markersize=5)
  middle, low, high = predicted[2:]
  axes.errorbar([d], [middle], [[middle - low], [high - middle]], color='0.3', capsize=4, fmt='none', label='predicted')
  axes.plot([d], [outcome], '*', color='black', markersize=11, label='outcome')
  axes.set(xscale='log', xlabel='D (tokens)', ylabel='validation loss (nats per token)')
  _finish(figure, png, (axes,))


def _marker(values: Sequence[float]) -> str:
  """The format of a curve: a line of one point would not be seen."""
  return 'o' if len(values) == 1 else '-'


def _smooth(values: Sequence[float], half: int) -> list[float]:
  """Centred mean over `2 * half + 1` values, fewer near the ends: unlike a running mean it does not lag."""
  sums = [0.0, *itertools.accumulate(values)]
  halves = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
  return [(sums[i + h + 1] - sums[i - h]) / (2 * h + 1) for i, h in enumerate(halves)]


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
