"""Faults of a file system: calls of `etils.epath`, through which checkpoints are written and read, that fail."""
import contextlib
import os
import re
from collections.abc import Callable, Iterator
from typing import Any

from etils.epath import testing


@contextlib.contextmanager
def faults(call: str, pattern: str, fault: Callable[[], Any]) -> Iterator[None]:
  """Calls `fault()`, which may raise, before each call of a function of epath whose path has the pattern."""
  def function(original, path, *args, **kwargs):
    if re.search(pattern, os.fspath(path)):
      fault()
    return original(path, *args, **kwargs)

  with testing.mock_epath(**{call: function}):
    yield


def failing(number: int, times: float = float('inf')) -> Callable[[], None]:
  """Returns a function that raises the OSError of a number so many times. It counts its calls in `calls`."""
  def fault():
    fault.calls += 1
    if fault.calls <= times:
      raise OSError(number, os.strerror(number))
  fault.calls = 0
  return fault
