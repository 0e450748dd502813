"""The result of a run."""
from typing import Any, NamedTuple

import jax

from lm.train.interfaces import OpenData
from lm.train.interrupt import Stopped
from lm.train.run import Run
from lm.workdir import checkpoint, track


class Result(NamedTuple):
  """A run as `train` returns it: at its end, or where something stopped it.

  Attributes:
    step: the number of steps so far.
    start: the step that training continued from.
    params: the parameters to evaluate, with the constants of the run among them.
    data: the data.
    mesh: the mesh.
    metrics: the metrics of the last evaluation, by their names in the log.
    finished: whether the run is at its end.
    phases: the time that each phase took.
    signal: the number of the signal that stopped the run; None for none.
    left_out: the number of steps that were left out to keep to the minutes of the run.
  """
  step: int
  start: int
  params: Any
  data: OpenData
  mesh: jax.sharding.Mesh
  metrics: dict[str, float]
  finished: bool
  phases: track.Phases
  signal: int | None = None
  left_out: int = 0

  def raise_if_stopped(self) -> None:
    """Raises Stopped, a KeyboardInterrupt, where a signal stopped the run before its end."""
    if self.signal:
      raise Stopped(self.signal)


def result_step(run: Run, checkpoints: checkpoint.Checkpoints, best: bool = False) -> int | None:
  """Returns the step of the best checkpoint for a run with patience, and with `best`; None for the newest one."""
  return checkpoints.best_step() if best or run.patience is not None else None
