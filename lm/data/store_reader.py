"""Reads and checks a store. `store` writes it, and describes its files."""
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from lm.workdir import integrity


class OtherSettings(ValueError):
  """Stored data was made with other settings. It is not replaced, because a model may have been trained on it."""


_BLOCK = 1 << 20    # tokens that are compared at a time
_READ = 1 << 31     # the most tokens of a store whose ids are all compared when it is opened


class Store:
  """One split, open for reading. Opening checks the offsets and the sizes of the files; it reads no tokens.

  Attributes:
    tokens: [total] uint16 or uint32, memory-mapped.
    offsets: [documents + 1] int64; document i is tokens[offsets[i]:offsets[i + 1]].
    columns: by name, memory-mapped: [total] of a column per token, [documents] of a column per document.
    sizes: [n, 2] int64, memory-mapped: the places of tokens that stand for another number of bytes of the text than
      the tokenizer's table says, and that number; None if the tokenizer is lossless, or if sizes were not stored.
    manifest: counts of documents, tokens and (UTF-8) bytes, of documents read, and of documents dropped by reason.
    fingerprint: identifies the source, the rules, the encoder and the split.

  Raises:
    FileNotFoundError: there is no finished store in the folder, or a file is missing.
    ValueError: the store has no such split, or a file is damaged.
  """

  def __init__(self, folder: str | os.PathLike, split: str):
    self._folder, self._split = pathlib.Path(folder), split
    manifest = read_json(self._folder / 'manifest.json')
    if manifest is None:
      raise FileNotFoundError(f'{folder}: there is no finished store; make it with store.build')
    if split not in manifest['splits']:
      raise ValueError(f'{folder} has no split {split!r}, only {", ".join(manifest["splits"])}')
    self.manifest = manifest['splits'][split]
    self.fingerprint = fingerprint(manifest['settings'], split)
    folder, dtype = self._folder / split, np.dtype(self.manifest['dtype'])
    columns = self.manifest.get('columns', {})
    self.sizes = None
    _check_size(folder / 'tokens.bin', self.manifest['tokens'] * dtype.itemsize)
    for name, column in columns.items():
      _check_size(folder / f'{name}.bin', column_bytes(column, self.manifest))
    self.offsets = _load(folder / 'offsets.npy')
    if 'sizes' in self.manifest:
      self.sizes = _load(folder / 'sizes.npy')
      if self.sizes.shape != (self.manifest['sizes'], 2):
        raise _damaged(folder / 'sizes.npy',
                       f'it has {len(self.sizes)} rows, and {self.manifest["sizes"]} were written')
    self.tokens = np.memmap(folder / 'tokens.bin', dtype, 'r')
    self.columns = {name: np.memmap(folder / f'{name}.bin', column['dtype'], 'r') for name, column in columns.items()}
    covers_all = len(self.offsets) == len(self) + 1 and self.offsets[0] == 0 and self.offsets[-1] == len(self.tokens)
    if not covers_all or np.any(self.offsets[1:] < self.offsets[:-1]):
      raise _damaged(folder / 'offsets.npy', 'its offsets do not fit the manifest, or decrease')

  def check(self, vocabulary: int) -> None:
    """Raises ValueError if an id is not in a vocabulary of this size, in the manifest or in the file.

    It reads all ids of a store of up to 2**31 tokens. The ids of a larger store are compared when a document is read
    (see `Stream`), and by `verify`.
    """
    largest = self.manifest.get('largest', 0)
    if len(self.tokens) <= _READ:
      for start in range(0, len(self.tokens), _BLOCK):
        largest = max(largest, int(self.tokens[start:start + _BLOCK].max()))
    if largest >= vocabulary:
      raise ValueError(f'{self._folder / self._split / "tokens.bin"} is damaged: it has the id {largest}, of a '
                       f'vocabulary of {vocabulary}; delete {self._folder}, and it is made again from the text')

  def __len__(self) -> int:
    return self.manifest['documents']

  def __getitem__(self, i: int) -> np.ndarray:
    if not -len(self) <= i < len(self):
      raise IndexError(f'document {i} of {len(self)}')
    i %= len(self)
    return self.tokens[self.offsets[i]:self.offsets[i + 1]]

  def parts(self) -> list['Part']:
    """Returns the documents of each source of a mixture, or all documents if the source was not a mixture."""
    ends = [0, *self.manifest.get('ends', [len(self)])]
    return [Part(self.tokens, self.offsets[start:end + 1], self.sizes) for start, end in itertools.pairwise(ends)]

  def __reduce__(self):   # a worker process maps the files again
    return Store, (self._folder, self._split)


class Part(NamedTuple):
  """Some documents of a store; document i is tokens[offsets[i]:offsets[i + 1]]."""
  tokens: np.ndarray
  offsets: np.ndarray
  sizes: np.ndarray | None = None


def column_bytes(column: dict[str, str], counts: dict[str, Any]) -> int:
  """Returns the size of a column's file. `column` and the `counts` of the split are as in the manifest."""
  return np.dtype(column['dtype']).itemsize * counts['tokens' if column['per'] == 'token' else 'documents']


def _check_size(path: pathlib.Path, expected: int) -> None:
  try:
    size = path.stat().st_size
  except FileNotFoundError:
    raise _missing(path) from None
  if size != expected:
    raise ValueError(f'{path} has {size} bytes, and {expected} were written: {_advice(path)}')


def _load(path: pathlib.Path) -> np.ndarray:
  try:
    return np.load(path, mmap_mode='r')
  except FileNotFoundError:
    raise _missing(path) from None
  except (ValueError, EOFError) as error:
    raise _damaged(path, str(error)) from None


def _missing(path: pathlib.Path) -> FileNotFoundError:
  return FileNotFoundError(f'{path} is missing from a finished store: {_advice(path)}')


def _damaged(path: pathlib.Path, reason: str) -> ValueError:
  return ValueError(f'{path} is damaged ({reason}): {_advice(path)}')


def _advice(path: pathlib.Path) -> str:
  return f'delete {path.parents[1]}, and it is made again from the text'


def checksums(folder: pathlib.Path, split: str) -> dict[str, int]:
  """Returns the checksums of the files of a finished split, by name."""
  return {path.name: integrity.checksum(path) for path in sorted((folder / split).iterdir())
          if path.suffix in ('.bin', '.npy')}


def verify(folder: pathlib.Path) -> list[str]:
  """Compares all bytes of a store with the checksums in its manifest. Returns the paths that have no checksum.

  Raises ValueError, which names all changed files. An unfinished store is not compared.
  """
  path = folder / 'manifest.json'
  if (manifest := read_json(path)) is None:
    return []
  without = [] if integrity.has_checksum(path) else [str(path)]
  for split, counts in manifest['splits'].items():
    if 'checksums' not in counts:
      without.append(str(folder / split))
  integrity.compare({folder / split / name: number for split, counts in manifest['splits'].items()
                     for name, number in counts.get('checksums', {}).items()},
                    f'delete {folder}, and it is made again from the text')
  return without


def fingerprint(settings: dict[str, Any], split: str) -> str:
  """Returns the fingerprint of a split of the store with these settings."""
  return hashlib.sha256(json.dumps([settings, split]).encode()).hexdigest()[:16]


def read_json(path: pathlib.Path) -> dict | None:
  """Returns the values in a JSON file, or None if there is no file. Raises ValueError if it is damaged."""
  try:
    return integrity.parse_json_with_checksum(path.read_text())[0] if path.exists() else None
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error}); delete {path.parent}, and it is made again') from None
