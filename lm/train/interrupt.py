"""Signals that stop a run after the present step."""
import contextlib
import ctypes
import os
import select
import signal
import stat
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax
from jax.experimental import multihost_utils

from lm import exits


class Stopped(KeyboardInterrupt):
  """A signal stopped a run before its end. The exit code of a program is then `code`, which is 128 + the signal."""

  def __init__(self, number: int):
    super().__init__(f'stopped by signal {number}')
    self.code = 128 + number


class Interrupt(contextlib.AbstractContextManager):
  """Catches SIGINT, SIGTERM and SIGHUP. `should_stop(step)` is True after the first signal; a second ends the process.

  Python calls handlers only between two of its instructions, and one instruction of the main thread, which compiles or
  evaluates, may take minutes. Therefore another thread reads each signal too, from a pipe to which the C handler
  writes. This thread ends the process at the second signal, and saves if the main thread does not return (see
  `during`).

  `signal` is the number of the signal, or None. A SIGHUP that the process ignores, as under `nohup`, stays ignored. In
  a cluster, only SIGTERM is caught: JAX's preemption service tells it to all processes, which stop at the same step.
  """
  patience = 5.   # seconds in which the main thread may end the block of `during`: of 30 between SIGTERM and SIGKILL

  def __enter__(self):
    self.signal: int | None = None
    self._former, self._calls, self._closed = {}, 0, False
    self._lock = threading.RLock()   # a handler may interrupt the main thread while that holds it
    self._rescue: Callable[[], None] | None = None
    self._rescuer: threading.Thread | None = None
    self._connected = [output for output in (1, 2) if _may_disappear(output)]
    self._is_main = threading.current_thread() is threading.main_thread()
    if self._is_main:
      self._reader, self._writer = os.pipe()
      os.set_blocking(self._reader, False)
      os.set_blocking(self._writer, False)
      self._former_pipe = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
      numbers = [signal.SIGTERM]
      if jax.process_count() == 1:
        numbers.append(signal.SIGINT)
        if hasattr(signal, 'SIGHUP') and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
          numbers.append(signal.SIGHUP)
      self._service = _c_handler(signal.SIGTERM) if jax.process_count() > 1 else None
      self._former = {number: signal.signal(number, self._receive) for number in numbers}
      self._watcher = threading.Thread(target=self._watch, name='signals', daemon=True)
      self._watcher.start()
    return self

  def __exit__(self, *_):
    if not self._is_main:
      return
    for number, handler in self._former.items():
      # A handler of C, which Python cannot set, is None here.
      signal.signal(number, signal.SIG_DFL if handler is None else handler)
    signal.set_wakeup_fd(self._former_pipe)
    self._closed = True
    self._wake()
    self._watcher.join()
    os.close(self._reader)
    os.close(self._writer)

  def should_stop(self, step: int) -> bool:
    """Whether to stop at a step. All processes of a cluster get the same answer if all call this equally often."""
    del step
    self._calls += 1
    if jax.process_count() > 1:
      return multihost_utils.reached_preemption_sync_point(self._calls)
    return self.signal is not None

  @contextlib.contextmanager
  def during(self, rescue: Callable[[], None]) -> Iterator[None]:
    """Calls `rescue` in another thread, and ends the process, where a block does not end soon after a signal."""
    with self._lock:
      self._rescue = rescue
    if self.signal:
      self._wake()
    try:
      yield
    finally:
      with self._lock:
        self._rescue = None
      if self._rescuer is not None:
        self._rescuer.join()   # it ends the process

  def _receive(self, *_):
    """Reads the signals that have arrived. The main thread calls it as its handler, and the watching thread too."""
    with self._lock:
      try:
        numbers = os.read(self._reader, 64)
      except BlockingIOError:   # the other thread has read them
        return
      for number in numbers:
        if number in self._former:
          self._take(number)

  def _take(self, number: int) -> None:
    if self.signal:
      exits.at_once(128 + number)
    self.signal = number
    if number not in (signal.SIGINT, signal.SIGTERM):   # SIGHUP: the terminal has closed, so writing to it would fail
      nothing = os.open(os.devnull, os.O_WRONLY)
      for output in self._connected:
        os.dup2(nothing, output)
    os.write(2, b'\nstopping after this step, to save; once more ends at once\n')   # print is not safe in a handler
    if self._service is not None:
      self._service(number)
    self._wake()   # the watching thread, where the main thread has read the signal before it

  def _watch(self) -> None:
    deadline: float | None = None
    while not self._closed:
      waits = deadline is not None and self._rescuer is None
      select.select([self._reader], [], [], max(0., deadline - time.monotonic()) if waits else None)
      self._receive()
      with self._lock:
        if not self.signal or self._rescue is None:
          deadline = None
        elif deadline is None:
          deadline = time.monotonic() + self.patience
        elif time.monotonic() >= deadline and self._rescuer is None:
          self._rescuer = threading.Thread(target=self._end, args=(self._rescue,), daemon=True)
          self._rescuer.start()

  def _end(self, rescue: Callable[[], None]) -> None:
    code = 1
    try:
      rescue()
      code = 128 + self.signal
    except BaseException:   # this thread has to end the process: the main thread may wait for it
      traceback.print_exc()
    exits.at_once(code)

  def _wake(self) -> None:
    os.write(self._writer, b'\0')


def _c_handler(number: int) -> Callable[[int], None] | None:
  """Returns the handler that C code, such as JAX's preemption service, has set for a signal; None for none."""
  library = ctypes.CDLL(None)
  library.signal.restype, library.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
  address = library.signal(number, None)   # SIG_DFL: the only way to read the handler is to replace it
  library.signal(number, address)
  return ctypes.CFUNCTYPE(None, ctypes.c_int)(address) if address not in (None, 1) else None   # 1 is SIG_IGN


def _may_disappear(output: int) -> bool:
  """Whether a file descriptor is a terminal, or a pipe to a process that may end with it."""
  try:
    return os.isatty(output) or stat.S_ISFIFO(os.fstat(output).st_mode)
  except OSError:   # the file descriptor is closed
    return False
