"""Ends a process at once."""
import contextlib
import os
import sys


def at_once(code: int) -> None:
  """Writes out what was printed, and ends the process with an exit code. A signal handler may call it too."""
  # Output to a file or a pipe is buffered. Flushing fails where the reader has ended, or within another write.
  with contextlib.suppress(OSError, RuntimeError, ValueError, AttributeError):
    sys.stdout.flush()
  os._exit(code)
