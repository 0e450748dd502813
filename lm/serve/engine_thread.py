"""A thread of its own for an engine: requests come from HTTP at any time, and join and leave between its steps.

All work of JAX is done in this thread, one thing at a time; what the server awaits is delivered to it as it comes.
"""
import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from lm.generate import Drafter, Event, Request
from lm.generate.page_pools import PagePools
from lm.serve.api_errors import ApiError


class StepEngine(Protocol):
  """The members of `generate.Scheduler` that a server uses."""
  pool: PagePools | None   # None where each row has a context of its own
  drafter: Drafter | None
  prompt_tokens: int      # of all prompts so far
  shared_tokens: int      # those of them that were not read again

  @property
  def running(self) -> int: ...

  @property
  def waiting(self) -> int: ...

  @property
  def is_busy(self) -> bool: ...

  @property
  def compilations(self) -> int: ...

  def submit(self, request: Request) -> None: ...

  def abort(self, request: Request, choice: int | None = None) -> None: ...

  def step(self) -> Sequence[Event]: ...


Deliver = Callable[[Request, Event | ApiError], None]


@dataclasses.dataclass
class _Running:
  """A request that the engine has, and the number of its choices that have not ended."""
  deliver: Deliver
  choices: int


class EngineThread:
  """Runs an engine in a thread."""

  def __init__(self, engine: StepEngine, most: int = 256, context: Callable[[], Any] = contextlib.nullcontext):
    """Starts the thread.

    Args:
      engine: the engine, which only this thread uses from now on.
      most: the largest number of answers that are written or wait for it; a request for more is refused.
      context: makes a context manager in which the thread runs, such as a mesh.
    """
    self.engine, self._context, self._most = engine, context, most
    self.failure: BaseException | None = None   # what ended the thread before its time
    self._changed = threading.Condition()
    self._jobs: collections.deque[Callable[[], None]] = collections.deque()
    self._requests: dict[Request, _Running] = {}   # only the thread uses it
    self._count, self._closed, self._has_ended = 0, False, False
    self._thread = threading.Thread(target=self._run, name='engine', daemon=True)
    self._thread.start()

  @property
  def count(self) -> int:
    """The number of answers that wait or are written."""
    return self._count

  def submit(self, requests: Sequence[Request], deliver: Deliver, accepted: Callable[[], None]) -> None:
    """Adds requests, after a call of `accepted`.

    The thread calls `deliver` with new tokens, the last of which say so, or with an error.

    Raises ApiError: status 429 where too many wait already, 503 where the engine has stopped, 400 where the requests
    are more than can ever wait, or the engine does not take one.
    """
    count = sum(request.choices for request in requests)
    if count > self._most:
      raise ApiError(400, f'this makes {count} answers, and the server takes {self._most} at a time; send '
                          'fewer texts, or a smaller n')
    with self._changed:
      self._raise_if_stopped()
      if self._count + count > self._most:
        raise ApiError(429, f'{self._count} answers are waiting or being written, and the server takes {self._most}; '
                            'try again later', headers={'Retry-After': '1'})
      self._count += count
    accepted()
    self._add(lambda: self._submit(requests, deliver))

  def abort(self, request: Request, choice: int | None = None) -> None:
    """Ends a request before the next step, or one choice of which tokens were delivered.

    What has ended already is left alone. The last events say 'abort'.
    """
    self._add(lambda: self._abort(request, choice))

  def start(self, function: Callable[[], Any]) -> concurrent.futures.Future:
    """Returns the future of a function, which the thread calls between two steps. Raises ApiError if it has ended."""
    future: concurrent.futures.Future = concurrent.futures.Future()

    def job() -> None:
      if not future.set_running_or_notify_cancel():   # nobody waits for it any more
        return
      try:
        if self._has_ended:
          raise self._stopped(503)
        future.set_result(function())
      except Exception as error:
        future.set_exception(error)

    with self._changed:
      self._raise_if_stopped()
    self._add(job)
    return future

  async def call(self, function: Callable[[], Any]) -> Any:
    """Returns the result of a function, which the thread calls between two steps."""
    return await asyncio.wrap_future(self.start(function))

  def close(self) -> None:
    """Ends the thread after the step that it computes."""
    with self._changed:
      self._closed = True
      self._changed.notify()
    self._thread.join()

  def _raise_if_stopped(self) -> None:
    if self._closed or self.failure is not None:
      raise self._stopped(503)

  def _stopped(self, status: int) -> ApiError:
    return ApiError(status, f'the engine has stopped: {self.failure or "the server ends"}')

  def _add(self, job: Callable[[], None]) -> None:
    """Gives a job to the thread. Where the thread has ended, the job is done here, and says so to who waits for it."""
    with self._changed:
      if not self._has_ended:
        self._jobs.append(job)
        self._changed.notify()
        return
    job()

  def _submit(self, requests: Sequence[Request], deliver: Deliver) -> None:
    if self._has_ended:
      for request in requests:
        with self._changed:
          self._count -= request.choices
        deliver(request, self._stopped(500))
      return
    self._requests |= {request: _Running(deliver, request.choices) for request in requests}
    for request in requests:
      try:
        self.engine.submit(request)
      except ValueError as error:
        self._end(request, request.choices)   # before the client knows of it, as in `_run`
        deliver(request, ApiError(400, str(error)))

  def _abort(self, request: Request, choice: int | None) -> None:
    if not self._has_ended and request in self._requests:
      self.engine.abort(request, choice)

  def _end(self, request: Request, choices: int = 1) -> None:
    """Counts choices of a request that have ended."""
    self._requests[request].choices -= choices
    if not self._requests[request].choices:
      del self._requests[request]
    with self._changed:
      self._count -= choices

  def _run(self) -> None:
    try:
      with self._context():
        while self._wait():
          for event in self.engine.step() if self.engine.is_busy else ():
            deliver = self._requests[event.request].deliver
            if event.finish_reason is not None:   # before the client knows of it, who may send the next request
              self._end(event.request)
            deliver(event.request, event)
    except BaseException as error:   # nothing else would say so, and all clients would wait forever
      traceback.print_exception(error)
      with self._changed:
        self.failure = error
    with self._changed:   # no job comes after this
      self._has_ended = True
    for job in self._jobs:
      job()
    for request, running in list(self._requests.items()):
      running.deliver(request, self._stopped(500))
      self._end(request, running.choices)

  def _wait(self) -> bool:
    """Waits for something to do, and does the jobs. Returns whether the thread goes on."""
    with self._changed:
      while not (self._jobs or self.engine.is_busy or self._closed):
        self._changed.wait()
      if self._closed:
        return False
    for _ in range(len(self._jobs)):
      self._jobs.popleft()()
    return True
