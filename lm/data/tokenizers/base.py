"""The interface of a tokenizer, what tokenizers share, and the simplest one, `Bytes`.

A tokenizer is an immutable value, which can be pickled: equal files give equal tokenizers, with the same fingerprint.
`Bytes`, and tokenizers that are trained here, are lossless: decode(encode(text)) == text for all valid Unicode.
`encode` treats no text as a control token, not even '<s>', and adds no bos or eos, even if the file would: batches add
these.
"""
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from lm.workdir import atomic


class Tokenizer(Protocol):
  """The members of a tokenizer that other packages use."""

  @property
  def vocab_size(self) -> int: ...

  @property
  def bos_id(self) -> int:
    """The id that begins a document. It may equal `eos_id`, as in GPT-2."""

  @property
  def eos_id(self) -> int: ...

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """`eos_id`, and other ids with which a model ends its text, such as the end of an answer."""

  @property
  def adds_bos(self) -> bool:
    """Whether a text by itself begins with bos. Those that are trained here do; the files of others say it."""

  @property
  def fingerprint(self) -> str: ...

  def encode(self, text: str) -> np.ndarray:
    """Returns the ids of a text, int32. Raises ValueError for lone surrogates, which are not valid Unicode."""

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """Returns `encode` of each text, computed on all cores if the library has threads."""

  def sample(self, text: str, alpha: float, seed: int) -> np.ndarray:
    """Returns the ids of a random way to spell the text, which depends on the seed alone.

    `alpha` is the share of merges that BPE omits, or the exponent of the probabilities of a unigram model. Raises
    ValueError if the tokenizer has one way only.
    """

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """Returns the text, without control tokens, and with U+FFFD for bytes that are not UTF-8."""

  def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
    """Returns the UTF-8 bytes of the tokens, which may have incomplete characters; control tokens have no bytes."""

  def byte_lengths(self) -> np.ndarray:
    """Returns the number of UTF-8 bytes that each token stands for, int32 [vocab_size].

    It is 0 for control, unknown and unused tokens. If the tokenizer is lossless, the numbers of a document add up to
    its length. A tokenizer that puts a space before a text counts it too, and a tokenizer that normalises (T5) counts
    the normalised text; see `sizes`.
    """

  @property
  def lossless(self) -> bool:
    """Whether the tokens of any text spell exactly its bytes."""

  def sizes(self, text: str, ids: np.ndarray) -> np.ndarray:
    """Returns the number of bytes of the text that each token of `encode(text)` stands for, int [len(ids)].

    They add up to the length of the text.
    """

  def parse(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Encodes a text in which names of control tokens become control tokens, such as the text of a chat template.

    Returns ids, and the span of characters of each token, [n, 2]. As in `encode`, no token is added. Tokens that share
    a character all have it in their span.
    """

  @property
  def control_names(self) -> tuple[str, ...]: ...

  def control_id(self, name: str) -> int:
    """Returns the id of a control token. Raises ValueError, with the existing names, if there is none of this name."""

  def save(self, folder: str | os.PathLike) -> None:
    """Writes files that `load(folder)` opens."""


def sentinels(count: int) -> tuple[str, ...]:
  """Returns names of control tokens for missing spans (T5, arXiv:1910.10683, has 100), or for later purposes."""
  return tuple(f'<|{i}|>' for i in range(count))


# Control tokens for objectives: padding, masks, fill-in-the-middle, chat, span corruption, and the modes of UL2
# (arXiv:2205.05131). The order is that of the ids of `Bytes`, so new names are added at the end.
CONTROL = ('<|pad|>', '<|mask|>', '<|prefix|>', '<|middle|>', '<|suffix|>',
           '<|system|>', '<|user|>', '<|assistant|>', '<|end|>', *sentinels(32),
           '<|R|>', '<|S|>', '<|X|>')


# A text that a tokenizer changes if it adds a space, normalises, or lacks characters.
PROBE = '  A\t Ａ①\r\n ﬁe\u0301\u200b\u3000 \0İ \n '

# The marks of chat templates, which are one token each, even if a file adds them as plain text (special=false).
MARK = re.compile(r'<[|｜][^|｜<>\s]+[|｜]>|<(?:start|end)_of_\w+>')


class TokenizerBase:
  """Base class of tokenizers. They define `_table`, id -> bytes, `_control`, name -> id, and the names `bos` and `eos`.

  `ends`, ids that end a text in addition to eos, and `adds_bos` are for generation and scoring. `encode` does not
  depend on them, so tokenizers that differ only in these are equal.
  """

  @property
  def vocab_size(self) -> int:
    return len(self._table)

  @property
  def bos_id(self) -> int:
    return self.control_id(self.bos)

  @property
  def eos_id(self) -> int:
    return self.control_id(self.eos)

  @property
  def eos_ids(self) -> tuple[int, ...]:
    return (self.eos_id, *(i for i in self.ends if i != self.eos_id))

  @functools.cached_property
  def fingerprint(self) -> str:
    fields = [type(self).__name__, *(getattr(self, field.name) for field in dataclasses.fields(self) if field.compare)]
    return hashlib.sha256(repr(fields).encode()).hexdigest()[:16]

  def __reduce__(self):   # without cached properties, which hold objects of libraries
    return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

  def encode(self, text: str) -> np.ndarray:
    return self.encode_batch([text])[0]

  def sample(self, text: str, alpha: float, seed: int) -> np.ndarray:
    raise ValueError(f'a tokenizer of kind {type(self).__name__} writes a text in one way only, and cannot sample; '
                     'train a SentencePiece tokenizer, bpe or unigram')

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return self.decode_bytes(ids).decode('utf-8', 'replace')

  def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
    table = self._table
    return b''.join([table[i] for i in self._checked(ids)])

  def byte_lengths(self) -> np.ndarray:
    return np.array([len(piece) for piece in self._table], np.int32)

  @functools.cached_property
  def lossless(self) -> bool:
    spelled = lambda text: b''.join([self._table[i] for i in self.encode(text)])
    return all(spelled(text) == text.encode() for text in ('a', PROBE))   # 'a', because a space may be added before it

  def sizes(self, text: str, ids: np.ndarray) -> np.ndarray:
    pieces, data = [self._table[i] for i in ids], text.encode()
    joined = b''.join(pieces)
    if joined in (data, b' ' + data):
      ends = np.cumsum([len(piece) for piece in pieces], dtype=int) - (len(joined) - len(data))
    else:   # the text is normalised, or a part of it has no tokens
      ends = self._ends(text, ids)
    ends = np.maximum.accumulate(np.maximum(ends, 0))
    ends[-1:] = len(data)
    return np.diff(ends, prepend=0)

  def parse(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    names = '|'.join(map(re.escape, sorted(self._control, key=len, reverse=True)))
    ids, spans, place, tokenizer = [], [], 0, self
    for part in re.split(f'({names})', text):
      if part in self._control:
        ids.append(np.array([self._control[part]], np.int32))
        spans.append(np.array([[place, place + len(part)]]))
      else:
        ids.append(tokenizer.encode(part))
        spans.append(tokenizer._spans(part, ids[-1]) + place)
      place += len(part)
      tokenizer = self._inner
    return np.concatenate(ids), np.concatenate(spans)

  @property
  def _inner(self) -> 'TokenizerBase':
    """The tokenizer of the text after a control token."""
    return self

  def _spans(self, text: str, ids: np.ndarray) -> np.ndarray:
    """Returns the span of characters of each token, [n, 2]."""
    ends = self._ends(text, ids)
    starts = np.r_[0, ends][:-1]
    begins_character = np.frombuffer(text.encode(), np.uint8) & 0xC0 != 0x80   # of each byte of UTF-8
    character = np.r_[np.cumsum(begins_character) - 1, len(text)].astype(int)   # of each byte, and of the end
    return np.stack([character[starts], np.where(ends > starts, character[ends - 1] + 1, character[starts])], -1)

  def _ends(self, text: str, ids: np.ndarray) -> np.ndarray:
    """Returns the byte of the text where each token ends, int [n]."""
    return np.cumsum([len(self._table[i]) for i in ids], dtype=int)

  @property
  def control_names(self) -> tuple[str, ...]:
    return tuple(self._control)

  def control_id(self, name: str) -> int:
    if name not in self._control:
      raise ValueError(f'there is no control token {name!r} in this tokenizer, only {", ".join(self._control)}; '
                       'train one with control=(..., name)')
    return self._control[name]

  def _checked(self, ids: Sequence[int] | np.ndarray) -> list[int]:
    ids = np.asarray(ids, np.int64).reshape(-1)
    outside = ids[(ids < 0) | (ids >= self.vocab_size)]
    if len(outside):
      raise ValueError(f'token id {outside[0]} is outside the vocabulary of {self.vocab_size}')
    return ids.tolist()


@dataclasses.dataclass(frozen=True)
class Bytes(TokenizerBase):
  """UTF-8 bytes as ids 0..255, then bos, eos and the control tokens."""
  control: tuple[str, ...] = CONTROL

  bos, eos, ends, adds_bos, lossless = '<s>', '</s>', (), True, True

  def __post_init__(self):
    object.__setattr__(self, 'control', tuple(self.control))
    names = self.bos, self.eos, *self.control
    if len(names) != len(set(names)):
      raise ValueError(f'control tokens must differ from each other and from {self.bos} and {self.eos}: {self.control}')

  @functools.cached_property
  def _control(self) -> dict[str, int]:
    return {name: 256 + i for i, name in enumerate((self.bos, self.eos, *self.control))}

  @functools.cached_property
  def _table(self) -> list[bytes]:
    return [bytes([i]) for i in range(256)] + [b''] * len(self._control)

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    return [np.frombuffer(utf8(text), np.uint8).astype(np.int32) for text in texts]

  def save(self, folder: str | os.PathLike) -> None:
    write(folder, 'bytes.json', json.dumps({'control': self.control}, indent=1).encode())


def utf8(text: str) -> bytes:
  """Returns the UTF-8 of a text. Raises ValueError if it has a lone surrogate."""
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'{text[error.start]!r} at character {error.start} is a lone surrogate, not valid Unicode; '
                     'clean the text with lm.data.text.clean.Unicode()') from None


def write_separators(folder: str | os.PathLike, tokenizer: Any) -> None:
  """Writes separators.json: the names of bos and eos, and the rules about them."""
  names = ('bos', 'eos', 'ends', 'adds_bos', 'legacy')
  values = {name: getattr(tokenizer, name) for name in names if hasattr(tokenizer, name)}
  write(folder, 'separators.json', json.dumps(values).encode())


def write(folder: str | os.PathLike, name: str, data: bytes) -> None:
  """Writes a file in a folder, which is created if it is missing."""
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  atomic.write(folder / name, data)
