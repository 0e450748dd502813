"""Hugging Face weight folders, read and written without torch: safetensors files, mapped into memory.

  folder/model.safetensors                    all tensors, or
  folder/model-00001-of-0000N.safetensors     shards, and
  folder/model.safetensors.index.json         which shard has which tensor

A file is the length of its header (8 bytes, little-endian), the header (JSON: dtype, shape and place of each tensor),
and the data, row-major and without gaps: https://huggingface.co/docs/safetensors. It is parsed here because the library
gives no views of a mapped file, and keeps the pages that were read. Nothing that a file says is believed unchecked.
"""
import collections
import contextlib
import json
import math
import mmap
import os
import pathlib
import reprlib
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_SINGLE, _INDEX = 'model.safetensors', 'model.safetensors.index.json'
_MAX_JSON = 100_000_000  # bytes of a header, as in the library, or of an index
_DTYPES = {name: np.dtype(dtype) for name, dtype in {  # in the library's order of data: aligned, as the wide come first
    'U64': np.uint64, 'I64': np.int64, 'F64': np.float64, 'F32': np.float32, 'U32': np.uint32, 'I32': np.int32,
    'BF16': ml_dtypes.bfloat16, 'F16': np.float16, 'U16': np.uint16, 'I16': np.int16,
    'F8_E4M3': ml_dtypes.float8_e4m3fn, 'F8_E5M2': ml_dtypes.float8_e5m2, 'I8': np.int8, 'U8': np.uint8,
    'BOOL': np.bool_}.items()}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}
_limited = reprlib.Repr()
_limited.maxstring = 200
_show = _limited.repr  # of what a file says, which may be long

Tensor = tuple[tuple[int, ...], Any, Callable[[], Any]]  # shape, dtype, and what gives the array


class Info(NamedTuple):
  shape: tuple[int, ...]
  dtype: np.dtype
  file: pathlib.Path
  start: int  # of the data in the file, in bytes


