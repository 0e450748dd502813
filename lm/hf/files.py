"""Folders of Hugging Face weights, read and written without torch: safetensors files, mapped into memory.

  folder/model.safetensors                    all tensors; or
  folder/model-00001-of-0000N.safetensors     shards, and
  folder/model.safetensors.index.json         the file of each tensor

`safetensors_format` reads and writes the bytes of a file.
"""
import contextlib
import json
import math
import mmap
import os
import pathlib
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from lm import paths
from lm.hf.safetensors_format import MAX_JSON, NAMES, Info, Tensor, contents, damaged, parse, quote, read_json

_SINGLE, _INDEX = 'model.safetensors', 'model.safetensors.index.json'


class Weights(Mapping[str, np.ndarray]):
  """The tensors of a folder by name: read-only views of mapped files, of which only the used pages are read.

  Opening reads only the headers: `info` has shape, dtype and place of each tensor. If a folder has a single file and an
  index, the single file is read, as in transformers. Files must not become shorter while they are open; as a context
  manager, it closes them.

  Raises:
    ValueError: there are no weights in safetensors, or a file is damaged or does not fit the index.
  """

  def __init__(self, folder: str | os.PathLike):
    self.folder = paths.local(folder)
    self.info: dict[str, Info] = {}
    self._maps: dict[pathlib.Path, mmap.mmap] = {}
    try:
      files, placed = _find_files(self.folder)
      for file in files:
        path = _inside(self.folder, file)
        with open(path, 'rb') as f:
          self._maps[path] = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        infos = parse(path, self._maps[path])
        for name in infos if placed is not None else ():
          if placed.get(name) != file:
            where = f'says is in {placed[name]}' if name in placed else 'lacks'
            raise damaged(path, f'it has tensor {quote(name)}, which {_INDEX} {where}')
        self.info |= infos
      for name in (placed or {}).keys() - self.info.keys():
        raise damaged(self.folder / placed[name], f'it lacks tensor {quote(name)}, which {_INDEX} says it has')
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
    """Frees the memory of the pages read so far. Views stay valid, and read their pages again."""
    for mapped in self._maps.values() if hasattr(mmap, 'MADV_DONTNEED') else ():
      mapped.madvise(mmap.MADV_DONTNEED)

  def close(self) -> None:
    """Closes the files. Views stay valid: a file with views is closed with the last of them."""
    while self._maps:
      with contextlib.suppress(BufferError):   # the file has views
        self._maps.popitem()[1].close()


