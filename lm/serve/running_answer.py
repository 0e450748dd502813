"""The answers to a request while they are written: pieces as they come, until they end or nobody reads them."""
import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from lm.data.tokenizers.folder import Tokenizer
from lm.generate import Event, Request
from lm.generate.choice_text import ChoiceText, Piece
from lm.serve.answers_format import Usage
from lm.serve.api_errors import ApiError, bad_request
from lm.serve.engine_thread import EngineThread


class Observer(Protocol):
  """Counts what happens to answers; see `server_metrics`."""

  def arrive(self, requests: Sequence[Request]) -> None: ...

  def observe(self, event: Event) -> None: ...

  def end(self, request: Request, choice: int, reason: str) -> None: ...


class RunningAnswer:
  """The choices of requests, by number: those of the first prompt, of the second, and so on."""

  def __init__(self, thread: EngineThread, tokenizer: Tokenizer, requests: Sequence[Request], stop: Sequence[str],
               observer: Observer):
    """Gives the requests to the engine; ApiError where it does not take them. Call it in a running event loop."""
    self._thread, self._observer = thread, observer
    names = [(request, choice) for request in requests for choice in range(request.choices)]
    self._texts = {name: ChoiceText(i, tokenizer, name[0].ids, stop, name[0].sampling.stop_ids)
                   for i, name in enumerate(names)}
    self._shared = dict.fromkeys(requests, 0)   # tokens of each prompt that were in pages
    self._queue: asyncio.Queue[Event | ApiError] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def deliver(request: Request, event: Event | ApiError) -> None:
      if isinstance(event, Event):
        observer.observe(event)
      with contextlib.suppress(RuntimeError):   # the loop is closed: the server ends
        loop.call_soon_threadsafe(self._queue.put_nowait, event)

    thread.submit(requests, deliver, lambda: observer.arrive(requests))

  @property
  def usage(self) -> Usage:
    """The number of tokens of the prompts, those that were drawn so far, and those of prompts that were in pages."""
    return Usage(sum(request.prompt_size for request in self._shared), sum(text.count for text in self._texts.values()),
                 sum(self._shared.values()))

  async def pieces(self) -> AsyncIterator[Piece]:
    """Yields the pieces of all choices as they come. Raises ApiError where the engine fails."""
    while not self._has_ended():
      event = await self._queue.get()
      if isinstance(event, ApiError):
        raise event
      if event.finish_reason == 'grammar':
        raise bad_request('the answer has reached the limits of the parser of its format; give a simpler schema, '
                          'regular expression or grammar', 'response_format')
      self._shared[event.request] = max(self._shared[event.request], event.shared_tokens)
      text = self._texts[event.request, event.choice]
      if not text.has_ended:
        piece = text.push(event)
        if text.has_ended and event.finish_reason is None:   # a stop string, which the engine does not know
          self._observer.end(event.request, event.choice, 'stop')
          self._thread.abort(event.request, event.choice)
        yield piece

  def _has_ended(self) -> bool:
    return all(text.has_ended for text in self._texts.values())

  def abort(self) -> None:
    """Frees the rows of requests that have not ended."""
    running = [name for name, text in self._texts.items() if not text.has_ended]
    for request in dict.fromkeys(request for request, _ in running):
      self._thread.abort(request)
    for request, choice in running:
      self._observer.end(request, choice, 'abort')
