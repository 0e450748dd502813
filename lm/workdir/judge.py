"""What the metric of a checkpoint is, and which of several is the best."""
import math
from collections.abc import Mapping
from typing import Any, NamedTuple


class Judge(NamedTuple):
  """The metric that checkpoints are judged by; those of two steps compare where their judges are equal."""
  objective: Any = None           # its description, as JSON
  name: str = 'validation/loss'   # in the log
  better: str = 'lower'           # or 'higher'

  @classmethod
  def of(cls, document: Mapping[str, Any]) -> 'Judge':
    """The judge of a step whose facts are in `document`; of older ones, which name no metric, the validation loss."""
    return cls(document['facts'].get('objective'), *document.get('best', ()))

  def best(self, metrics: Mapping[int, float | None]) -> int | None:
    """The step of the best metric, the last among equals; None if none is finite."""
    finite = {step: metric for step, metric in sorted(metrics.items(), reverse=True)
              if metric is not None and math.isfinite(metric)}
    choose = max if self.better == 'higher' else min
    return choose(finite, key=finite.get, default=None)

  def prefers(self, metric: float, other: float | None) -> bool:
    """Whether a metric is better than another; a finite one is better than None."""
    if other is None:
      return math.isfinite(metric)
    return metric > other if self.better == 'higher' else metric < other
