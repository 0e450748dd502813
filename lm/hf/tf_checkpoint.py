"""Checkpoints of TensorFlow, read without TensorFlow: `PREFIX.index` and `PREFIX.data-00000-of-0000N`.

The index is a table of LevelDB, without compression: blocks of sorted entries, each followed by a byte for its
compression and a CRC32C, and a footer with the place of the block that lists the blocks. A key is the name of a
variable, and its value a `BundleEntryProto`: dtype, shape, and the place of its bytes in a data file. The empty key has
the `BundleHeaderProto`. See tensorflow/core/util/tensor_bundle and tensorflow/core/lib/io/table.

The checksums of blocks are compared; those of tensors are not, because Python takes minutes for a large model.
"""
import functools
import math
import mmap
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from lm import paths

_MAGIC = (0xdb4775248b80fb57).to_bytes(8, 'little')
_FOOTER = 48
_LONGEST_KEY = 4096   # bytes
_DTYPES = {1: np.float32, 2: np.float64, 3: np.int32, 9: np.int64, 14: jnp.bfloat16, 19: np.float16}   # types.proto


class Entry(NamedTuple):
  """Where the bytes of a variable are."""
  dtype: np.dtype
  shape: tuple[int, ...]
  shard: int
  offset: int
  size: int


class Variables(Mapping[str, np.ndarray]):
  """The variables of a checkpoint by name, as read-only views of mapped files. As a context manager, it closes them.

  Variables of other types than floats and integers, such as the graph of objects of a SavedModel, are left out.

  Raises:
    FileNotFoundError: a file of the checkpoint is missing.
    ValueError: a file is damaged, compressed, or not of this format.
  """

  def __init__(self, prefix: str | os.PathLike):
    self.prefix = str(paths.local(prefix))
    index = pathlib.Path(f'{self.prefix}.index')
    if not index.is_file():
      raise FileNotFoundError(f'{index} is missing; give the prefix of a TensorFlow checkpoint, such as '
                              'FOLDER/variables/variables')
    entries = dict(_table(index.read_bytes(), str(index)))
    header = _numbers(entries.pop(b'', b''), str(index))
    if header.get(2, 0):
      raise ValueError(f'{index} is of a big-endian machine, which is not supported')
    count = header.get(1, 0)
    if not count:
      raise ValueError(f'{index} has no header with the number of data files; copy the checkpoint anew')
    self.entries = {name.decode(): entry for name, value in sorted(entries.items())
                    if (entry := _entry(value, str(index))) is not None}
    self._maps = []
    for shard in range(count):
      path = f'{self.prefix}.data-{shard:05}-of-{count:05}'
      if not os.path.isfile(path):
        self.close()
        raise FileNotFoundError(f'{path} is missing; copy all files of the checkpoint')
      with open(path, 'rb') as file:
        self._maps.append(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if os.path.getsize(path) else b'')
    for name, entry in self.entries.items():
      if entry.shard >= count or entry.offset + entry.size > len(self._maps[entry.shard]):
        self.close()
        raise ValueError(f'{self.prefix}: the bytes of {name} lie beyond the end of its data file; copy it anew')

  def __getitem__(self, name: str) -> np.ndarray:
    entry = self.entries[name]
    flat = np.frombuffer(self._maps[entry.shard], entry.dtype, math.prod(entry.shape), entry.offset)
    return flat.reshape(entry.shape)

  def __iter__(self) -> Iterator[str]:
    return iter(self.entries)

  def __len__(self) -> int:
    return len(self.entries)

  def release(self) -> None:
    """Does nothing; see `files.Weights.release`."""

  def close(self) -> None:
    for file in self._maps:
      if isinstance(file, mmap.mmap):
        try:
          file.close()
        except BufferError:   # an array still refers to the file, which is closed with it
          continue

  def __enter__(self) -> 'Variables':
    return self

  def __exit__(self, *error: object) -> None:
    self.close()


def _varint(data: bytes, place: int) -> tuple[int, int]:
  """Returns a number in LEB128, and the place after it."""
  value = shift = 0
  while True:
    byte = data[place]
    value |= (byte & 0x7F) << shift
    place, shift = place + 1, shift + 7
    if byte < 0x80:
      return value, place


def _table(data: bytes, path: str) -> Iterator[tuple[bytes, bytes]]:
  """Yields the entries of a table of LevelDB."""
  if len(data) < _FOOTER or data[-8:] != _MAGIC:
    raise ValueError(f'{path} is not the index of a TensorFlow checkpoint, or was cut off; copy it anew')
  try:
    place = len(data) - _FOOTER
    for _ in range(2):   # the block of meta data
      _, place = _varint(data, place)
    for _, handle in _block(data, *_handle(data, place), path):
      yield from _block(data, *_handle(handle, 0), path)
  except IndexError:
    raise ValueError(f'{path} is damaged; copy it anew') from None


