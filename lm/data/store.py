"""Writes a store: a corpus, cleaned and tokenised once, on disk. `store_reader` reads it.

  folder/manifest.json         settings, and counts per split; written last: without it the store is unfinished
  folder/<split>/tokens.bin    all documents end to end, no bos or eos; uint16, or uint32 beyond 65,536 tokens
  folder/<split>/offsets.npy   [documents + 1] int64
  folder/<split>/<column>.bin  a column of the encoder: one value per token, or one value per document
  folder/<split>/sizes.npy     [n, 2] int64, if the tokenizer is not lossless: places in tokens.bin of tokens that stand
                               for another number of bytes than the tokenizer's table says, and that number

During a build, documents are appended in groups. After each group, `unfinished.json` is replaced, which has the
committed length of each file. If the build is killed, the next build truncates the files to that length and continues,
and the finished store has the same bytes.
"""
import collections
import contextlib
import dataclasses
import errno
import itertools
import json
import os
import pathlib
import re
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from lm.data.encoding import Encoder, placed_sizes
from lm.data.store_reader import OtherSettings, Part, Store, checksums, column_bytes, fingerprint, read_json, verify
from lm.data.text import clean
from lm.data.text.source import Source, digest
from lm.workdir import atomic, integrity, locks

__all__ = ['Part', 'Store', 'build', 'fingerprint', 'reopen', 'settings', 'verify']

_FORMAT = 1
_GROUP_DOCUMENTS, _GROUP_CHARACTERS = 2000, 16_000_000   # limits of a group, which is committed as a whole
_DIGEST = 16   # bytes of a `digest`
_NO_TOKENS = 'no tokens'   # the reason for dropping a document that has no tokens


def settings(source: Source, encoder: Encoder, rules: Sequence[clean.Rule]) -> dict[str, Any]:
  """Returns the settings that decide the contents of a store. They are stored in its manifest."""
  return {'format': _FORMAT, 'source': f'{source.name} {source.fingerprint}', 'tokenizer': encoder.fingerprint,
          'rules': [_identity(rule) for rule in rules]}


def build(folder: str | os.PathLike, source: Source, encoder: Encoder, rules: Sequence[clean.Rule] = clean.DEFAULT,
          workers: int = 0, progress: Callable[[str], Any] = print, renew: bool = False) -> dict[str, Store]:
  """Returns one `Store` per split. Builds the stores, continues an interrupted build, or opens a finished one.

  Duplicates are dropped across splits, with train last, so that train has no document of another split. Processes that
  build the same folder take turns, and the later ones open what the first one built.

  Args:
    encoder: encodes documents; `encoding.TextEncoder(tokenizer)` for plain text.
    rules: the rules of cleaning.
    workers: number of processes for cleaning (see `clean.clean`); encoding has its own threads.
    progress: is called with a line every ten seconds, and with a line at the end of each split.
    renew: whether to replace a store that was made with other settings; a store without documents is always replaced.

  Raises:
    ValueError: the folder has a store of other settings and `renew` is false, or a split has no documents.
    OSError: the folder cannot be written.
  """
  folder = pathlib.Path(folder)
  expected = settings(source, encoder, rules)
  if not _is_finished(folder, expected, renew):
    with contextlib.ExitStack() as stack:
      with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        stack.enter_context(locks.hold(folder / 'lock', f'waiting for the process that builds {folder}', progress))
      if not _is_finished(folder, expected, renew, discard=True):   # another process may have built it meanwhile
        _Build(folder, source, encoder, rules, workers, progress, expected).run()
  return _open_splits(folder, source, encoder)


def reopen(folder: pathlib.Path, source: Source, encoder: Encoder, rules: Sequence[clean.Rule]) -> dict[str, Store]:
  """Opens the store that `build` wrote with these arguments. It reads no document of the source, and writes nothing.

  Raises:
    FileNotFoundError: there is no finished store in the folder.
    ValueError: the folder has a store of other settings.
  """
  if not _is_finished(folder, settings(source, encoder, rules)):
    raise FileNotFoundError(f'{folder} does not hold the tokens of {source.name}; copy them back, or run the command '
                            'that trained the run again, which encodes the same text again')
  return _open_splits(folder, source, encoder)


def _open_splits(folder: pathlib.Path, source: Source, encoder: Encoder) -> dict[str, Store]:
  stores = {split: Store(folder, split) for split in source.splits}
  for stored in stores.values():
    stored.check(encoder.vocab_size)
  return stores


