"""Figures of what was tracked."""
import itertools
import pathlib
from collections.abc import Sequence

from lm import track


def curve(metrics_jsonl: pathlib.Path, png: pathlib.Path) -> None:
  """Training and validation loss, and the learning rate, against the step. Without matplotlib: one line, no plot."""
  try:
    from matplotlib.figure import Figure  # without pyplot: no global state, no display
  except ImportError:
    print(f"no {png.name}: matplotlib is missing (pip install 'lm[plot]')")
    return

  def series(name: str) -> tuple[list[int], list[float]]:
    points = [(r['step'], r[name]) for r in rows if r.get(name) is not None]
    return [step for step, _ in points], [value for _, value in points]

  rows = track.read_metrics(metrics_jsonl)
  figure = Figure(figsize=(8, 5), dpi=144, layout='constrained')
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
    axes.grid(alpha=0.25)
    axes.spines[['top', 'right']].set_visible(False)
  top.legend(frameon=False)
  figure.savefig(png)


def _smooth(values: Sequence[float], half: int) -> list[float]:
  """Centred mean over `2 * half + 1` values, fewer near the ends: unlike a running mean it does not lag."""
  sums = [0.0, *itertools.accumulate(values)]
  halves = [min(half, i, len(values) - 1 - i) for i in range(len(values))]
  return [(sums[i + h + 1] - sums[i - h]) / (2 * h + 1) for i, h in enumerate(halves)]
