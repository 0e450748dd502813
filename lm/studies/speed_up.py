"""By what factor one training run reaches the final loss of another sooner."""
import math
from collections.abc import Sequence

from lm.statistics import Interval, interval

Curve = Sequence[tuple[float, float]]   # (compute, loss), by compute


def reached(curve: Curve, loss: float) -> float | None:
  """Returns the compute at which a curve first reaches `loss`, by linear interpolation; None if it never does."""
  before = None
  for compute, value in curve:
    if value <= loss:
      if before is None or before[1] == value:
        return compute
      share = (before[1] - loss) / (before[1] - value)
      return before[0] + share * (compute - before[0])
    before = compute, value
  return None


def speed_up(arm: Sequence[Curve], other: Sequence[Curve], confidence: float = 0.95) -> Interval | None:
  """Returns by what factor the arm reaches the other's final loss sooner: a geometric mean over seeds, with interval.

  It is below 1 where the other arm is faster: the reciprocal of that arm's speed-up. None where in some seed neither
  reaches the other's final loss, or where a curve has fewer than two points.
  """
  logs = []
  for a, b in zip(arm, other, strict=True):
    if min(len(a), len(b)) < 2:
      return None
    if compute := reached(a, b[-1][1]):
      logs.append(math.log(b[-1][0] / compute))
    elif compute := reached(b, a[-1][1]):
      logs.append(-math.log(a[-1][0] / compute))
    else:
      return None
  return Interval(*(math.exp(min(x, 700.)) for x in interval(logs, confidence)))
