"""Locks between processes."""
import contextlib
import fcntl
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def hold(path: pathlib.Path, waiting: str, progress: Callable[[str], Any]) -> Iterator[None]:
  """Holds an exclusive lock on a folder, or on a file, which is created. The lock is released when the process dies.

  While another process holds the lock, this one waits, after it has passed the line `waiting` to `progress`. On file
  systems that cannot lock folders, no process waits.
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