@dataclasses.dataclass
class _Build:
  """A build. `state` describes the committed data: the settings, and counts per split, which give all file sizes."""
  folder: pathlib.Path
  source: Source
  encoder: Encoder
  rules: Sequence[clean.Rule]
  workers: int
  progress: Callable[[str], Any]
  settings: dict

  def run(self) -> None:
    self.dtype = np.dtype(np.uint16 if self.encoder.vocab_size <= 1 << 16 else np.uint32)
    splits = sorted(self.source.splits, key=lambda split: (split == 'train', split))
    self.state = read_json(self.folder / 'unfinished.json') or {
        'settings': self.settings, 'splits': {split: self._new_counts() for split in splits}}
    with _writing(self.folder):
      digests = b''.join([self._resume(split) for split in splits])
      atomic.write(self.folder / 'unfinished.json', json.dumps(self.state, indent=1))
    deduplicate = _Deduplicate(digests)
    for split in splits:
      self._write_split(split, deduplicate)
    self._finish(splits)
    for line in self.source.notes:
      self.progress(line)
    if events := ', '.join(f'{n:,} {event}' for event, n in self.source.counts.items() if n):
      self.progress(f'{self.source.name}: {events}')

  def _new_counts(self) -> dict[str, Any]:
    """Returns the counts of a split without documents."""
    counts = {'read': 0, 'documents': 0, 'tokens': 0, 'largest': 0, 'bytes': 0, 'dropped': {}, 'dtype': self.dtype.name}
    if self.encoder.has_sizes:
      counts['sizes'] = 0
    if self.encoder.columns:
      counts['columns'] = {name: {'dtype': np.dtype(column.dtype).name, 'per': column.per}
                           for name, column in self.encoder.columns.items()}
    return counts

  def _finish(self, splits: Sequence[str]) -> None:
    """Writes the offsets and sizes of all splits, and the manifest."""
    with _writing(self.folder):
      for split in splits:
        lengths = np.fromfile(self.folder / split / 'lengths.partial', np.int64)
        np.save(self.folder / split / 'offsets.npy', np.concatenate([[0], np.cumsum(lengths)]))
        if 'sizes' in self.state['splits'][split]:
          sizes = np.fromfile(self.folder / split / 'sizes.partial', np.int64)
          np.save(self.folder / split / 'sizes.npy', sizes.reshape(-1, 2))
      for split in splits:
        self.state['splits'][split]['checksums'] = checksums(self.folder, split)
      atomic.write(self.folder / 'manifest.json', integrity.json_with_checksum(self.state))
      for path in (self.folder / 'unfinished.json', *self.folder.glob('*/*.partial')):
        path.unlink()

  def _resume(self, split: str) -> bytes:
    """Truncates the files of a split to their committed length, and returns the digests of its documents so far."""
    folder, counts = self.folder / split, self.state['splits'][split]
    folder.mkdir(exist_ok=True)
    digests = counts['documents'] + counts['dropped'].get(_NO_TOKENS, 0)
    file_sizes = {'tokens.bin': counts['tokens'] * self.dtype.itemsize, 'lengths.partial': counts['documents'] * 8,
                  'digests.partial': digests * _DIGEST}
    if 'sizes' in counts:
      file_sizes['sizes.partial'] = counts['sizes'] * 16
    file_sizes |= {f'{name}.bin': column_bytes(column, counts) for name, column in counts.get('columns', {}).items()}
    for name, size in file_sizes.items():
      with open(folder / name, 'ab') as f:
        if f.tell() < size:
          raise ValueError(f'{folder / name} has lost committed data: delete {self.folder} and build it again')
        f.truncate(size)
    return (folder / 'digests.partial').read_bytes()

  def _write_split(self, split: str, deduplicate: clean.Deduplicate) -> None:
    """Cleans, encodes and appends the documents of a split that were not yet read."""
    documents, counts = self.source.splits[split], self.state['splits'][split]
    start = last_report = time.monotonic()
    before, ends = counts['bytes'], counts.setdefault('ends', [])
    mixing = self.source.mixing
    sizes = [len(part.splits[split]) for part in mixing.sources] if mixing else [len(documents)]
    for end in itertools.islice(itertools.accumulate(sizes), len(ends), None):
      unread = (documents[i] for i in range(counts['read'], end))
      for group in _groups(clean.clean(unread, self.rules, self.workers, deduplicate)):
        self._append(split, group)
        now = time.monotonic()
        if now - last_report > 10:
          last_report = now
          self.progress(f'{split}: {counts["read"]:,} of {len(documents):,} documents, '
                        f'{_size((counts["bytes"] - before) / (now - start))}/s')
      ends.append(counts['documents'])
    dropped = ', '.join(f'{n:,} {reason}' for reason, n in counts['dropped'].items()) or 'none'
    if not counts['documents']:
      raise ValueError(f'{self.source.name}: no document is left in {split} of {counts["read"]:,} read; '
                       f'dropped: {dropped}')
    speed = (counts['bytes'] - before) / max(time.monotonic() - start, 1e-9)
    self.progress(f'{split}: {counts["documents"]:,} documents, {_size(counts["bytes"])}, {counts["tokens"]:,} '
                  f'tokens, {counts["bytes"] / counts["tokens"]:.2f} bytes a token, {_size(speed)}/s; '
                  f'dropped: {dropped}')

  def _append(self, split: str, group: list[str | clean.Drop]) -> None:
    """Encodes, appends and commits a group of results of cleaning."""
    folder, counts = self.folder / split, self.state['splits'][split]
    texts = [document for document in group if not isinstance(document, clean.Drop)]
    encoded = self.encoder.encode(texts)
    stored = [document for document in encoded if len(document.tokens)]
    dropped = collections.Counter(counts['dropped'])
    dropped.update(document.reason for document in group if isinstance(document, clean.Drop))
    dropped[_NO_TOKENS] += len(encoded) - len(stored)
    lengths = np.array([len(document.tokens) for document in stored], np.int64)
    with _writing(self.folder):
      _append(folder / 'tokens.bin', b''.join(document.tokens.astype(self.dtype).tobytes() for document in stored))
      _append(folder / 'lengths.partial', lengths.tobytes())
      _append(folder / 'digests.partial', b''.join(map(digest, texts)))
      for name, column in counts.get('columns', {}).items():
        _append(folder / f'{name}.bin', b''.join(
            np.asarray(document.columns[name], column['dtype']).tobytes() for document in stored))
      if 'sizes' in counts:
        sizes = placed_sizes(stored, counts['tokens'])
        _append(folder / 'sizes.partial', sizes.tobytes())
        counts['sizes'] += len(sizes)
      if 'largest' in counts:
        counts['largest'] = max(counts['largest'], *(int(document.tokens.max()) for document in stored), 0)
      counts['read'] += len(group)
      counts['documents'] += len(lengths)
      counts['tokens'] += int(lengths.sum())
      counts['bytes'] += sum(len(text.encode()) for text, document in zip(texts, encoded) if len(document.tokens))
      counts['dropped'] = dict(sorted((reason, n) for reason, n in dropped.items() if n))
      atomic.write(self.folder / 'unfinished.json', json.dumps(self.state, indent=1))


