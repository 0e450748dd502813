"""Signals that ask a run to stop."""
import contextlib
import os
import signal
import threading

import jax


class Stopped(KeyboardInterrupt):
  """A signal stopped a run before its end. A program then ends with the exit code `code`, 128 + the signal."""

  def __init__(self, number: int):
    super().__init__(f'stopped by signal {number}')
    self.code = 128 + number


class Interrupt(contextlib.AbstractContextManager):
  """Turns the first SIGINT or SIGTERM into a question, `asked(step)`; the second one ends the process.

  `signal` is then its number. In a cluster, SIGTERM to any process (a preemption) is for JAX's preemption service, by
  which all stop at one step.
  """

  def __enter__(self):
    self.signal: int | None = None
    self._former = {}
    if jax.process_count() == 1 and threading.current_thread() is threading.main_thread():
      self._former = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
    return self

  def __exit__(self, *_):
    for number, handler in self._former.items():
      signal.signal(number, handler)

  def _handle(self, number, frame):
    del frame
    if self.signal:
      os._exit(128 + number)
    self.signal = number
    os.write(2, b'\nstopping after this step, to save; once more ends at once\n')   # print is not safe in a handler

  def asked(self, step: int) -> bool:
    """Whether to stop after `step`; all processes of a cluster get the same answer."""
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils
      return multihost_utils.reached_preemption_sync_point(step)
    return self.signal is not None
