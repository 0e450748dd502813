"""A store on disk, opened and checked: see `store` for its files, and for how they are made."""
import hashlib
import itertools
import json
import os
import pathlib
from typing import Any, NamedTuple

import numpy as np

from lm import integrity


class OtherSettings(ValueError):
  """What is stored was made with other settings, and is needed by what was trained on it."""


FILES = ('tokens.bin', 'offsets.npy')
_BLOCK, _BLOCKS = 1 << 20, 1 << 11   # tokens that are compared at a time; of more blocks, some are left out


class Store:
  """One split, open for reading. Opening checks the sizes of the files and the offsets, and reads no tokens.

  Attributes:
    tokens: [total] uint16 or uint32, memory-mapped.
    offsets: [documents + 1] int64; document i is tokens[offsets[i]:offsets[i + 1]].
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
    expected = self.manifest['tokens'] * dtype.itemsize
    try:
      size, path = path.stat().st_size, path.with_name('offsets.npy')
      self.offsets = np.load(path, mmap_mode='r')
    except FileNotFoundError:
      raise FileNotFoundError(f'{path} is missing from a finished store: {advice}') from None
    except (ValueError, EOFError) as error:
      raise ValueError(f'{path} is damaged ({error}): {advice}') from None
    if size != expected:
      raise ValueError(f'{path.with_name("tokens.bin")} has {size} bytes, and {expected} were written: {advice}')
    self.tokens = np.memmap(path.with_name('tokens.bin'), dtype, 'r')
    ends = len(self.offsets) == len(self) + 1 and self.offsets[0] == 0 and self.offsets[-1] == len(self.tokens)
    if not ends or np.any(self.offsets[1:] < self.offsets[:-1]):
      raise ValueError(f'{path} is damaged (its offsets do not fit the manifest, or fall): {advice}')

  def check(self, vocabulary: int) -> None:
    """Raises ValueError where an id is beyond a vocabulary. Of a long store it reads some GB, evenly spread."""
    blocks = -(-len(self.tokens) // _BLOCK)
    for block in range(0, blocks, max(blocks // _BLOCKS, 1)):
      largest = int(self.tokens[block * _BLOCK:(block + 1) * _BLOCK].max(initial=0))
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


def checksums(folder: pathlib.Path, split: str) -> dict[str, int]:
  """The checksums of the files of a split."""
  return {name: integrity.checksum(folder / split / name) for name in FILES}


def verify(folder: pathlib.Path) -> list[str]:
  """Compares all bytes of a store with the checksums in its manifest. Returns the splits that have none.

  ValueError, with the path, where a file is not as it was written; splits of an unfinished store are not there yet.
  """
  manifest, without = read_json(folder / 'manifest.json') or {'splits': {}}, []
  for split, counts in manifest['splits'].items():
    if 'checksums' not in counts:
      without.append(split)
      continue
    Store(folder, split)
    for name, number in checksums(folder, split).items():
      if number != counts['checksums'][name]:
        raise ValueError(f'{folder / split / name} is not as it was written: delete {folder}, and it is made again '
                         'from the text')
  return without


def fingerprint(made_of: dict[str, Any], split: str) -> str:
  """The fingerprint of a split of the store with these settings."""
  return hashlib.sha256(json.dumps([made_of, split]).encode()).hexdigest()[:16]


def read_json(path: pathlib.Path) -> dict | None:
  try:
    return json.loads(path.read_text()) if path.exists() else None
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error}); delete {path.parent}, and it is made again') from None
