"""Flags of how long a run trains, and how often it is evaluated and saved."""
import dataclasses
import pathlib
from typing import Literal

from lm import train
from lm.evaluate.suites import Evaluator


@dataclasses.dataclass(frozen=True)
class Budget:
  """Length of the run.

  Args:
    minutes: minutes of training, where --steps is none; the steps that fit are measured first, and some are skipped
      where the machine becomes slower.
    steps: a fixed number of steps instead; a larger number continues a finished run.
  """
  minutes: float = 3.
  steps: int | None = None

  @property
  def count(self) -> int:
    """The number of steps; for a run by minutes, 10,000 until `launch` has measured how many fit."""
    return 10_000 if self.steps is None else self.steps

  @property
  def limit(self) -> float | None:
    """The minutes that training may take; None for a fixed number of steps."""
    return self.minutes if self.steps is None else None


@dataclasses.dataclass(frozen=True)
class Cadence:
  """Evaluation and checkpoints.

  Args:
    evaluate_every: steps between evaluations; none for an eighth of the steps.
    evaluate_batches: batches of the validation split in each evaluation; none for all.
    best: metric of the log that chooses the best checkpoint, such as validation/bits_per_byte.
    better: whether a lower or a higher value of it is better.
    evaluators: JSON file of a suite of evaluations to measure beside the validation data; see docs/evaluate.md.
    patience: training stops after so many evaluations in a row that are no better than the best.
    save_every: steps between checkpoints; none for a quarter of the steps.
    keep: number of the last checkpoints to keep, beside the best.
    keep_every: steps between checkpoints that are never deleted, also where --save_every gives none; none for none.
  """
  evaluate_every: int | None = None
  evaluate_batches: int | None = 20
  best: str = 'validation/loss'
  better: Literal['lower', 'higher'] = 'lower'
  evaluators: pathlib.Path | None = None
  patience: int | None = None
  save_every: int | None = None
  keep: int = 2
  keep_every: int | None = None

  def apply(self, run: train.Run, evaluations: int = 8) -> train.Run:
    """Returns the run with this cadence; it has so many `evaluations` where --evaluate_every is none."""
    evaluate, save = max(run.steps // evaluations, 1), max(run.steps // 4, 1)
    suite = {} if self.evaluators is None else {self.evaluators.stem: Evaluator(self.evaluators)}
    return dataclasses.replace(
        run, evaluators={**run.evaluators, **suite},
        evaluate_every=evaluate if self.evaluate_every is None else self.evaluate_every,
        evaluate_batches=self.evaluate_batches, patience=self.patience, best=self.best, better=self.better,
        save_every=save if self.save_every is None else self.save_every, keep=self.keep,
        keep_every=self.keep_every)
