"""The metric by which checkpoints are judged, and the choice of the best one."""
import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.workdir import integrity


class Judge(NamedTuple):
  """The metric by which checkpoints are judged. Metrics of two steps can be compared only if their judges are equal."""
  objective: Any = None           # its description, as JSON
  name: str = 'validation/loss'   # in the log
  better: str = 'lower'           # or 'higher'

  @classmethod
  def of(cls, document: Mapping[str, Any]) -> 'Judge':
    """Returns the judge of the step of `document`; older documents name no metric, which means the validation loss."""
    return cls(document['facts'].get('objective'), *document.get('best', ()))

  def best(self, metrics: Mapping[int, float | None]) -> int | None:
    """Returns the step with the best metric, the last one among equals; None if no metric is finite."""
    finite = {step: metric for step, metric in sorted(metrics.items(), reverse=True)
              if metric is not None and math.isfinite(metric)}
    choose = max if self.better == 'higher' else min
    return choose(finite, key=finite.get, default=None)

  def prefers(self, metric: float, other: float | None) -> bool:
    """Returns whether `metric` is better than `other`; a finite metric is better than None."""
    if other is None:
      return math.isfinite(metric)
    return metric > other if self.better == 'higher' else metric < other


@dataclasses.dataclass
class Metrics:
  """The metrics of the steps of a run, each with its judge.

  The best step is chosen among those with the judge `judged_by`, or with that of the newest step if it is None.
  """
  judged_by: Judge | None
  by_step: dict[int, tuple[float | None, Judge]] = dataclasses.field(default_factory=dict)

  def of(self, step: int | None) -> float | None:
    """Returns the metric of a step; None if it has none."""
    return self.by_step.get(step, (None, None))[0]

  def best_step(self, steps: Sequence[int]) -> int | None:
    """Returns the best one of `steps`, which are in order; None if none of them has a metric."""
    metrics = {step: self.by_step.get(step, (None, Judge())) for step in steps}
    judge = self.judged_by or (metrics[steps[-1]][1] if steps else Judge())
    return judge.best({step: metric for step, (metric, other) in metrics.items() if other == judge})


def metric_to_json(metric: float, judge: Judge) -> str:
  """Returns a metric, its judge and a checksum of both as JSON."""
  return integrity.json_with_checksum({'metric': metric, 'judge': judge})


def metric_from_json(text: str) -> tuple[float, Judge]:
  """Reads what `metric_to_json` returned. Raises an error of any type if it is damaged."""
  if text.startswith('['):   # older versions wrote no checksum, and the oldest only the judge's objective
    metric, *judge = json.loads(text)
  else:
    values, _ = integrity.parse_json_with_checksum(text)
    metric, judge = values['metric'], values['judge']
  return metric, Judge(*judge)