class _Deduplicate(clean.Deduplicate):
  """Continues from the digests of an interrupted build."""

  def __init__(self, digests: bytes):
    super().__init__()
    self._digests.update(digests[i:i + _DIGEST] for i in range(0, len(digests), _DIGEST))


def _is_finished(folder: pathlib.Path, settings: dict, renew: bool = False, discard: bool = False) -> bool:
  """Returns whether the folder has a finished store of these settings.

  Raises OtherSettings if it has a store of other settings. With `renew`, or if that store has no documents, it counts
  as missing instead, and `discard` deletes its manifest.
  """
  for name in ('manifest.json', 'unfinished.json'):
    stored = read_json(folder / name)
    if stored is None:
      continue
    if different := [key for key in settings if stored['settings'].get(key) != settings[key]]:
      if renew or not any(counts['documents'] for counts in stored['splits'].values()):
        if discard:
          (folder / name).unlink()
        continue
      raise OtherSettings(f'{folder} has a store of other settings: ' + '; '.join(
          f'{key} {stored["settings"].get(key)} there, {settings[key]} here' for key in different)
          + '; go back to these settings, or choose another folder')
    if name == 'manifest.json':
      return True
  return False


def _groups(results: Iterator[str | clean.Drop]) -> Iterator[list[str | clean.Drop]]:
  """Yields results of cleaning in groups of limited size."""
  group, characters = [], 0
  for document in results:
    group.append(document)
    characters += 0 if isinstance(document, clean.Drop) else len(document)
    if len(group) == _GROUP_DOCUMENTS or characters >= _GROUP_CHARACTERS:
      yield group
      group, characters = [], 0
  if group:
    yield group


def _identity(rule: clean.Rule) -> str:
  """Returns the name of a function, or the repr of an object. Raises ValueError if it differs between processes."""
  name = f'{rule.__module__}.{rule.__qualname__}' if hasattr(rule, '__qualname__') else repr(rule)
  if re.search('<lambda>|<locals>| at 0x', name):
    raise ValueError(f'rule {name} has no lasting name by which a store can be recognised; make it a function of a '
                     'module or a frozen dataclass')
  return name


def _size(n: float) -> str:
  return f'{n / 1e6:.1f} MB' if n >= 1e6 else f'{n / 1e3:.1f} kB'


@contextlib.contextmanager
def _writing(folder: pathlib.Path) -> Iterator[None]:
  """Adds the folder, and what to do, to an OSError."""
  try:
    yield
  except OSError as error:
    number = error.errno or errno.ENOSPC   # NumPy's error has no number if the disk is full
    raise OSError(number, f'cannot write the store: {os.strerror(number)}; free space or choose another folder',
                  str(folder)) from error


def _append(path: pathlib.Path, data: bytes) -> None:
  """Appends to a file, and waits until the data is on disk."""
  with open(path, 'ab') as f:
    f.write(data)
    f.flush()
    os.fsync(f.fileno())
