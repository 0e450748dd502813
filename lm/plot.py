"""Figures of what was tracked, and of learning rates."""
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm import track


def curve(metrics_jsonl: pathlib.Path, png: pathlib.Path) -> None:
  """Training and validation loss, and the learning rate, against the step. Without matplotlib: one line, no plot."""
  if (figure := _figure(png, height=5)) is None:
    return

  def series(name: str) -> tuple[list[int], list[float]]:
    points = [(r['step'], r[name]) for r in rows if r.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]

  rows = track.read_metrics(metrics_jsonl)
  top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
  steps, losses = series('loss')
  top.plot(steps, losses, color='tab:blue', alpha=0.25, linewidth=0.8)
  top.plot(steps, _smooth(losses, half=len(losses) // 60), color='tab:blue', linewidth=1.6, label='training')
  top.plot(*series('validation/loss'), 'o-', color='tab:orange', markersize=4, linewidth=1.2, label='validation')
  bottom.plot(*series('learning_rate'), color='tab:green', linewidth=1.6)
  top.set(ylabel='loss (nats per token)', title=metrics_jsonl.resolve().parent.name)
  bottom.set(xlabel='step', ylabel='learning rate', ylim=(0, None))
  bottom.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
  for axes in (top, bottom):
    _quiet(axes)
  top.legend(frameon=False)
  figure.savefig(png)


def schedule(rates: Mapping[str, Callable[[Any], Any]], steps: int, png: pathlib.Path) -> None:
  """Learning rates by name, each a function of the step, one below the other. Without matplotlib: one line, no plot."""
  if (figure := _figure(png, height=1.2 + 1.3 * len(rates))) is None:
    return
  for axes, (name, rate) in zip(figure.subplots(len(rates), 1, sharex=True, squeeze=False)[:, 0], rates.items()):
    axes.plot([float(rate(step)) for step in range(steps)], color='tab:green', linewidth=1.6)
    axes.set(ylabel=name, ylim=(0, None))
    axes.ticklabel_format(axis='y', style='sci', scilimits=(0, 0))
    _quiet(axes)
  axes.set(xlabel='step')
  figure.savefig(png)
  print(png)


def _figure(png: pathlib.Path, height: float) -> Any:
  try:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display
  except ImportError:
    print(f"no {png.name}: matplotlib is missing (pip install 'lm[plot]')")
    return None
  return Figure(figsize=(8, height), dpi=144, layout='constrained')


def _quiet(axes: Any) -> None:
  axes.grid(alpha=0.25)
  axes.spines[['top', 'right']].set_visible(False)


def _smooth(values: Sequence[float], half: int) -> list[float]:
  """Centred mean over `2 * half + 1` values, fewer near the ends: unlike a running mean it does not lag."""
  sums = [0.0, *itertools.accumulate(values)]
  halves = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
  return [(sums[i + h + 1] - sums[i - h]) / (2 * h + 1) for i, h in enumerate(halves)]