class Weights(Mapping[str, np.ndarray]):
  """The tensors of a folder by name: read-only views of mapped files, of which only the pages touched are read.

  Opening reads headers alone: `info` has shape, dtype and place of each tensor. Of a single file and an index, the
  single file counts, as in transformers. Files must not be cut short while they are open; as a context manager it
  closes them.

  Raises:
    ValueError: there are no weights in safetensors, or a file is damaged or does not fit the index.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = pathlib.Path(folder).expanduser()
    self.info: dict[str, Info] = {}
    self._maps: dict[pathlib.Path, mmap.mmap] = {}
    try:
      files, placed = _find(self.folder)
      for file in files:
        path = _inside(self.folder, file)
        with open(path, 'rb') as f:
          self._maps[path] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        infos = _parse(path, self._maps[path])
        for name in infos if placed is not None else ():
          if placed.get(name) != file:
            where = f'says is in {placed[name]}' if name in placed else 'lacks'
            raise _damaged(path, f'it has tensor {_show(name)}, which {_INDEX} {where}')
        self.info |= infos
      for name in (placed or {}).keys() - self.info.keys():
        raise _damaged(self.folder / placed[name], f'it lacks tensor {_show(name)}, which {_INDEX} says it has')
    except BaseException:
      self.close()
      raise

  def __getitem__(self, name: str) -> np.ndarray:
    info = self.info[name]
    if info.file not in self._maps:
      raise ValueError(f'{self.folder} is closed: read tensor {name!r} before')
    # Not `np.ndarray(buffer=...)`, which lets the map be closed under it.
    return np.frombuffer(self._maps[info.file], info.dtype, math.prod(info.shape), info.start).reshape(info.shape)

  def __iter__(self) -> Iterator[str]:
    return iter(self.info)

  def __len__(self) -> int:
    return len(self.info)

  def __enter__(self) -> 'Weights':
    return self

  def __exit__(self, *error: object) -> None:
    self.close()

  def release(self) -> None:
    """Gives back the memory of the pages read so far. Views stay valid: they read them again."""
    for mapped in self._maps.values() if hasattr(mmap, 'MADV_DONTNEED') else ():
      mapped.madvise(mmap.MADV_DONTNEED)

  def close(self) -> None:
    """Views stay valid; a file that is still viewed is closed with the last view."""
    while self._maps:
      with contextlib.suppress(BufferError):  # it is viewed
        self._maps.popitem()[1].close()


def write(folder: str | os.PathLike, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
          max_shard_bytes: int = 5_000_000_000) -> None:
  """Writes weights as a folder that appears whole or not at all, with one tensor at a time in memory.

  The bytes of a file are those that the library writes: data by dtype, then by name.

  Args:
    folder: not there yet or empty, as `new_folder` makes it: other files are added after the weights.
    tensors: by name: shape, dtype, and a function that gives the array. Shards are filled in this order.
    max_shard_bytes: of data in a file that has more than one tensor.

  Raises:
    ValueError: the folder has files, a name is taken, a dtype has no name in safetensors, or an array is not as told.
    OSError: the folder cannot be written.
  """
  shards, room, total = [{}], max_shard_bytes, 0
  for name, (shape, dtype, give) in tensors.items() if isinstance(tensors, Mapping) else tensors:
    if name == '__metadata__' or any(name in shard for shard in shards):
      raise ValueError(f'a tensor cannot be named {name!r}, that name is taken: rename it')
    if (dtype := np.dtype(dtype)) not in _CODES:
      raise ValueError(f'tensor {name!r}: dtype {dtype} has no name in safetensors: cast to one of '
                       f'{", ".join(map(str, _CODES))}')
    size = math.prod(shape) * dtype.itemsize
    if shards[-1] and size > room:
      shards.append({})
      room = max_shard_bytes
    shards[-1][name] = tuple(shape), dtype, give
    room, total = room - size, total + size
  with new_folder(folder) as new:
    files = [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
    try:
      for file, shard in zip(files if len(shards) > 1 else [_SINGLE], shards):
        with open(new / file, 'xb') as f:
          for data in _contents(shard):
            f.write(data)
            del data  # before the next tensor is made
      if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
        (new / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + '\n')
    except OSError as error:
      raise OSError(error.errno, f'cannot write the weights: {error.strerror}; free space or choose another folder',
                    str(folder)) from error


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """An empty folder next to `path`, which is renamed to it at the end, and deleted after an error.

  Raises ValueError if `path` is there and is not an empty folder.
  """
  path = pathlib.Path(path).expanduser().resolve()
  if path.exists() and (files := sorted(os.listdir(path)) if path.is_dir() else 'a file'):
    raise ValueError(f'{path} is not an empty folder but {_show(files)}: choose another folder')
  missing = [parent for parent in path.parents if not parent.exists()]
  new = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}')
  try:
    new.mkdir(parents=True)
    yield new
    os.replace(new, path)
  except BaseException:
    shutil.rmtree(new, ignore_errors=True)
    with contextlib.suppress(OSError):  # another process has put something there
      for parent in missing:
        parent.rmdir()
    raise


def _damaged(path: pathlib.Path, why: str) -> ValueError:
  return ValueError(f'{path}: {why}; download or convert it again')


def _find(folder: pathlib.Path) -> tuple[list[str], dict[str, str] | None]:
  """Names of the weight files, and which of them has each tensor, as the index says."""
  if not folder.is_dir():
    raise ValueError(f'there is no folder {folder}: give the folder that has {_SINGLE}')
  names = sorted(os.listdir(folder))
  if _SINGLE in names:
    return [_SINGLE], None
  if _INDEX not in names:
    if pickles := [name for name in names if name.endswith(('.bin', '.pt', '.pth', '.ckpt', '.pkl'))]:
      raise ValueError(f'{folder} has weights only as pickle, {_show(pickles)}, which can run any code and is never '
                       'loaded: convert them to safetensors, as save_pretrained of transformers does')
    raise ValueError(f'{folder} has no {_SINGLE} and no {_INDEX}, only {_show(names)}: give the folder that has one')
  path = _inside(folder, _INDEX)
  with open(path, 'rb') as f:
    text = f.read(_MAX_JSON + 1)
  placed = _json(path, text).get('weight_map')
  if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
    raise _damaged(path, f'weight_map {_show(placed)} does not give the file of each tensor')
  for file in (files := sorted(set(placed.values()))):
    if file not in names:  # where no name has a `/` or is `..`
      why = 'missing' if file == os.path.basename(file) else 'outside the folder'
      raise _damaged(path, f'the shard {_show(file)} that it names is {why}')
  return files, placed


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
  """The path of a file; ValueError if it is a link to elsewhere, except to `blobs` from `snapshots` of a Hub cache."""
  path, home = folder / name, pathlib.Path(os.path.realpath(folder))
  homes = [home, home.parents[1] / 'blobs'] if home.parent.name == 'snapshots' else [home]
  if not any(pathlib.Path(os.path.realpath(path)).is_relative_to(home) for home in homes):
    raise ValueError(f'{path} is a link to {os.path.realpath(path)}, outside the folder: copy that file into it')
  if not path.is_file() or not path.stat().st_size:
    raise _damaged(path, 'it is empty or not a file')
  return path


def _json(path: pathlib.Path, text: bytes) -> dict:
  def unique(pairs: list[tuple[str, Any]]) -> dict:
    name, count = collections.Counter([name for name, _ in pairs] or ['']).most_common(1)[0]
    if count > 1:
      raise ValueError(f'{_show(name)} is there twice')
    ''.join(name for name, _ in pairs).encode()  # half of a surrogate pair raises
    return dict(pairs)
  if len(text) > _MAX_JSON:
    raise _damaged(path, f'its JSON has more than {_MAX_JSON:,} bytes')
  try:
    value = json.loads(text.decode(), object_pairs_hook=unique)
  except (ValueError, RecursionError) as error:
    raise _damaged(path, f'its JSON cannot be read ({error})') from None
  if not isinstance(value, dict):
    raise _damaged(path, f'its JSON is {_show(value)} and not an object')
  return value


def _parse(path: pathlib.Path, data: mmap.mmap) -> dict[str, Info]:
  """What the header says of each tensor; ValueError unless they cover the data, each byte once."""
  if data[:20] == b'version https://git-':
    raise ValueError(f'{path} is only a pointer of Git LFS: run `git lfs pull`')
  start = 8 + int.from_bytes(data[:8], 'little')
  total = len(data) - start
  if total < 0 or start - 8 > _MAX_JSON:
    raise _damaged(path, f'it is truncated or not safetensors: a header of {start - 8:,} bytes (at most {_MAX_JSON:,}) '
                         f'in a file of {len(data):,}')
  header = _json(path, data[8:start])
  metadata = header.pop('__metadata__', {})
  if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
    raise _damaged(path, f'__metadata__ {_show(metadata)} is not text by name')
  infos, spans, covered = {}, [(total, total + 1, 'the end of the file')], 0
  for name, entry in header.items():
    code, shape, span = (isinstance(entry, dict) and entry.get(key) for key in ('dtype', 'shape', 'data_offsets'))
    dtype = _DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None:
      why = f'dtype {_show(code)} is none of {", ".join(_DTYPES)}'
    elif not _counts(shape) or len(shape) > 64 or math.prod(n or 1 for n in shape) * dtype.itemsize >> 63:  # of NumPy
      why = f'shape {_show(shape)} is not that of an array'
    elif not _counts(span) or len(span) != 2 or span[0] > span[1]:
      why = f'data_offsets {_show(span)} are not a begin and an end'
    elif span[1] > total:
      why = f'data_offsets {_show(span)} are beyond the {total:,} bytes of data: the file is truncated'
    elif (size := math.prod(shape) * dtype.itemsize) != span[1] - span[0]:
      why = f'data_offsets {span} do not fit the {size:,} bytes of {code} {shape}'
    else:
      spans.append((*span, f'tensor {_show(name)}'))
      infos[name] = Info(tuple(shape), dtype, path, start + span[0])
      continue
    raise _damaged(path, f'tensor {_show(name)}: {why}')
  for begin, end, what in sorted(spans):
    if begin != covered:
      raise _damaged(path, f'{what} begins at byte {begin:,} of the data, where tensors before it end at {covered:,}')
    covered = end
  return infos


def _counts(value: Any) -> bool:
  return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)  # True is an `int`


def _contents(tensors: dict[str, Tensor]) -> Iterator[bytes | memoryview]:
  """A file in pieces: length and header, then each tensor."""
  ranks = {dtype: rank for rank, dtype in enumerate(_CODES)}
  names = sorted(tensors, key=lambda name: (ranks[tensors[name][1]], name))
  header, end = {'__metadata__': {'format': 'pt'}}, 0
  for name in names:
    shape, dtype, _ = tensors[name]
    begin, end = end, end + math.prod(shape) * dtype.itemsize
    header[name] = {'dtype': _CODES[dtype], 'shape': shape, 'data_offsets': [begin, end]}
  text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode()
  text += b' ' * (-len(text) % 8)
  yield len(text).to_bytes(8, 'little') + text
  for name in names:
    shape, dtype, give = tensors[name]
    array = np.asarray(give())
    if (array.shape, array.dtype) != (shape, dtype):
      raise ValueError(f'tensor {name!r} is {array.dtype}{list(array.shape)}, and not {dtype}{list(shape)} as told')
    yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data  # bfloat16 itself has no buffer
    del array
