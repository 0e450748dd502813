"""The metric by which checkpoints are judged, and the choice of the best one."""
import math
from collections.abc import Mapping
from typing import Any, NamedTuple


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
