"""Runs that cannot be built before a flag's model is opened: an experiment names the model, and `launch` opens it.

  def experiment(*, model: str = 'gpt2', ...) -> train.Run | train.Pending:
    ...                                  # flags that contradict one another raise here, before anything is opened
    def build(base: load.BaseModel) -> train.Run:
      return train.Run(model=base.model, start=base.start, ...)
    return train.after_opening(build, base=named.decoder('--model', model))
"""
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from lm.train.run import Run


class Openable(Protocol):
  """An input that can be opened, such as a `named.Named` model."""

  def open(self) -> Any:
    """Opens the input. Raises OSError where it does not exist, ValueError where it is of the wrong kind."""


@dataclasses.dataclass(frozen=True)
class Pending:
  """A run that is built once its inputs are opened. Its constructor opens nothing.

  Args:
    build: returns the run. Its keyword arguments are the opened inputs; it opens and computes nothing itself.
    inputs: the inputs to open, by the name of the argument; None is passed on as None.
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


def build(run: Run | Pending) -> Run:
  """Returns a run; a pending run is opened and built."""
  return run.open() if isinstance(run, Pending) else run
