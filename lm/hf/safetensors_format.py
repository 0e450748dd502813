"""The format of safetensors files, read and written as bytes: https://huggingface.co/docs/safetensors.

A file consists of the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and offsets of each
tensor), and the data, row-major and without gaps. It is parsed here because the library gives no views of a mapped
file, and keeps the pages that were read. All values of a header are checked.
"""
import collections
import json
import math
import mmap
import pathlib
import reprlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

MAX_JSON = 100_000_000   # bytes of a header, as in the library, or of an index
# In the order of the data in a file, which is the library's: wide dtypes come first, so that all are aligned.
DTYPES = {name: np.dtype(dtype) for name, dtype in {
    'U64': np.uint64, 'I64': np.int64, 'F64': np.float64, 'F32': np.float32, 'U32': np.uint32, 'I32': np.int32,
    'BF16': ml_dtypes.bfloat16, 'F16': np.float16, 'U16': np.uint16, 'I16': np.int16,
    'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2, 'I8': np.int8, 'U8': np.uint8,
    'BOOL': np.bool_}.items()}
NAMES = {dtype: name for name, dtype in DTYPES.items()}

Tensor = tuple[tuple[int, ...], Any, Callable[[], Any]]   # shape, dtype, and a function that returns the array

_short = reprlib.Repr()
_short.maxstring = 200


class Info(NamedTuple):
  """The place of a tensor: `start` is the offset in bytes of its data in the file."""
  shape: tuple[int, ...]
  dtype: np.dtype
  file: pathlib.Path
  start: int


def quote(value: Any) -> str:
  """Returns the `repr` of a value from a file, shortened."""
  return _short.repr(value)


def damaged(path: pathlib.Path, problem: str) -> ValueError:
  """Returns the error for a file that is not as it should be."""
  return ValueError(f'{path}: {problem}; download or convert it again')


def read_json(path: pathlib.Path, text: bytes) -> dict:
  """Returns a JSON object. Raises ValueError if it is none, is too long, or has a name twice."""
  def unique(pairs: list[tuple[str, Any]]) -> dict:
    name, count = collections.Counter([name for name, _ in pairs] or ['']).most_common(1)[0]
    if count > 1:
      raise ValueError(f'{quote(name)} is there twice')
    ''.join(name for name, _ in pairs).encode()   # raises for half of a surrogate pair
    return dict(pairs)

  if len(text) > MAX_JSON:
    raise damaged(path, f'its JSON has more than {MAX_JSON:,} bytes')
  try:
    value = json.loads(text.decode(), object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    raise damaged(path, f'its JSON cannot be read ({error})') from None
  if not isinstance(value, dict):
    raise damaged(path, f'its JSON is {quote(value)} and not an object')
  return value


def parse(path: pathlib.Path, data: mmap.mmap) -> dict[str, Info]:
  """Returns the tensors of a file by name. Raises ValueError unless they cover the data, each byte once."""
  if data[:20] == b'version https://git-':
    raise ValueError(f'{path} is only a pointer of Git LFS: run `git lfs pull`')
  start = 8 + int.from_bytes(data[:8], 'little')
  total = len(data) - start
  if total < 0 or start - 8 > MAX_JSON:
    raise damaged(path, f'it is truncated or not safetensors: a header of {start - 8:,} bytes (at most {MAX_JSON:,}) '
                        f'in a file of {len(data):,}')
  header = read_json(path, data[8:start])
  metadata = header.pop('__metadata__', {})
  if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
    raise damaged(path, f'__metadata__ {quote(metadata)} is not text by name')
  infos, spans = {}, [(total, total + 1, 'the end of the file')]
  for name, entry in header.items():
    try:
      shape, dtype, span = _parse_entry(entry, total)
    except ValueError as error:
      raise damaged(path, f'tensor {quote(name)}: {error}') from None
    infos[name] = Info(shape, dtype, path, start + span[0])
    spans.append((*span, f'tensor {quote(name)}'))
  end_of_last = 0
  for begin, end, what in sorted(spans):
    if begin != end_of_last:
      raise damaged(path, f'{what} begins at byte {begin:,} of the data, where tensors before it end at '
                          f'{end_of_last:,}')
    end_of_last = end
  return infos


def _parse_entry(entry: Any, total: int) -> tuple[tuple[int, ...], np.dtype, tuple[int, int]]:
  """Returns shape, dtype, and begin and end of a tensor in `total` bytes of data. Raises ValueError if they differ."""
  name, shape, span = (isinstance(entry, dict) and entry.get(key) for key in ('dtype', 'shape', 'data_offsets'))
  dtype = DTYPES.get(name) if isinstance(name, str) else None
  if dtype is None:
    raise ValueError(f'dtype {quote(name)} is none of {", ".join(DTYPES)}')
  # NumPy has at most 64 axes, and sizes below 2 ** 63 bytes, where an axis of size 0 counts as 1.
  if not _are_counts(shape) or len(shape) > 64 or math.prod(n or 1 for n in shape) * dtype.itemsize >= 1 << 63:
    raise ValueError(f'shape {quote(shape)} is not that of an array')
  if not _are_counts(span) or len(span) != 2 or span[0] > span[1]:
    raise ValueError(f'data_offsets {quote(span)} are not a begin and an end')
  if span[1] > total:
    raise ValueError(f'data_offsets {quote(span)} are beyond the {total:,} bytes of data: the file is truncated')
  size = math.prod(shape) * dtype.itemsize
  if size != span[1] - span[0]:
    raise ValueError(f'data_offsets {span} do not fit the {size:,} bytes of {name} {shape}')
  return tuple(shape), dtype, tuple(span)


def _are_counts(value: Any) -> bool:
  return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)   # True is an `int` too


def contents(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
  """Yields the parts of a file: its length and header, then each tensor.

  The bytes are those that the library writes: data sorted by dtype, then by name. Raises ValueError if an array has
  another shape or dtype than declared.
  """
  ranks = {dtype: rank for rank, dtype in enumerate(NAMES)}
  names = sorted(tensors, key=lambda name: (ranks[tensors[name][1]], name))
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name in names:
    shape, dtype, _ = tensors[name]
    begin, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {'dtype': NAMES[dtype], 'shape': shape, 'data_offsets': [begin, end]}
  text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)
  yield len(text).to_bytes(8, 'little') + text
  for name in names:
    shape, dtype, make = tensors[name]
    array = np.asarray(make())
    if (array.shape, array.dtype) != (shape, dtype):
      raise ValueError(f'tensor {name!r} is {array.dtype}{list(array.shape)}, and not {dtype}{list(shape)} as declared')
    yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data   # bfloat16 itself has no buffer
    del array
