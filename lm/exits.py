"""The end of a process that waits for nothing."""
import contextlib
import os
import sys


def at_once(code: int) -> None:
  """Ends the process with an exit code, from a signal handler too; lines that were printed are written before."""
  # A file or a pipe gets them in blocks. To write fails where the reader is gone, or amid another write.
  with contextlib.suppress(OSError, RuntimeError, ValueError, AttributeError):
    sys.stdout.flush()
  os._exit(code)
