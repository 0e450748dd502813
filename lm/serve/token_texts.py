"""Single tokens as text, for log-probabilities in answers."""
import math
from collections.abc import Sequence
from typing import Any

from lm.data.tokenizers.folder import Tokenizer
from lm.generate.choice_text import ScoredToken

_LEAST = -9999.   # JSON has no -inf; OpenAI writes this in its place


class TokenTexts:
  """Writes tokens of a tokenizer; control tokens, which have no bytes, are written by their names."""

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    self._names = {tokenizer.control_id(name): name for name in tokenizer.control_names}

  def bytes_of(self, id: int) -> bytes:
    """Returns the bytes that a token stands for. An id beyond the tokenizer, of a padded vocabulary, has none."""
    if id >= self._tokenizer.vocab_size:
      return b''
    return self._tokenizer.decode_bytes([id])

  def text(self, id: int) -> str:
    """Returns the text of a token by itself, with U+FFFD for bytes that are a part of a character."""
    return self._names.get(id) or self.bytes_of(id).decode('utf-8', 'replace')

  def completion(self, tokens: Sequence[ScoredToken], shift: int) -> dict[str, list]:
    """Returns `logprobs` of a completion. Its offsets are those of the tokens, plus `shift`."""
    return {'tokens': [self.text(token.id) for token in tokens],
            'token_logprobs': [finite(token.log_probability) for token in tokens],
            'top_logprobs': [self._by_text(token) for token in tokens],
            'text_offset': [token.start + shift for token in tokens]}

  def _by_text(self, token: ScoredToken) -> dict[str, float]:
    """Returns the log-probabilities of the most probable tokens, and of the token itself, by text.

    Of tokens with the same text, as parts of characters may have it, the most probable one counts.
    """
    by_text: dict[str, float] = {}
    for id, value in sorted((*token.top, (token.id, token.log_probability)), key=lambda pair: -pair[1]):
      by_text.setdefault(self.text(id), finite(value))
    return by_text

  def chat(self, tokens: Sequence[ScoredToken]) -> list[dict[str, Any]]:
    """Returns `logprobs.content` of a chat."""
    return [{**self._entry(token.id, token.log_probability),
             'top_logprobs': [self._entry(id, value) for id, value in token.top]} for token in tokens]

  def _entry(self, id: int, log_probability: float) -> dict[str, Any]:
    return {'token': self.text(id), 'logprob': finite(log_probability),
            'bytes': list(self.bytes_of(id))}


def finite(log_probability: float) -> float:
  """Returns a log-probability that JSON can write."""
  value = float(log_probability)
  return max(value, _LEAST) if not math.isnan(value) else _LEAST
