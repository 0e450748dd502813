"""Signals that stop a run after the present step."""
import contextlib
import os
import signal
import stat
import threading

import jax
from jax.experimental import multihost_utils

from lm import exits


class Stopped(KeyboardInterrupt):
  """A signal stopped a run before its end. The exit code of a program is then `code`, which is 128 + the signal."""

  def __init__(self, number: int):
    super().__init__(f'stopped by signal {number}')
    self.code = 128 + number


class Interrupt(contextlib.AbstractContextManager):
  """Catches SIGINT, SIGTERM and SIGHUP. `should_stop(step)` is True after the first one; the second ends the process.

  `signal` is the number of the signal, or None. A SIGHUP that the process ignores, as under `nohup`, stays ignored. In
  a cluster, JAX's preemption service handles SIGTERM to any process, and all processes stop at the same step.
  """

  def __enter__(self):
    self.signal: int | None = None
    self._former, self._calls = {}, 0
    self._connected = [output for output in (1, 2) if _may_disappear(output)]
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
    if number not in (signal.SIGINT, signal.SIGTERM):   # SIGHUP: the terminal has closed, so writing to it would fail
      nothing = os.open(os.devnull, os.O_WRONLY)
      for output in self._connected:
        os.dup2(nothing, output)
    os.write(2, b'\nstopping after this step, to save; once more ends at once\n')   # print is not safe in a handler

  def should_stop(self, step: int) -> bool:
    """Whether to stop at a step. All processes of a cluster get the same answer if all call this equally often."""
    del step
    self._calls += 1
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(self._calls)
    return self.signal is not None


def _may_disappear(output: int) -> bool:
  """Whether a file descriptor is a terminal, or a pipe to a process that may end with it."""
  try:
    return os.isatty(output) or stat.S_ISFIFO(os.fstat(output).st_mode)
  except OSError:   # the file descriptor is closed
    return False