def write(folder: str | os.PathLike, tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
          max_shard_bytes: int = 5_000_000_000) -> None:
  """Writes a folder of weights, which appears whole or not at all, with one tensor at a time in memory.

  Args:
    folder: the folder, which is missing or empty. `new_folder` makes one to which other files are added too.
    tensors: shape, dtype, and a function that returns the array, by name. Shards are filled in this order.
    max_shard_bytes: the largest size of the data in a file that has more than one tensor.

  Raises:
    ValueError: the folder has files, two tensors have one name, a dtype has no name in safetensors, or an array has
      another shape or dtype than declared.
    OSError: the folder cannot be written.
  """
  shards, room, total = [{}], max_shard_bytes, 0
  for name, (shape, dtype, make) in tensors.items() if isinstance(tensors, Mapping) else tensors:
    if name == '__metadata__' or any(name in shard for shard in shards):
      raise ValueError(f'a tensor cannot be named {name!r}, that name is taken: rename it')
    dtype = np.dtype(dtype)
    if dtype not in NAMES:
      raise ValueError(f'tensor {name!r}: dtype {dtype} has no name in safetensors: cast to one of '
                       f'{", ".join(map(str, NAMES))}')
    size = math.prod(shape) * dtype.itemsize
    if shards[-1] and size > room:
      shards.append({})
      room = max_shard_bytes
    shards[-1][name] = tuple(shape), dtype, make
    room, total = room - size, total + size
  with new_folder(folder) as new:
    files = [f'model-{i + 1:05}-of-{len(shards):05}.safetensors' for i in range(len(shards))]
    try:
      for file, shard in zip(files if len(shards) > 1 else [_SINGLE], shards):
        with open(new / file, 'xb') as f:
          for data in contents(shard):
            f.write(data)
            del data   # frees its memory before the next tensor is made
      if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(files, shards) for name in shard}
        index = {'metadata': {'total_size': total}, 'weight_map': weight_map}
        (new / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + '\n')
    except OSError as error:
      raise OSError(error.errno, f'cannot write the weights: {error.strerror}; free space or choose another folder',
                    str(folder)) from error


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Iterator[pathlib.Path]:
  """Yields an empty folder beside `path`, which is renamed to `path` at the end, and deleted after an error.

  Raises ValueError if `path` exists and is not an empty folder.
  """
  path = paths.local(path).resolve()
  content = []
  if path.exists():
    content = sorted(os.listdir(path)) if path.is_dir() else 'a file'
  if content:
    raise ValueError(f'{path} is not an empty folder but {quote(content)}: choose another folder')
  missing = [parent for parent in path.parents if not parent.exists()]
  new = path.with_name(f'.{path.name}.{uuid.uuid4().hex[:8]}')
  try:
    new.mkdir(parents=True)
    yield new
    os.replace(new, path)
  except BaseException:
    shutil.rmtree(new, ignore_errors=True)
    with contextlib.suppress(OSError):   # another process has put files there
      for parent in missing:
        parent.rmdir()
    raise


def _find_files(folder: pathlib.Path) -> tuple[list[str], dict[str, str] | None]:
  """Returns the names of the weight files, and the file of each tensor if there is an index."""
  if not folder.is_dir():
    raise ValueError(f'there is no folder {folder}: give the folder that has {_SINGLE}')
  names = sorted(os.listdir(folder))
  if _SINGLE in names:
    return [_SINGLE], None
  if _INDEX not in names:
    pickles = [name for name in names if name.endswith(('.bin', '.pt', '.pth', '.ckpt', '.pkl'))]
    if pickles:
      raise ValueError(f'{folder} has weights only as pickle, {quote(pickles)}, which can run any code and is never '
                       'loaded: convert them to safetensors, as save_pretrained of transformers does')
    raise ValueError(f'{folder} has no {_SINGLE} and no {_INDEX}, only {quote(names)}: give the folder that has one')
  path = _inside(folder, _INDEX)
  with open(path, 'rb') as f:
    text = f.read(MAX_JSON + 1)
  placed = read_json(path, text).get('weight_map')
  if not isinstance(placed, dict) or not placed or not all(isinstance(file, str) for file in placed.values()):
    raise damaged(path, f'weight_map {quote(placed)} does not give the file of each tensor')
  files = sorted(set(placed.values()))
  for file in files:
    if file not in names:   # `names` has none with a `/`, and no `..`
      problem = 'missing' if file == os.path.basename(file) else 'outside the folder'
      raise damaged(path, f'the shard {quote(file)} that it names is {problem}')
  return files, placed


def _inside(folder: pathlib.Path, name: str) -> pathlib.Path:
  """Returns the path of a file in a folder.

  Raises ValueError if it is empty, no file, or a link to a file outside of the folder. In the Hub's cache, a link from
  `snapshots` to `blobs` is permitted.
  """
  path, home = folder / name, pathlib.Path(os.path.realpath(folder))
  homes = [home, home.parents[1] / 'blobs'] if home.parent.name == 'snapshots' else [home]
  if not any(pathlib.Path(os.path.realpath(path)).is_relative_to(home) for home in homes):
    raise ValueError(f'{path} is a link to {os.path.realpath(path)}, outside the folder: copy that file into it')
  if not path.is_file() or not path.stat().st_size:
    raise damaged(path, 'it is empty or not a file')
  return path
