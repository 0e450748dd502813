"""Encodes documents for a store: token ids, and columns with further values of each token or document."""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, Protocol

import numpy as np

from lm.data.tokenizers.base import Tokenizer


class Column(NamedTuple):
  """Values that are stored in addition to the tokens: one per token, or one per document."""
  dtype: np.dtype
  per: Literal['token', 'document']


class Encoded(NamedTuple):
  """One encoded document. A store drops a document without tokens."""
  tokens: np.ndarray                          # int [n]
  columns: Mapping[str, np.ndarray] = {}      # by name: [n] of a column per token, [] of a column per document
  sizes: np.ndarray | None = None             # int64 [m, 2]: places of tokens, and their numbers of bytes; see `store`


class Encoder(Protocol):
  """The interface through which a store encodes documents."""
  vocab_size: int
  fingerprint: str               # of everything that decides what `encode` returns
  columns: Mapping[str, Column]  # the columns of each document, by name
  has_sizes: bool                # whether documents have `sizes`

  def encode(self, documents: Sequence[str]) -> list[Encoded]: ...


@dataclasses.dataclass(frozen=True)
class TextEncoder:
  """Encodes plain text. Sizes are stored unless the tokenizer is lossless, because its table then knows all of them."""
  tokenizer: Tokenizer

  columns = {}

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  @property
  def fingerprint(self) -> str:
    return self.tokenizer.fingerprint

  @property
  def has_sizes(self) -> bool:
    return not self.tokenizer.lossless

  def encode(self, documents: Sequence[str]) -> list[Encoded]:
    encoded = self.tokenizer.encode_batch(documents)
    if not self.has_sizes:
      return [Encoded(tokens) for tokens in encoded]
    table = self.tokenizer.byte_lengths()
    return [Encoded(tokens, {}, self._other_sizes(text, tokens, table)) for text, tokens in zip(documents, encoded)]

  def _other_sizes(self, text: str, tokens: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Returns the places of tokens whose number of bytes differs from `table`, and that number, int64 [m, 2]."""
    sizes = self.tokenizer.sizes(text, tokens)
    places = np.flatnonzero(sizes != table[tokens])
    return np.stack([places, sizes[places]], 1)


def placed_sizes(documents: Sequence[Encoded], start: int) -> np.ndarray:
  """Returns the sizes of documents, [n, 2] int64, with places counted in the split, whose next token is at `start`."""
  parts = [np.zeros((0, 2), np.int64)]
  for document in documents:
    parts.append(document.sizes + np.array([start, 0]))
    start += len(document.tokens)
  return np.concatenate(parts)
