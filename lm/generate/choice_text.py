"""The text of one answer from the tokens of an engine, with the log-probabilities of its tokens."""
import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lm.data.tokenizers.folder import Tokenizer
from lm.generate.request import Event, Scores
from lm.generate.text_stream import TextStream

Top = tuple[tuple[int, float], ...]   # (id, log-probability), the most probable first


class ScoredToken(NamedTuple):
  """A token of an answer.

  Attributes:
    id: its id.
    start: the character of the answer where its text begins.
    log_probability: in nats, by the model's own distribution.
    top: (id, log-probability) of the most probable tokens at its place, the most probable first.
  """
  id: int
  start: int
  log_probability: float
  top: Top


class Piece(NamedTuple):
  """The next part of an answer.

  Attributes:
    choice: the number of the answer.
    text: its next text.
    tokens: those whose text begins in the text so far, and did not before; in the last piece also those without text,
      such as eos and a stop string, so that all tokens that were drawn are in one of the pieces.
    finish: in the last piece 'stop', 'length', or another `Event.finish_reason`; None before.
    prompt: in the first piece, the tokens of the prompt, where they are scored.
  """
  choice: int
  text: str
  tokens: tuple[ScoredToken, ...]
  finish: str | None
  prompt: Sequence[tuple[float, Top]] | None = None


def token_scores(scores: Scores) -> list[tuple[float, Top]]:
  """Returns the log-probability of each token, and its most probable alternatives with theirs."""
  return [(value, tuple(zip(ids, values))) for value, ids, values in zip(
      scores.log_probabilities_T.tolist(), scores.top_ids_TK.tolist(), scores.top_log_probabilities_TK.tolist())]


class ChoiceText:
  """Turns the tokens of one answer into pieces whose texts join to the answer, whatever tokens come together.

  Characters are whole, and text that may be the beginning of a stop string is held back.
  """

  def __init__(self, choice: int, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = (),
               stop_ids: Sequence[int] = ()):
    """Makes the text of choice number `choice`, after the ids of the prompt."""
    context = np.asarray(prompt, np.int32)
    if len(context) and context[0] == tokenizer.bos_id:
      context = context[1:]
    self._choice, self._stream = choice, TextStream(tokenizer, context, stop, stop_ids)
    self._waiting: collections.deque[ScoredToken] = collections.deque()
    self._length = 0         # characters in pieces
    self.count = 0           # tokens that were drawn
    self.has_ended = False

  def push(self, event: Event) -> Piece:
    """Returns the piece that further tokens add. Tokens after the end of the answer are dropped."""
    texts, finish = [], None
    for token, (log_probability, top) in zip(event.ids, token_scores(event.scores)):
      if self.has_ended:
        break
      self.count += 1
      self._waiting.append(ScoredToken(token, self._stream.length, log_probability, top))
      texts.append(self._stream.push(token))
      self.has_ended = self._stream.has_ended
      finish = 'stop' if self.has_ended else None
    if not self.has_ended:
      finish = event.finish_reason
      self.has_ended = finish is not None
    if self.has_ended:
      texts.append(self._stream.end())
    text = ''.join(texts)
    self._length += len(text)
    tokens = []
    while self._waiting and (self._waiting[0].start < self._length or self.has_ended):
      token = self._waiting.popleft()
      tokens.append(token._replace(start=min(token.start, self._length)))
    prompt = None if event.prompt_scores is None else token_scores(event.prompt_scores)
    return Piece(self._choice, text, tuple(tokens), finish, prompt)
