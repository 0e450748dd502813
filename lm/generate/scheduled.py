"""What a scheduler knows of each prompt that is being read, and of each choice that is being written."""
import dataclasses
import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.generate.engine import Tokens
from lm.generate.grammars import Matcher
from lm.generate.page_pools import Prefix
from lm.generate.request import Request, Scores
from lm.generate.slots import Prompt

NO_SCORES = Scores(np.zeros(0, np.float32), np.zeros((0, 0), np.int32), np.zeros((0, 0), np.float32))


@dataclasses.dataclass
class WrittenChoice:
  """A choice that is being written in a row. `text` has room for the prompt and `limit` tokens."""
  request: Request
  choice: int
  limit: int
  text: np.ndarray
  matcher: Matcher | None = None
  pages: Sequence[Sequence[int]] = ()   # of each pool
  written: int = 0

  @property
  def size(self) -> int:
    """The number of tokens of the text so far."""
    return len(self.text) - self.limit + self.written

  def add(self, ids: Sequence[int]) -> None:
    """Adds new tokens."""
    self.text[self.size:self.size + len(ids)] = ids
    self.written += len(ids)


@dataclasses.dataclass
class PromptReading:
  """A request whose prompt is being read, or whose next choice waits for a row."""
  request: Request
  ids: np.ndarray
  keys: Sequence[bytes]          # of the full pages of the prompt
  prefix: Prefix | None          # the part of the prompt that was in pages; None without pages
  cache: Any                     # donated by each chunk
  shared: int                    # tokens that were in pages
  count: int                     # tokens that have been read, or were in pages
  prompt: Prompt | None = None   # after the first chunk
  choice: int = 0                # the next to join a row
  start: float = dataclasses.field(default_factory=time.perf_counter)   # of the reading
  scores: list[Scores] = dataclasses.field(default_factory=list)   # of each chunk


def row_scores(tokens: Tokens, row: int, count: int, top: int) -> Scores:
  """Returns the scores of the first `count` tokens of a row."""
  log_probabilities = np.asarray(tokens.log_probabilities_BT)[row, :count]
  if not top:
    return Scores(log_probabilities, np.zeros((count, 0), np.int32), np.zeros((count, 0), np.float32))
  return Scores(log_probabilities, *(np.asarray(x)[row, :count, :top] for x in tokens.alternatives))
