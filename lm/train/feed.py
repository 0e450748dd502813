"""The feed of a run that learns from its data. It reads the rows of a step while the step before is computed."""
import bisect
from concurrent.futures import Future, ThreadPoolExecutor

import jax

from lm import sharding
from lm.data.batch import Batch
from lm.data.rows.augment import augmented
from lm.data.rows.stages import Staged
from lm.train.interfaces import Feed, OpenData
from lm.train.run import Run, State


class DataFeed(Feed):
  """Gives the batches of the training split, augmented and in the shapes of the run's stages.

  Each process reads its own rows.
  """

  def __init__(self, run: Run, data: OpenData, mesh: jax.sharding.Mesh):
    objective = augmented(run.objective, run.augment, data.tokenizer)
    self.rows, self._schedule, self._mesh = data.batches('train', objective, run.batch, run.seed), run.schedule, mesh
    self._batches = Staged(self.rows, run.schedule)
    self._reader = ThreadPoolExecutor(1)
    self._ahead: dict[int, Future[Batch]] = {}   # the batch that is being read ahead, by its step

  def __call__(self, step: int, state: State) -> Batch:
    del state
    reading = self._ahead.get(step) or self._reader.submit(self._read, step)
    batch = sharding.shard_rows(reading.result(), self._mesh)
    self._ahead = {step + 1: self._reader.submit(self._read, step + 1)}
    return batch

  def _read(self, step: int) -> Batch:
    return self._batches(step, sharding.local_rows(self._schedule.shape(step)[0], self._mesh))

  def steps(self, planned: int) -> int:
    """Returns the number of planned steps that there are rows for; prints a line where it is smaller.

    Raises:
      ValueError: there are too few rows for a single step.
    """
    end = self.rows.end()
    if end is None or self._schedule.rows_before(planned) <= end[0]:
      return planned
    rows, name = end
    steps = bisect.bisect_right(range(planned + 1), rows, key=self._schedule.rows_before) - 1
    if not steps:
      raise ValueError(f'{name} has too little text for one step of {self._schedule.shape(0)[0]} rows; lower --batch, '
                       'or repeat a corpus at its end (--repeat)')
    print(f'training stops at step {steps:,} of {planned:,}, where {name} ends; the schedule is the one of '
          f'{planned:,} steps')
    return steps

  def summary(self, steps: int) -> list[str]:
    return self.rows.summary(self._schedule.rows_before(steps))

  def close(self) -> None:
    self._reader.shutdown()
