"""Text from token ids as they come; bos at the beginning of a prompt, and prompts that are sources."""
import codecs
from collections.abc import Sequence

import numpy as np

from lm.data.tokenizers.folder import Tokenizer
from lm.models.transformer import LanguageModel


def with_bos(ids: np.ndarray, tokenizer: Tokenizer, bos: bool | None) -> np.ndarray:
  """Returns a prompt with or without bos; None adds it if the tokenizer does, and keeps one that is in the prompt."""
  has_bos = len(ids) > 0 and ids[0] == tokenizer.bos_id
  needs_bos = has_bos or tokenizer.adds_bos if bos is None else bos
  if has_bos == needs_bos:
    return ids
  return np.int32([tokenizer.bos_id, *ids]) if needs_bos else ids[1:]


def text_and_source(model: LanguageModel, bos: int, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
  """Returns what a model continues after a prompt, and what its encoder reads; None for a decoder."""
  return (np.int32([bos]), ids) if model.reads_source else (ids, None)


class TextStream:
  """Decodes the tokens of one row into text that later tokens cannot change.

  It releases whole characters, and holds back text that may be the beginning of a stop string.

  Args:
    tokenizer: the tokenizer.
    prompt: the ids before the new tokens, without bos.
    stop: strings that end the text, and are not part of it.
    stop_ids: ids that end the text, besides the tokenizer's `eos_ids`; none of them is part of it.
  """

  def __init__(self, tokenizer: Tokenizer, prompt: np.ndarray, stop: Sequence[str], stop_ids: Sequence[int] = ()):
    self._tokenizer, self._ends = tokenizer, frozenset((*tokenizer.eos_ids, *stop_ids))
    self._context = prompt.tolist()   # tokens that are decoded again with those that follow; see `_decode`
    self._new: list[int] = []         # the tokens after them, whose text is not certain
    self._stop = stop
    self._stop_overlap = max(map(len, stop), default=1) - 1   # characters that may belong to a stop string
    self._pending = ''                                        # decoded text that is held back
    self._released = 0                                        # characters that have been returned
    self.has_ended = False

  @property
  def length(self) -> int:
    """The number of characters that are certain, of which a beginning of a stop string is held back."""
    return self._released + len(self._pending)

  def push(self, token: int) -> str:
    """Adds a token. Returns the text that is certain now and was not before."""
    if self.has_ended or token in self._ends:
      return self.end()
    self._new.append(int(token))
    old, new = self._decode()
    if len(new) <= len(old) or new.endswith('\ufffd'):   # the token may end within a character
      return ''
    text = new[len(old):]
    if text.strip(' '):
      self._context = self._new
    elif not old.strip(' '):
      self._context = self._context + self._new
    self._new = []
    text = self._release(text)
    self._released += len(text)
    return text

  def end(self) -> str:
    """Returns the text that was held back. A character that is still incomplete is dropped."""
    if self.has_ended:
      return ''
    old, new = self._decode()
    text = self._release(self._without_incomplete(new[len(old):]))
    if not self.has_ended:   # there is no stop string in it
      text, self._pending = text + self._pending, ''
      self.has_ended = True
    self._released += len(text)
    return text

  def _without_incomplete(self, text: str) -> str:
    """Returns the last text without the U+FFFD of an incomplete character; one that the model wrote stays."""
    if not text.endswith('\ufffd'):
      return text
    decoder = codecs.getincrementaldecoder('utf-8')('replace')
    complete = decoder.decode(self._tokenizer.decode_bytes(self._context + self._new))
    written = len(complete) - len(complete.rstrip('\ufffd'))
    return text[:len(text.rstrip('\ufffd')) + written]

  def _decode(self) -> tuple[str, str]:
    """Returns the text of the context, and that of the context with the new tokens.

    They are decoded together, because the spaces of a token may depend on the tokens before it: some tokenizers remove
    those at the beginning of a text. So the context is all that came before, or tokens whose text is more than spaces.
    """
    return self._tokenizer.decode(self._context), self._tokenizer.decode(self._context + self._new)

  def _release(self, text: str) -> str:
    """Adds text, and returns what no stop string can cut off: the text before the first stop string ends the row."""
    self._pending += text
    places = [place for place in (self._pending.find(stop) for stop in self._stop) if place >= 0]
    self.has_ended = bool(places)
    end = min(places, default=max(len(self._pending) - self._stop_overlap, 0))
    text, self._pending = self._pending[:end], self._pending[end:]
    return text
