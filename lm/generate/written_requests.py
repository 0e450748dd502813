"""The text that a scheduler writes for requests: pieces as they come, from any number of requests at a time."""
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lm.data.tokenizers.folder import Tokenizer
from lm.generate.choice_text import ChoiceText, Piece
from lm.generate.request import Request
from lm.generate.scheduler import Scheduler


class TextRequest(NamedTuple):
  """A request, and the strings that end its texts and are not part of them."""
  request: Request
  stop: tuple[str, ...] = ()


def pieces(scheduler: Scheduler, tokenizer: Tokenizer, requests: Iterable[TextRequest]
           ) -> Iterator[tuple[TextRequest, Piece]]:
  """Yields the pieces of the texts of all requests as they are written; the last piece of a choice has a `finish`.

  Requests are taken from the iterable when rows are free for them. Those that have not ended when the generator is
  closed are aborted, so that the scheduler can be used again.
  """
  requests, running = iter(requests), {}
  has_all = False
  try:
    while True:
      while not has_all and not scheduler.waiting:
        text_request = next(requests, None)
        if text_request is None:
          has_all = True
        else:
          request, stop = text_request
          scheduler.submit(request)
          running[request] = text_request, [ChoiceText(choice, tokenizer, request.ids, stop, request.sampling.stop_ids)
                                            for choice in range(request.choices)]
      if not running:
        return
      for event in scheduler.step():
        if event.request not in running:
          continue   # it has been aborted
        text_request, texts = running[event.request]
        if texts[event.choice].has_ended:
          continue   # its last tokens are behind a stop string
        piece = texts[event.choice].push(event)
        if texts[event.choice].has_ended and event.finish_reason is None:
          scheduler.abort(event.request, event.choice)   # the scheduler does not know stop strings
        if all(text.has_ended for text in texts):
          del running[event.request]
        yield text_request, piece
  finally:
    for request in running:
      scheduler.abort(request)
