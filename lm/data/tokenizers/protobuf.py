"""Reads and changes SentencePiece files beyond what its library can do: types of pieces, and their places in a text.

Specifications: https://protobuf.dev/programming-guides/encoding, and sentencepiece_model.proto. Generated classes would
need protobuf, and would conflict with those of another library in the same process.
"""
import dataclasses
import struct
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

UNIGRAM, BPE = 1, 2
# Scores are multiples of 1/16: their sums are exact in float32 up to 2**20, so that ties are ties in any library.
EXACT = 16
NO_PREFIX = bytes([3 << 3 | 2, 2, 3 << 3, 0])   # appended to a model, it turns off the space before a text
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


@dataclasses.dataclass(frozen=True)
class Piece:
  name: str
  score: float
  score_place: int  # the place of its 4 bytes in the file; 0: the file has no score, which is 0 then
  type: int         # NORMAL, ...


def pieces(model: bytes) -> list[Piece]:
  """Returns the pieces of a model, by id."""
  all_pieces = []
  for number, start, end in _fields(model, 0, len(model)):
    if number == 1:
      spans = {n: (a, b) for n, a, b in _fields(model, start, end)}
      score_place, type_place = (spans.get(n, (0,))[0] for n in (2, 3))
      score = struct.unpack_from('<f', model, score_place)[0] if score_place else 0.
      all_pieces.append(Piece(model[slice(*spans[1])].decode(), score, score_place,
                              model[type_place] if type_place else NORMAL))
  return all_pieces


def kind(model: bytes) -> int:
  """Returns UNIGRAM, BPE, or another number of SentencePiece."""
  settings = next(((a, b) for number, a, b in _fields(model, 0, len(model)) if number == 2), (0, 0))
  return next((model[a] for number, a, _ in _fields(model, *settings) if number == 3), UNIGRAM)


def maps_characters(model: bytes) -> bool:
  """Returns whether a model normalises a text by a table of characters."""
  specs = [(a, b) for number, a, b in _fields(model, 0, len(model)) if number == 3]
  return any(b > a for spec in specs for number, a, b in _fields(model, *spec) if number == 2)


def as_control(model: bytes, matches: Callable[[str], Any]) -> bytes:
  """Returns the model with the matching user-defined pieces as control tokens, to which no text is encoded."""
  return _with_types(model, {i: CONTROL for i, piece in enumerate(pieces(model))
                             if piece.type == USER_DEFINED and matches(piece.name)})


def with_added(model: bytes, names: Mapping[int, str], special: Collection[int]) -> bytes:
  """Returns the model with further pieces, by id: control tokens, or user-defined pieces, which match whole in a text.

  Raises ValueError if transformers would give a piece another id: the id of its name, or else the next id.
  """
  old_pieces = pieces(model)
  types = {i: CONTROL if i in special else USER_DEFINED for i in names}
  ids, next_id = {piece.name: i for i, piece in enumerate(old_pieces)}, len(old_pieces)
  for i, name in sorted(names.items()):
    expected = ids.get(name, next_id)
    if i != expected:
      raise ValueError(f'the files beside it add {name!r} as token {i}, and transformers would give it the id '
                       f'{expected}; save its tokenizer.json with transformers')
    next_id = max(next_id, i + 1)
  new_pieces = b''.join(_field(1, _field(1, name.encode()) + bytes([3 << 3, types[i]]))
                        for i, name in sorted(names.items()) if i >= len(old_pieces))
  changed = {i: types[i] for i in names if i < len(old_pieces) and old_pieces[i].type in (NORMAL, USER_DEFINED)}
  return _with_types(model, changed) + new_pieces


def _with_types(model: bytes, types: Mapping[int, int]) -> bytes:
  """Returns the model with other types of some pieces. If a field occurs twice, its last value counts."""
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
  """Encodes a field whose value is bytes, or a message."""
  size, length = len(data), b''
  while size >= 0x80:
    length += bytes([size & 0x7F | 0x80])
    size >>= 7
  return bytes([number << 3 | 2]) + length + bytes([size]) + data


def ends(encoded: bytes) -> list[int]:
  """Returns the byte of the text where each piece of an encoded text (sentencepiece.proto) ends."""
  pieces = [(a, b) for number, a, b in _fields(encoded, 0, len(encoded)) if number == 2]
  end_fields = [[a for number, a, _ in _fields(encoded, *piece) if number == 5] for piece in pieces]
  return [_varint(encoded, places[0])[0] if places else 0 for places in end_fields]


def rounded(model: bytes) -> bytes:
  """Returns the model with every score rounded to a multiple of 1/EXACT."""
  data = bytearray(model)
  for piece in pieces(model):
    if piece.score_place:
      struct.pack_into('<f', data, piece.score_place, round(piece.score * EXACT) / EXACT)
  return bytes(data)


def _fields(data: bytes, place: int, end: int) -> Iterator[tuple[int, int, int]]:
  """Yields the number, start and end of each field's value in data[place:end]."""
  while place < end:
    tag, place = _varint(data, place)
    match tag & 7:
      case 0:
        stop = _varint(data, place)[1]
      case 2:
        size, place = _varint(data, place)
        stop = place + size
      case wire:
        stop = place + {1: 8, 5: 4}[wire]
    yield tag >> 3, place, stop
    place = stop


def _varint(data: bytes, place: int) -> tuple[int, int]:
  """Returns the number at a place, and the place after it."""
  value = shift = 0
  while True:
    byte, place = data[place], place + 1
    value |= (byte & 0x7F) << shift
    shift += 7
    if byte < 0x80:
      return value, place
