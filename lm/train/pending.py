"""Runs whose shape depends on what a flag names, such as a model: an experiment says what, and `launch` opens it.

  def experiment(*, model: str = 'gpt2', ...) -> train.Run | train.Pending:
    ...                                  # flags that do not go together raise here, before anything is opened
    def build(base: load.BaseModel) -> train.Run:
      return train.Run(model=base.model, start=base.start, ...)
    return train.after_opening(build, base=named.decoder('model', model))
"""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lm.train.run import Run


class Openable(Protocol):
  """Something that has yet to be opened, such as a `named.Named` model."""

  def open(self) -> Any:
    """Returns what is opened; raises OSError where it is not there, ValueError where it is of the wrong kind."""


@dataclasses.dataclass(frozen=True)
class Pending:
  """A run that cannot be built before something is opened. Making one opens nothing.

  Args:
    build: returns the run. Its keyword arguments are what was opened; it opens and computes nothing itself.
    inputs: what to open, by the name of the argument; None is passed on as None.
  """
  build: Callable[..., Run]
  inputs: Mapping[str, Openable | None]

  def open(self) -> Run:
    """Opens the inputs, in their order, and returns the run."""
    return self.build(**{name: value and value.open() for name, value in self.inputs.items()})


def after_opening(build: Callable[..., Run], **inputs: Openable | None) -> Run | Pending:
  """Returns the run that `build` makes of the opened inputs: pending, or at once where all inputs are None."""
  pending = Pending(build, inputs)
  return pending if any(value is not None for value in inputs.values()) else pending.open()


def opened(run: Run | Pending) -> Run:
  """Returns a run; one that is pending is built now."""
  return run.open() if isinstance(run, Pending) else run
