"""A conversation in a terminal: messages are read line by line, and answers are printed as they are written.

The scheduler shares the pages of a prefix between prompts. So for each answer, little more is read than the last answer
and the new message.
"""
import contextlib
import dataclasses
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from lm import seeds
from lm.data.chat.conversation import Conversation
from lm.generate.grammars import Grammar
from lm.generate.request import Request
from lm.generate.sampling import Sampling
from lm.generate.scheduler import Scheduler
from lm.generate.text import DEFAULT
from lm.generate.text_stream import with_bos
from lm.generate.written_requests import TextRequest, pieces

RESET = '/reset'
_HELP = f'Ctrl-C stops an answer, {RESET} begins a new conversation, Ctrl-D ends.'


@dataclasses.dataclass
class ChatSession:
  """A conversation with a model.

  Attributes:
    scheduler: writes the answers, one at a time.
    tokenizer: of the conversation.
    sampling: how tokens are drawn.
    max_tokens: the largest number of tokens of an answer; None for 128, or fewer if the context has room for fewer.
    stop: strings that end an answer, and are not part of it.
    seed: of the random numbers; each answer has its own, which follow from it.
    bos: whether a prompt begins with bos; None does as the chat template does.
    grammar: what each answer has to match; None for any text.
    messages: the conversation so far. It forgets its oldest messages where the context has no room for them.
  """
  scheduler: Scheduler
  tokenizer: Conversation
  sampling: Sampling = Sampling()
  max_tokens: int | None = None
  stop: tuple[str, ...] = ()
  seed: int = 0
  bos: bool | None = None
  grammar: Grammar | None = None
  messages: list[dict[str, str]] = dataclasses.field(default_factory=list)
  answers: int = 0   # so far, also those of earlier conversations

  def __post_init__(self):
    if self.max_tokens is not None and self.max_tokens >= self.scheduler.context:
      raise ValueError(f'max_tokens={self.max_tokens} leaves no room for a message in the context of '
                       f'{self.scheduler.context} tokens; give fewer')

  def _fitting(self, messages: list[dict[str, str]]) -> tuple[np.ndarray, list[dict[str, str]]]:
    """Returns the ids of messages, and the messages, without the oldest ones that leave no room for an answer."""
    context = self.scheduler.context
    needed = min(DEFAULT, context // 2) if self.max_tokens is None else self.max_tokens
    while True:
      ids = with_bos(self.tokenizer.encode_batch([messages])[0], self.tokenizer, self.bos)
      if len(ids) + needed <= context or len(messages) == 1:
        return ids, messages
      messages = messages[2:]   # without a message of the user and its answer

  def answer(self, message: str, is_stopped: Callable[[], bool] = lambda: False) -> Iterator[str]:
    """Yields the answer to a message, a piece at a time, until it ends or is stopped; both are then remembered.

    Raises ValueError, and the conversation stays as it was, where the message is too long for the context.
    """
    messages = [*self.messages, {'role': 'user', 'content': message}]
    ids, fitting = self._fitting(messages)
    room = max(self.scheduler.context - len(ids), 1)
    max_tokens = min(DEFAULT, room) if self.max_tokens is None else self.max_tokens
    request = Request(ids, self.sampling, max_tokens, seeds.derive(self.seed, f'answer {self.answers}'),
                      grammar=self.grammar)
    request.check(self.scheduler.engine, self.scheduler.context)
    if len(fitting) < len(messages):
      print(f'(the oldest {len(messages) - len(fitting)} messages do not fit the context of {self.scheduler.context} '
            'tokens any more, and are forgotten)', file=sys.stderr)
    text = ''
    with contextlib.closing(pieces(self.scheduler, self.tokenizer, [TextRequest(request, self.stop)])) as written:
      for _, piece in written:
        text += piece.text
        yield piece.text
        if is_stopped():
          break
    self.answers += 1
    self.messages = [*fitting, {'role': 'assistant', 'content': text}]

  def run(self) -> None:
    """Reads messages from standard input, and prints the answers, until the input ends.

    Raises KeyboardInterrupt for Ctrl-C while a message is read from what is no terminal.
    """
    is_terminal = sys.stdin.isatty()
    if is_terminal:
      with contextlib.suppress(ImportError):   # not on Windows
        import readline  # noqa: F401  (with it, `input` edits lines, and recalls earlier ones)
    print(_HELP, file=sys.stderr)
    with _interruptions() as interruptions:
      while True:
        message = interruptions.read_line('> ' if is_terminal else '')
        if message is None:
          if is_terminal:
            print()   # the prompt of the shell comes next
          return
        if message.strip() == RESET:
          self.messages.clear()
          print('(a new conversation)', file=sys.stderr)
        elif message.strip():
          self._print_answer(message, interruptions)

  def _print_answer(self, message: str, interruptions: '_Interruptions') -> None:
    interruptions.has_come = False
    try:
      for text in self.answer(message, lambda: interruptions.has_come):
        print(text, end='', flush=True)
    except ValueError as error:
      print(f'({error})', file=sys.stderr)
    print(flush=True)


class _Interruptions:
  """Ctrl-C: an exception while a line is read, and otherwise `has_come`, so that no step of the scheduler is cut."""
  has_come = False
  _is_reading = False

  def receive(self, *_: Any) -> None:
    if self._is_reading:
      raise KeyboardInterrupt
    self.has_come = True

  def read_line(self, prompt: str) -> str | None:
    """Returns the next line of the input, or None at its end. In a terminal, Ctrl-C begins the line anew."""
    while True:
      try:
        self._is_reading = True
        return input(prompt)
      except EOFError:
        return None
      except KeyboardInterrupt:
        if not sys.stdin.isatty():
          raise
        print(f'\n({_HELP})', file=sys.stderr)
      finally:
        self._is_reading = False


@contextlib.contextmanager
def _interruptions() -> Iterator[_Interruptions]:
  """A context in which Ctrl-C does not end the program."""
  interruptions = _Interruptions()
  former = signal.signal(signal.SIGINT, interruptions.receive)
  try:
    yield interruptions
  finally:
    signal.signal(signal.SIGINT, former)
