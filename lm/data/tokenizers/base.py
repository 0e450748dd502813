"""What a tokenizer is to the other rooms, what tokenizers share, and the simplest, bytes.

A tokenizer is an immutable value: equal files make equal tokenizers, with one fingerprint, and it can be pickled. What
is trained here, and `Bytes`, are lossless: decode(encode(text)) == text for all valid Unicode. `encode` takes no
text, '<s>' included, for a control token, and adds no bos or eos, whatever the file would add: batches place those.
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
  """What the other rooms know of a tokenizer."""

  @property
  def vocab_size(self) -> int: ...

  @property
  def bos_id(self) -> int:
    """Goes before a document. May equal `eos_id`, as in GPT-2."""

  @property
  def eos_id(self) -> int: ...

  @property
  def eos_ids(self) -> tuple[int, ...]:
    """`eos_id`, and other tokens that a model ends its text with, such as the end of a turn of chat."""

  @property
  def adds_bos(self) -> bool:
    """Whether a text by itself begins with bos, by the tokenizer's own rule: ours do, of others their files say it."""

  @property
  def fingerprint(self) -> str: ...

  def encode(self, text: str) -> np.ndarray:
    """int32 ids. Raises ValueError for lone surrogates, which are no valid Unicode."""

  def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
    """`encode` of each text, on all cores where the library has threads."""

  def sample(self, text: str, alpha: float, seed: int) -> np.ndarray:
    """The text in other tokens than `encode` gives, the same for a seed; ValueError where there is no such way.

    `alpha` is the share of merges that BPE leaves out, or the exponent of the probabilities of a unigram model.
    """

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text; control tokens are left out, and bytes that are no UTF-8 become U+FFFD."""

  def decode_bytes(self, ids: Sequence[int] | np.ndarray) -> bytes:
    """The UTF-8 of the tokens, also where a character is incomplete; control tokens have none."""

  def byte_lengths(self) -> np.ndarray:
    """[vocab_size] int32: UTF-8 bytes of text each token stands for; 0 for control, unknown and unused tokens.

    Over a document they add up to its length if the tokenizer is lossless. One that puts a space in front of a text
    counts that too, and normalising ones (T5) count their own text: see `sizes`.
    """

  @property
  def lossless(self) -> bool:
    """Whether the tokens of any text spell its own bytes, no more and no fewer."""

  def sizes(self, text: str, ids: np.ndarray) -> np.ndarray:
    """[len(ids)] int: bytes of the text's own UTF-8 that each token of `encode(text)` stands for; they add up to it."""

  def parse(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    """Text that spells control tokens on purpose (a chat template's): ids, and which characters each is of, [n, 2].

    As in `encode` no token is added. Tokens that share a character all have it in their span.
    """

  @property
  def control_names(self) -> tuple[str, ...]: ...

  def control_id(self, name: str) -> int:
    """Raises ValueError, with the names that exist, where `name` is no control token."""

  def save(self, folder: str | os.PathLike) -> None:
    """Writes what `load(folder)` opens again."""


def sentinels(count: int) -> tuple[str, ...]:
  """Names of the control tokens that stand for missing spans (T5, arXiv:1910.10683, has 100), or for what comes up."""
  return tuple(f'<|{i}|>' for i in range(count))


# Room for what objectives need beside bos and eos: padding, masks, fill-in-the-middle, chat, span corruption, and the
# modes of UL2 (arXiv:2205.05131). The order is that of the ids of `Bytes`: what is new comes last.
CONTROL = ('<|pad|>', '<|mask|>', '<|prefix|>', '<|middle|>', '<|suffix|>',
           '<|system|>', '<|user|>', '<|assistant|>', '<|end|>', *sentinels(32),
           '<|R|>', '<|S|>', '<|X|>')


# Text that tokenizers which put a space in front, normalise, or lack characters do not spell as it is.
PROBE = '  A\t Ａ①\r\n ﬁe\u0301\u200b\u3000 \0İ \n '

# What templates write to mark a turn: one token, also where a file adds it as plain text (special=false).
MARK = re.compile(r'<[|｜][^|｜<>\s]+[|｜]>|<(?:start|end)_of_\w+>')


class TokenizerBase:
  """What tokenizers share. They give `_table`, id -> bytes, and `_control`, name -> id; `bos` and `eos` are names.

  `ends`, ids that end a text beside eos, and `adds_bos` are of generation and scoring: `encode` does not read them, so
  they do not count where tokenizers are compared.
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

  def __reduce__(self):  # without what is cached: libraries' objects are made again where they are needed
    return type(self), tuple(getattr(self, field.name) for field in dataclasses.fields(self))

  def encode(self, text: str) -> np.ndarray:
    return self.encode_batch([text])[0]

  def sample(self, text: str, alpha: float, seed: int) -> np.ndarray:
    raise ValueError(f'a tokenizer of kind {type(self).__name__} writes a text in one way: to sample others, train a '
                     'SentencePiece one, bpe or unigram')

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
    return all(spelled(text) == text.encode() for text in ('a', PROBE))   # some put a space in front where none is

  def sizes(self, text: str, ids: np.ndarray) -> np.ndarray:
    pieces, own = [self._table[i] for i in ids], text.encode()
    joined = b''.join(pieces)
    if joined in (own, b' ' + own):
      ends = np.cumsum([len(piece) for piece in pieces], dtype=int) - (len(joined) - len(own))
    else:   # a text that is normalised, or has no tokens for all of it
      ends = self._ends(text, ids)
    ends = np.maximum.accumulate(np.maximum(ends, 0))
    ends[-1:] = len(own)
    return np.diff(ends, prepend=0)

  def parse(self, text: str) -> tuple[np.ndarray, np.ndarray]:
    names = '|'.join(map(re.escape, sorted(self._control, key=len, reverse=True)))
    parts = re.split(f'({names})', text)
    starts = np.cumsum([0, *map(len, parts)])
    readers = [self, *[self._inner] * (len(parts) - 1)]
    encoded = [np.array([self._control[x]], np.int32) if x in self._control else reader.encode(x)
             for x, reader in zip(parts, readers)]
    spans = [np.array([[0, len(x)]]) if x in self._control else reader._spans(x, ids)
             for x, ids, reader in zip(parts, encoded, readers)]
    return np.concatenate(encoded), np.concatenate([span + start for span, start in zip(spans, starts)])

  @property
  def _inner(self) -> 'TokenizerBase':
    """What reads the text after a control token."""
    return self

  def _spans(self, text: str, ids: np.ndarray) -> np.ndarray:
    ends = self._ends(text, ids)
    starts = np.r_[0, ends][:-1]
    first = np.frombuffer(text.encode(), np.uint8) & 0xC0 != 0x80
    character = np.r_[np.cumsum(first) - 1, len(text)].astype(int)  # of each byte, and of the end
    return np.stack([character[starts], np.where(ends > starts, character[ends - 1] + 1, character[starts])], -1)

  def _ends(self, text: str, ids: np.ndarray) -> np.ndarray:
    """The byte of the text where each token ends."""
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
    if bad := ids[(ids < 0) | (ids >= self.vocab_size)][:1].tolist():
      raise ValueError(f'token id {bad[0]} is outside the vocabulary of {self.vocab_size}')
    return ids.tolist()


@dataclasses.dataclass(frozen=True)
class Bytes(TokenizerBase):
  """UTF-8 bytes as ids 0..255, then bos, eos and the control tokens."""
  control: tuple[str, ...] = CONTROL

  bos, eos, ends, adds_bos, lossless = '<s>', '</s>', (), True, True

  def __post_init__(self):
    object.__setattr__(self, 'control', tuple(self.control))
    if len(names := (self.bos, self.eos, *self.control)) != len(set(names)):
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
  try:
    return text.encode()
  except UnicodeEncodeError as error:
    raise ValueError(f'{text[error.start]!r} at character {error.start} is a lone surrogate, no valid Unicode; '
                     'clean the text with lm.data.clean.Unicode()') from None


def write_separators(folder: str | os.PathLike, tokenizer: Any) -> None:
  names = ('bos', 'eos', 'ends', 'adds_bos', 'legacy')
  named = {name: getattr(tokenizer, name) for name in names if hasattr(tokenizer, name)}
  write(folder, 'separators.json', json.dumps(named).encode())


def write(folder: str | os.PathLike, name: str, data: bytes) -> None:
  folder = pathlib.Path(folder)
  folder.mkdir(parents=True, exist_ok=True)
  atomic.write(folder / name, data)