def _handle(data: bytes, place: int) -> tuple[int, int]:
  """Returns the offset and the size of a block."""
  offset, place = _varint(data, place)
  return offset, _varint(data, place)[0]


def _block(data: bytes, offset: int, size: int, path: str) -> Iterator[tuple[bytes, bytes]]:
  """Yields the entries of a block. A key repeats a part of the one before it, which is not stored."""
  if offset + size + 5 > len(data):
    raise ValueError(f'{path} is damaged: a block lies beyond its end; copy it anew')
  if data[offset + size]:
    raise ValueError(f'{path} is compressed (type {data[offset + size]}), which is not supported; save the checkpoint '
                     'anew with TensorFlow, which does not compress it')
  stored = int.from_bytes(data[offset + size + 1:offset + size + 5], 'little')
  if _masked(crc32c(data[offset:offset + size + 1])) != stored:
    raise ValueError(f'{path} is damaged: the checksum of a block differs; copy it anew')
  block = data[offset:offset + size]
  restarts = int.from_bytes(block[-4:], 'little')
  place, end, key = 0, size - 4 * (restarts + 1), b''
  while place < end:
    shared, place = _varint(block, place)
    own, place = _varint(block, place)
    length, place = _varint(block, place)
    if shared + own > _LONGEST_KEY:   # a small file could otherwise take all memory
      raise ValueError(f'{path} is damaged: a name has {shared + own} bytes; copy it anew')
    key = key[:shared] + block[place:place + own]
    yield key, block[place + own:place + own + length]
    place += own + length


def _fields(message: bytes, path: str) -> Iterator[tuple[int, int | bytes]]:
  """Yields the number and the value of each field of a protocol buffer."""
  place = 0
  try:
    while place < len(message):
      tag, place = _varint(message, place)
      kind = tag & 7
      if kind == 0:
        value, place = _varint(message, place)
      elif kind in (1, 2, 5):
        size, place = _varint(message, place) if kind == 2 else (8 if kind == 1 else 4, place)
        value, place = message[place:place + size], place + size
      else:
        raise ValueError(f'{path} is damaged: a field has wire type {kind}; copy it anew')
      yield tag >> 3, value
  except IndexError:
    place = len(message) + 1
  if place > len(message):
    raise ValueError(f'{path} is damaged: a field is cut off; copy it anew')


def _numbers(message: bytes, path: str) -> dict[int, int]:
  """Returns the integers of a protocol buffer by the number of their field."""
  return {number: value for number, value in _fields(message, path) if isinstance(value, int)}


def _entry(message: bytes, path: str) -> Entry | None:
  """Returns an entry; None if its type is neither float nor integer. Raises ValueError if it is stored in slices."""
  by_number = _numbers(message, path)
  if by_number.get(1) not in _DTYPES:
    return None
  parts = [(number, value) for number, value in _fields(message, path) if isinstance(value, bytes)]
  if any(number == 7 for number, _ in parts):
    raise ValueError(f'{path} has a variable that is stored in slices, which is not supported; save it in one piece')
  shape = tuple(_numbers(size, path).get(1, 0) for number, value in parts if number == 2
                for dimension, size in _fields(value, path) if dimension == 2 and isinstance(size, bytes))
  entry = Entry(np.dtype(_DTYPES[by_number[1]]), shape, by_number.get(3, 0), by_number.get(4, 0), by_number.get(5, 0))
  if math.prod(shape) * entry.dtype.itemsize != entry.size:
    raise ValueError(f'{path} is damaged: {entry.size} bytes for shape {shape} of {entry.dtype}; copy it anew')
  return entry


@functools.cache
def _crc_table() -> list[int]:
  table = []
  for byte in range(256):
    value = byte
    for _ in range(8):
      value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
    table.append(value)
  return table


def crc32c(data: bytes) -> int:
  """Returns the CRC-32C (Castagnoli) of some bytes; 2 MB take a second."""
  table, value = _crc_table(), 0xFFFFFFFF
  for byte in data:
    value = value >> 8 ^ table[(value ^ byte) & 0xFF]
  return value ^ 0xFFFFFFFF


def _masked(crc: int) -> int:
  """Returns the form in which LevelDB stores a checksum."""
  return (crc >> 15 | crc << 17 & 0xFFFFFFFF) + 0xA282EAD8 & 0xFFFFFFFF
