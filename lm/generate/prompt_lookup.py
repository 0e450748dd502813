"""Drafts without a model: where the last tokens of a text stood in it before, what followed them (Saxena 2023).

That is worth most where a text repeats its prompt: in summaries, edits and code. See `drafted_steps`.
"""
from collections.abc import Sequence

import numpy as np

from lm.generate.drafted_steps import NO_DRAFT, Drafter
from lm.generate.engine import State

LONGEST = 3   # the most tokens that are compared


def look_up(text: np.ndarray, drafts: int) -> np.ndarray:
  """Returns the tokens that followed the last ones of a text where these stood before, [drafts].

  Of the earlier places, that with the most equal tokens is taken, up to LONGEST, and of several the last; the tokens
  after it are repeated where the text ends. Returns NO_DRAFT for all where the last token is new.
  """
  last = len(text) - 1
  equal, length = np.ones(last, bool), np.zeros(last, np.int32)
  for n in range(min(LONGEST, last)):
    equal[:n] = False
    equal[n:] &= text[:last - n] == text[last - n]
    length += equal
  if not length.any():
    return np.full(drafts, NO_DRAFT, np.int32)
  best = last - 1 - np.argmax(length[::-1])   # the last of those with the most equal tokens
  return np.resize(text[best + 1:], drafts)


class PromptLookup(Drafter):
  """Drafts by `look_up`, for any decoder whose cache can forget tokens.

  Args:
    drafts: the number of tokens that are drafted at a time.
  """

  def draft(self, state: State, texts: Sequence[np.ndarray | None]) -> np.ndarray:
    nothing = np.full(self.drafts, NO_DRAFT, np.int32)
    return np.stack([nothing if text is None else look_up(text, self.drafts) for text in texts])
