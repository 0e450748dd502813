"""Signals that ask a run to stop."""
import contextlib
import os
import signal
import stat
import threading

import jax
from jax.experimental import multihost_utils

from lm import exits


class Stopped(KeyboardInterrupt):
  """A signal stopped a run before its end. A program then ends with the exit code `code`, 128 + the signal."""

  def __init__(self, number: int):
    super().__init__(f'stopped by signal {number}')
    self.code = 128 + number


class Interrupt(contextlib.AbstractContextManager):
  """Turns the first SIGINT, SIGTERM or SIGHUP into a question, `asked(step)`; the second one ends the process.

  `signal` is then its number. A SIGHUP that the process ignores (`nohup`) stays ignored. In a cluster, SIGTERM to any
  process (a preemption) is for JAX's preemption service, by which all stop at one step.
  """

  def __enter__(self):
    self.signal: int | None = None
    self._former, self._calls = {}, 0
    self._connected = [output for output in (1, 2) if _ends_with_the_session(output)]
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      numbers = [signal.SIGINT, signal.SIGTERM]
      if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
      self._former = {number: signal.signal(number, self._handle) for number in numbers}
    return self

  def __exit__(self, *_):
    for number, handler in self._former.items():
      signal.signal(number, handler)

  def _handle(self, number, frame):
    del frame
    if self.signal:
      exits.at_once(128 + number)
    self.signal = number
    if number not in (signal.SIGINT, signal.SIGTERM):   # the terminal is gone: to write there would be an error
      nothing = os.open(os.devnull, os.O_WRONLY)
      for output in self._connected:
        os.dup2(nothing, output)
    os.write(2, b'\nstopping after this step, to save; once more ends at once\n')   # print is not safe in a handler

  def asked(self, step: int) -> bool:
    """Whether to stop, at `step`; all processes of a cluster get the same answer, if all ask equally often."""
    del step
    self._calls += 1
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(self._calls)
    return self.signal is not None


def _ends_with_the_session(output: int) -> bool:
  """Whether a file descriptor is a terminal, or a pipe to a process that may end with it."""
  try:
    return os.isatty(output) or stat.S_ISFIFO(os.fstat(output).st_mode)
  except OSError:   # it is closed
    return False
