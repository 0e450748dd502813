"""A store on disk, opened and checked: see `store` for its files, and for how they are made."""
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from lm.workdir import integrity


class OtherSettings(ValueError):
  """What is stored was made with other settings, and is needed by what was trained on it."""


_BLOCK, _READ = 1 << 20, 1 << 31   # tokens that are compared at a time, and that are read at opening at most


class Store:
  """One split, open for reading. Opening checks the sizes of the files and the offsets, and reads no tokens.

  Attributes:
    tokens: [total] uint16 or uint32, memory-mapped.
    offsets: [documents + 1] int64; document i is tokens[offsets[i]:offsets[i + 1]].
    sizes: [n, 2] int64, memory-mapped: places of tokens that stand for other bytes of the text than the tokenizer's
      table says, and how many; None of a tokenizer that is lossless, and where it was not stored.
    manifest: counts of documents, tokens and (UTF-8) bytes, of documents read, and of documents dropped, by reason.
    fingerprint: of source, rules, tokenizer and split.
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
    path, dtype = self._folder / split / 'tokens.bin', np.dtype(self.manifest['dtype'])
    advice = f'delete {folder}, and it is made again from the text'
    self.sizes = None
    expected = self.manifest['tokens'] * dtype.itemsize
    try:
      size, path = path.stat().st_size, path.with_name('offsets.npy')
      self.offsets = np.load(path, mmap_mode='r')
      if 'sizes' in self.manifest:
        path = path.with_name('sizes.npy')
        self.sizes = np.load(path, mmap_mode='r')
        if self.sizes.shape != (self.manifest['sizes'], 2):
          raise ValueError(f'{len(self.sizes)} rows, and {self.manifest["sizes"]} were written')
    except FileNotFoundError:
      raise FileNotFoundError(f'{path} is missing from a finished store: {advice}') from None
    except (ValueError, EOFError) as error:
      raise ValueError(f'{path} is damaged ({error}): {advice}') from None
    if size != expected:
      raise ValueError(f'{path.with_name("tokens.bin")} has {size} bytes, and {expected} were written: {advice}')
    path = path.with_name('offsets.npy')
    self.tokens = np.memmap(path.with_name('tokens.bin'), dtype, 'r')
    ends = len(self.offsets) == len(self) + 1 and self.offsets[0] == 0 and self.offsets[-1] == len(self.tokens)
    if not ends or np.any(self.offsets[1:] < self.offsets[:-1]):
      raise ValueError(f'{path} is damaged (its offsets do not fit the manifest, or fall): {advice}')

  def check(self, vocabulary: int) -> None:
    """Raises ValueError where an id is beyond a vocabulary: the largest that was written, or one that is there now.

    All ids are read of a store of up to 2**31 tokens. Of a larger one, those of a document are compared when it is
    read, see `Stream`; `verify` reads all.
    """
    tokens = self.tokens if len(self.tokens) <= _READ else self.tokens[:0]
    largest = max(self.manifest.get('largest', 0), *(
        int(tokens[start:start + _BLOCK].max(initial=0)) for start in range(0, len(tokens), _BLOCK)), 0)
    if largest >= vocabulary:
      raise ValueError(f'{self._folder / self._split / "tokens.bin"} is damaged: it has the id {largest}, of a '
                       f'vocabulary of {vocabulary}: delete {self._folder}, and it is made again from the text')

  def __len__(self) -> int:
    return self.manifest['documents']

  def __getitem__(self, i: int) -> np.ndarray:
    if not -len(self) <= i < len(self):
      raise IndexError(f'document {i} of {len(self)}')
    i %= len(self)
    return self.tokens[self.offsets[i]:self.offsets[i + 1]]

  def parts(self) -> list['Part']:
    """The documents of each source that a mixture was made of; all of them, where it was none."""
    ends = [0, *self.manifest.get('ends', [len(self)])]
    return [Part(self.tokens, self.offsets[start:end + 1]) for start, end in itertools.pairwise(ends)]

  def __reduce__(self):  # workers map the files themselves
    return Store, (self._folder, self._split)


class Part(NamedTuple):
  """Some documents of a store: number i is tokens[offsets[i]:offsets[i + 1]]."""
  tokens: np.ndarray
  offsets: np.ndarray
  sizes: np.ndarray | None = None


def checksums(folder: pathlib.Path, split: str) -> dict[str, int]:
  """The checksums of the files of a split that is finished."""
  return {path.name: integrity.checksum(path) for path in sorted((folder / split).iterdir())
          if path.suffix in ('.bin', '.npy')}


def verify(folder: pathlib.Path) -> list[str]:
  """Compares all bytes of a store with the checksums in its manifest. Returns what has none.

  ValueError, with all paths, where files are not as they were written; splits of an unfinished store are not there yet.
  """
  path = folder / 'manifest.json'
  if (manifest := read_json(path)) is None:
    return []
  without = [] if integrity.is_sealed(path) else [str(path)]
  for split, counts in manifest['splits'].items():
    if 'checksums' not in counts:
      without.append(str(folder / split))
  integrity.compare({folder / split / name: number for split, counts in manifest['splits'].items()
                     for name, number in counts.get('checksums', {}).items()},
                    f'delete {folder}, and it is made again from the text')
  return without


def fingerprint(made_of: dict[str, Any], split: str) -> str:
  """The fingerprint of a split of the store with these settings."""
  return hashlib.sha256(json.dumps([made_of, split]).encode()).hexdigest()[:16]


def read_json(path: pathlib.Path) -> dict | None:
  try:
    return integrity.unsealed(path.read_text())[0] if path.exists() else None
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error}); delete {path.parent}, and it is made again') from None
