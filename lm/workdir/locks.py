"""Processes that take turns."""
import contextlib
import fcntl
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def turn(path: pathlib.Path, waiting: str, progress: Callable[[str], Any]) -> Iterator[None]:
  """Holds the lock of a file, which is made, or of a folder. One process has it at a time; it is free when that dies.

  Tells `progress` the line `waiting` where another process has it. Some file systems have no locks of folders; there
  nobody waits.
  """
  file = os.open(path, os.O_RDONLY if path.is_dir() else os.O_CREAT | os.O_WRONLY)
  try:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      progress(waiting)
      fcntl.flock(file, fcntl.LOCK_EX)
    except OSError:
      if not path.is_dir():
        raise
    yield
  finally:
    os.close(file)
