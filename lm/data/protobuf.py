"""Reads what SentencePiece writes: what its library does not tell of a .model file, and where in a text pieces lie.

Specifications: https://protobuf.dev/programming-guides/encoding, and sentencepiece_model.proto. The generated classes
would need protobuf, and two libraries in one process that both bring them have clashed.
"""
import dataclasses
import struct
from collections.abc import Callable, Iterator
from typing import Any

UNIGRAM, BPE = 1, 2
# Sums of multiples of 1/16 are exact in float32 up to 2**20, so that paths of equal score are equal in any library.
EXACT = 16
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclasses.dataclass(frozen=True)
class Piece:
  name: str
  score: float
  score_at: int  # where in the file its 4 bytes are; 0: nowhere, for 0.
  type: int      # NORMAL, ...
  type_at: int   # where in the file that is; 0: nowhere, for NORMAL


def pieces(model: bytes) -> list[Piece]:
  found = []
  for number, start, end in _fields(model, 0, len(model)):
    if number == 1:
      spans = {n: (a, b) for n, a, b in _fields(model, start, end)}
      score_at, type_at = (spans.get(n, (0,))[0] for n in (2, 3))
      score = struct.unpack_from('<f', model, score_at)[0] if score_at else 0.
      found.append(Piece(model[slice(*spans[1])].decode(), score, score_at, model[type_at] if type_at else NORMAL,
                         type_at))
  return found


def kind(model: bytes) -> int:
  """UNIGRAM, BPE, or a number that we do not use."""
  settings = next(((a, b) for number, a, b in _fields(model, 0, len(model)) if number == 2), (0, 0))
  return next((model[a] for number, a, _ in _fields(model, *settings) if number == 3), UNIGRAM)


def maps_characters(model: bytes) -> bool:
  """Whether a text is normalised by a table of characters before it is cut."""
  specs = [(a, b) for number, a, b in _fields(model, 0, len(model)) if number == 3]
  return any(b > a for spec in specs for number, a, b in _fields(model, *spec) if number == 2)


def as_control(model: bytes, matches: Callable[[str], Any]) -> bytes:
  """The model with those user-defined pieces as control tokens whose names match: no text has them then."""
  data = bytearray(model)
  for piece in pieces(model):
    if piece.type == USER_DEFINED and matches(piece.name):
      data[piece.type_at] = CONTROL
  return bytes(data)


def ends(encoded: bytes) -> list[int]:
  """Of an encoded text (sentencepiece.proto): the byte of the text where each piece ends."""
  found = [(a, b) for number, a, b in _fields(encoded, 0, len(encoded)) if number == 2]
  at = [[a for number, a, _ in _fields(encoded, *piece) if number == 5] for piece in found]
  return [_varint(encoded, a[0])[0] if a else 0 for a in at]


def rounded(model: bytes) -> bytes:
  """The model with every score a multiple of 1/EXACT."""
  data = bytearray(model)
  for piece in pieces(model):
    if piece.score_at:
      struct.pack_into('<f', data, piece.score_at, round(piece.score * EXACT) / EXACT)
  return bytes(data)


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
  """Number, start and end of each field's value in data[at:end]."""
  while at < end:
    tag, at = _varint(data, at)
    match tag & 7:
      case 0:
        stop = _varint(data, at)[1]
      case 2:
        size, at = _varint(data, at)
        stop = at + size
      case wire:
        stop = at + {1: 8, 5: 4}[wire]
    yield tag >> 3, at, stop
    at = stop


def _varint(data: bytes, at: int) -> tuple[int, int]:
  value = shift = 0
  while True:
    byte, at = data[at], at + 1
    value |= (byte & 0x7F) << shift
    shift += 7
    if byte < 0x80:
      return value, at
