"""Reads what SentencePiece writes: what its library does not tell of a .model file, and where in a text pieces lie.

Specifications: https://protobuf.dev/programming-guides/encoding, and sentencepiece_model.proto. The generated classes
would need protobuf, and two libraries in one process that both bring them have clashed.
"""
import dataclasses
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

UNIGRAM, BPE = 1, 2
# Sums of multiples of 1/16 are exact in float32 up to 2**20, so that paths of equal score are equal in any library.
EXACT = 16
NO_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])   # after a model: its normaliser puts no space in front of a text
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclasses.dataclass(frozen=True)
class Piece:
  name: str
  score: float
  score_at: int  # where in the file its 4 bytes are; 0: nowhere, for 0.
  type: int      # NORMAL, ...


def pieces(model: bytes) -> list[Piece]:
  found = []
  for number, start, end in _fields(model, 0, len(model)):
    if number == 1:
      spans = {n: (a, b) for n, a, b in _fields(model, start, end)}
      score_at, type_at = (spans.get(n, (0,))[0] for n in (2, 3))
      score = struct.unpack_from('<f', model, score_at)[0] if score_at else 0.
      found.append(Piece(model[slice(*spans[1])].decode(), score, score_at, model[type_at] if type_at else NORMAL))
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
  return _retyped(model, {i: CONTROL for i, piece in enumerate(pieces(model))
                          if piece.type == USER_DEFINED and matches(piece.name)})


def with_added(model: bytes, names: Mapping[int, str], special: Collection[int]) -> bytes:
  """The model with more pieces, by id: control tokens, or user-defined ones that are found whole in a text.

  Raises ValueError where transformers would give one another id: that of its name, or else the next one.
  """
  known = pieces(model)
  types = {i: CONTROL if i in special else USER_DEFINED for i in names}
  place, following = {piece.name: i for i, piece in enumerate(known)}, len(known)
  for i, name in sorted(names.items()):
    expected = place.get(name, following)
    if i != expected:
      raise ValueError(f'the files beside it add {name!r} as token {i}, and transformers would give it the id '
                       f'{expected}')
    following = max(following, i + 1)
  more = b''.join(_field(1, _field(1, name.encode()) + bytes([3 << 3, types[i]]))
                  for i, name in sorted(names.items()) if i >= len(known))
  changed = {i: types[i] for i in names if i < len(known) and known[i].type in (NORMAL, USER_DEFINED)}
  return _retyped(model, changed) + more


def _retyped(model: bytes, types: Mapping[int, int]) -> bytes:
  """The model with other types of some of its pieces: of a field that is there twice, the last counts."""
  if not types:
    return model
  parts, i = [], 0
  for number, start, end in _fields(model, 0, len(model)):
    if number == 1:
      parts.append(_field(1, model[start:end] + (bytes([3 << 3, types[i]]) if i in types else b'')))
      i += 1
    else:
      parts.append(_field(number, model[start:end]))
  return b''.join(parts)


def _field(number: int, data: bytes) -> bytes:
  """A field whose value is bytes, or a message."""
  size, length = len(data), b''
  while size >= 0x80:
    length += bytes([size & 0x7F | 0x80])
    size >>= 7
  return bytes([number << 3 | 2]) + length + bytes([size]) + data


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
