"""What a corpus is to the other rooms, a `Source`, and the parts that the functions of `corpora` make one of.

A document belongs to train or to validation by a hash of its text, so no text is in both, and files added later move
none. Only where a split would be empty, since there are so few documents, each document is cut in two. Files are listed
and fingerprinted when a source is first used; the first use of a split reads them once, for all splits.
"""
import array
import collections
import dataclasses
import functools
import glob
import hashlib
import importlib
import inspect
import operator
import os
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_WHOLE = 64 << 20  # bytes: a corpus up to this size is fingerprinted whole, a larger one by the ends of its files
_END = 64 << 10


@dataclasses.dataclass(frozen=True)
class Mixing:
  """How the rows of training are taken from several sources: see `mixture`. Weights are whole numbers."""
  sources: 'tuple[Source, ...]'
  weights: tuple[int, ...]
  repeat: bool = True


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents in splits.

  Attributes:
    splits: 'train', 'validation', and 'validation-NAME' for each further set that is evaluated apart.
    mixing: of a mixture, whose splits hold the documents of each source in turn.
    counts: how often reading met an event, such as 'invalid UTF-8 dropped'; complete once a split has been used.
    notes: lines to print about what was read; complete once a split has been used.
  """
  name: str
  splits: Mapping[str, Sequence[str]]
  fingerprint: str
  license: str = 'unknown'
  counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter, compare=False)
  notes: list[str] = dataclasses.field(default_factory=list, compare=False)
  mixing: Mixing | None = None

  def to_store(self) -> 'Source':
    """Returns what the source is known by, without its documents."""
    mixing = self.mixing and dataclasses.replace(
        self.mixing, sources=tuple(source.to_store() for source in self.mixing.sources))
    return Source(self.name, dict.fromkeys(self.splits, ()), self.fingerprint, self.license, mixing=mixing)


class Deferred(Source):
  """A source that `make()` returns at first use, so that a trained run can be opened after its corpus is gone."""

  def __init__(self, make: Callable[[], Source]):
    vars(self)['make'] = make   # the class is frozen

  @functools.cached_property
  def opened(self) -> Source:
    return self.make()

  name = property(lambda self: self.opened.name)
  splits = property(lambda self: self.opened.splits)
  fingerprint = property(lambda self: self.opened.fingerprint)
  license = property(lambda self: self.opened.license)
  counts = property(lambda self: self.opened.counts)
  notes = property(lambda self: self.opened.notes)
  mixing = property(lambda self: self.opened.mixing)


def deferred(corpus: Callable[..., Source]) -> Callable[..., Deferred]:
  """Decorates a function that returns a source: it is called when the source is first used."""
  @functools.wraps(corpus)
  def make_deferred(*args, **options):
    inspect.signature(corpus).bind(*args, **options)   # a wrong argument raises TypeError at once
    return Deferred(functools.partial(corpus, *args, **options))
  return make_deferred


def texts(documents: Sequence[str], validation: float = 0.05) -> Source:
  """Texts that are at hand, each a document: a list, or what has a length and is indexed as a list.

  Raises ValueError for a single text, and for what is no sequence; at first use, for a document that is not text.
  """
  if isinstance(documents, str) or not (hasattr(documents, '__getitem__') and hasattr(documents, '__len__')):
    raise ValueError(f'{documents!r:.80} is not a list of texts; give a list of texts, or a corpus, such as '
                     "corpora.text('books/*.txt')")
  return _texts(documents, validation)


@deferred
def _texts(documents, validation):
  state = hashlib.blake2b(repr(('texts', validation)).encode(), digest_size=16)
  for i in range(len(documents)):
    if not isinstance(documents[i], str):
      raise ValueError(f'document {i} is of type {type(documents[i]).__name__}; give texts, of type str')
    state.update(digest(documents[i]))
  rows = lambda: ((0, i, documents[i]) for i in range(len(documents)) if documents[i].strip())
  read = lambda _, i: documents[i]
  return Source('texts', split(rows, read, validation, 'texts', collections.Counter()), state.hexdigest())


@deferred
def sample(corpus: Source, documents: int) -> Source:
  """So many documents of the train split, drawn at random, and all of the others; fewer documents are among more.

  ValueError, at first use, where there are not so many.
  """
  counts, notes = collections.Counter(), []

  if corpus.mixing is not None:
    raise ValueError(f'{corpus.name} is a mixture, whose weights are not kept: draw documents of its sources')

  def drawn():
    count = len(train := corpus.splits['train'])
    if not 0 < documents <= count:
      raise ValueError(f'{documents} documents cannot be drawn from the {count} of {corpus.name} to train on')
    counts.update(corpus.counts)
    notes.append(f'train: drew {documents:,} of {count:,} documents of {corpus.name}')
    places = np.random.default_rng(0).permutation(count)[:documents]
    return [(train, int(place)) for place in places]

  splits = {**corpus.splits, 'train': Documents(drawn, lambda place: place[0][place[1]])}
  identity = repr(('sample', corpus.fingerprint, documents))
  return Source(f'{documents} of {corpus.name}', splits, digest(identity).hex(), corpus.license, counts, notes)


class Documents(Sequence[str]):
  """The documents `read(item)` of the items that `items()` returns at first use; `where(item)` names their places."""

  def __init__(self, items: Callable[[], Sequence], read: Callable[[Any], str],
               where: Callable[[Any], str] | None = None):
    self._items, self._read, self._where = functools.cache(items), read, where

  def place(self, i: int) -> str:
    """Names document i for messages: as 'file:line' where its source knows that."""
    return self._where(self._items()[i]) if self._where else f'document {i + 1:,}'

  def __len__(self):
    return len(self._items())

  def __getitem__(self, i):
    if isinstance(i, slice):
      return [self[j] for j in range(*i.indices(len(self)))]
    i = operator.index(i)
    if not -len(self) <= i < len(self):
      raise IndexError(f'document {i} of {len(self)}')
    return self._read(self._items()[i % len(self)])


def shards(load: Callable[[int, collections.Counter], list[str]], count: int,
           counts: collections.Counter) -> tuple[Callable, Callable]:
  """(documents, read) for `split`, of a corpus of pieces, such as files, loaded whole; the last few are kept."""
  documents = lambda: ((a, b, document) for a in range(count) for b, document in enumerate(load(a, counts)))
  cached = functools.lru_cache(maxsize=2)(lambda a: load(a, collections.Counter()))
  return documents, lambda a, b: cached(a)[b]


def split(documents: Callable[[], Iterable[tuple[int, int, str]]], read: Callable[[int, int], str], validation: float,
          name: str, counts: collections.Counter, unique: bool = False, divisible: bool = True,
          where: Callable[[int, int], str] | None = None) -> dict[str, Documents]:
  """Splits `documents() -> (a, b, text)` by a hash of the text, in one pass at first use; `read(a, b)` is the text.

  Where a split comes out empty, which happens to a few documents, the last part of each document is held out instead:
  a share `validation` of it. ValueError, at first use, where that leaves a split empty too, or where documents are not
  `divisible`. `unique` leaves out the second of two equal texts. `where(a, b)` names the place of a document.
  """
  if not 0 <= validation < 1:
    raise ValueError(f'validation={validation} is not a fraction in [0, 1)')
  names = ('train', 'validation') if validation else ('train',)

  @functools.cache
  def addresses() -> tuple[dict[str, np.ndarray], bool]:
    """Of the documents of each split, [n, 2]; and whether each split has a part of its documents."""
    counts.clear()
    by_hash, seen = {split: array.array('q') for split in names}, set()
    for a, b, document in documents():
      key = digest(document)
      if unique and key in seen:
        counts['duplicate dropped'] += 1
        continue
      if unique:
        seen.add(key)
      held_out = int.from_bytes(key[:8]) < validation * 2**64
      by_hash['validation' if held_out else 'train'].extend((a, b))
    by_split = {split: np.frombuffer(numbers, np.int64).reshape(-1, 2) for split, numbers in by_hash.items()}
    if all(map(len, by_split.values())):
      return by_split, False
    everything = np.concatenate(list(by_split.values()))
    if not len(everything):
      raise ValueError(f'{name}: there is no document in it{_met(counts)}; give files that hold some text')
    if not divisible:
      empty = next(split for split, rows in by_split.items() if not len(rows))
      raise ValueError(f'{name}: none of {len(everything)} records fell into the {empty} split with validation='
                       f'{validation}; choose another share (--validation), or give more records')
    is_cut = [_last_part(read(*row), validation) is not None for row in everything.tolist()]
    if not any(is_cut):
      longest = max(len(read(*row)) for row in everything.tolist())
      raise ValueError(f'{name}: its documents ({len(everything)}, the longest of {longest} characters) are too short '
                       f'to hold out a share of {validation} of each; give more text, or another --validation')
    counts['documents whose last part is held out'] = sum(is_cut)
    return {'train': everything, 'validation': everything[is_cut]}, True

  def read_part(split: str, row: np.ndarray) -> str:
    document = read(*row.tolist())
    if not addresses()[1]:
      return document
    place = _last_part(document, validation)
    return document[:place] if split == 'train' else document[place:]

  return {split: Documents(lambda split=split: addresses()[0][split], functools.partial(read_part, split),
                           where and (lambda row: where(*row.tolist()))) for split in names}


def _last_part(document: str, share: float) -> int | None:
  """Where the last part begins, with a line or, without one, a word; None where one of the two parts would be blank."""
  place = int(len(document) * (1 - share))
  starts = [document.find(end, place - 1) + 1 for end in ('\n', ' ')]
  place = next((start for start in starts if start and document[start:].strip()), place)
  return place if document[:place].strip() and document[place:].strip() else None


def _met(counts: collections.Counter) -> str:
  met = ', '.join(f'{n:,} {what}' for what, n in counts.items() if n)
  return met and f' ({met})'


def digest(document: str) -> bytes:
  return hashlib.blake2b(document.encode('utf-8', 'surrogatepass'), digest_size=16).digest()


def matching(pattern: str) -> list[pathlib.Path]:
  """The file of this name or, where there is none, those that match it as a glob pattern, sorted.

  A file that links lead to in several ways is there once, by the shortest of them. FileNotFoundError where none is.
  """
  name = os.path.expanduser(pattern)
  paths = [name] if os.path.isfile(name) else filter(os.path.isfile, glob.glob(name, recursive=True))
  by_file = {}
  for path in sorted(paths, key=lambda path: (len(path), path)):
    by_file.setdefault(os.path.realpath(path), pathlib.Path(path))
  files = sorted(by_file.values())
  if not files:
    below = '' if os.path.isabs(os.path.expanduser(pattern)) else f' in {os.getcwd()}'
    raise FileNotFoundError(f'no file matches {pattern!r}{below}; ** stands for folders of any depth')
  return files


def unescaped(separator: str) -> str:
  r"""A separator from the command line, where the two characters \n stand for a newline and \t for a tab."""
  return separator.replace(r'\n', '\n').replace(r'\t', '\t')


def title(pattern: str) -> str:
  """The last part of a pattern without wildcards: 'data/books/**/*.txt' -> 'books'."""
  return next((pathlib.Path(p).stem for p in reversed(pathlib.Path(pattern).parts) if not glob.has_magic(p)), 'files')


def relative(files: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
  """The files by their path below the folder that holds all of them."""
  root = os.path.commonpath([path.absolute().parent for path in files])
  return {path.absolute().relative_to(root).as_posix(): path for path in files}


def fingerprint(files: Mapping[str, Any], *options: Any) -> str:
  """Of names, sizes, contents and options, wherever the files lie. `files`: name -> pathlib or etils path."""
  state = hashlib.blake2b(repr(options).encode(), digest_size=16)
  sizes = {}
  for name, path in files.items():
    with path.open('rb') as f:
      sizes[name] = f.seek(0, os.SEEK_END)
  total = sum(sizes.values())
  for name, path in files.items():
    state.update(f'\0{name}\0{sizes[name]}\0'.encode('utf-8', 'surrogateescape'))
    with path.open('rb') as f:
      state.update(f.read(_END if total > _WHOLE else -1))
      if total > _WHOLE:
        f.seek(max(0, sizes[name] - _END))
        state.update(f.read(_END))
  return state.hexdigest()


def require(module: str, extra: str) -> Any:
  """The module, or an ImportError that names the extra of `lm` to install."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ImportError(f"{module} is needed: pip install 'lm[{extra}]' ({error})") from None
