"""`Source`, the interface of a corpus, and the functions with which `corpora` builds sources.

A hash of its text decides whether a document is for training or for validation. So no text is in both splits, and files
that are added later move no document. Only if so few documents leave a split empty, or fewer than four long ones would
be held out, each document is cut in two: one of three books is no share of a twentieth, and no sample of three. Files
are listed and fingerprinted when a source is first used; the first use of a split reads them once, for all splits.
"""
import array
import collections
import dataclasses
import functools
import hashlib
import importlib
import inspect
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

_FEWEST = 4      # documents that are held out whole, at least, unless the parts of documents would be short:
_LONG = 1000     # characters of a part, on average


@dataclasses.dataclass(frozen=True)
class Mixing:
  """Several sources, and the weights, whole numbers, with which training reads them; see `mixture`."""
  sources: 'tuple[Source, ...]'
  weights: tuple[int, ...]
  repeat: bool = True


@dataclasses.dataclass(frozen=True)
class Source:
  """Documents in splits.

  Attributes:
    splits: 'train', 'validation', and 'validation-NAME' for each further set that is evaluated separately.
    mixing: the sources of a mixture, whose splits hold the documents of one source after those of another; None: the
      source is not a mixture.
    counts: numbers of events during reading, such as 'invalid UTF-8 dropped'; complete once a split has been used.
    notes: lines to print about the documents; complete once a split has been used.
  """
  name: str
  splits: Mapping[str, Sequence[str]]
  fingerprint: str
  license: str = 'unknown'
  counts: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter, compare=False)
  notes: list[str] = dataclasses.field(default_factory=list, compare=False)
  mixing: Mixing | None = None

  def to_store(self) -> 'Source':
    """Returns the source without its documents."""
    mixing = self.mixing and dataclasses.replace(
        self.mixing, sources=tuple(source.to_store() for source in self.mixing.sources))
    return Source(self.name, dict.fromkeys(self.splits, ()), self.fingerprint, self.license, mixing=mixing)


class Deferred(Source):
  """A source that `make()` builds at first use, so that a trained run can be opened although its corpus was deleted."""

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
  """Decorates a function that returns a source, so that it is called when the source is first used."""
  @functools.wraps(corpus)
  def make_deferred(*args, **options):
    inspect.signature(corpus).bind(*args, **options)   # raises TypeError for a wrong argument now, not at first use
    return Deferred(functools.partial(corpus, *args, **options))
  return make_deferred


def texts(documents: Sequence[str], validation: float = 0.05) -> Source:
  """Returns a source of the texts in a list, or in another sequence; each text is a document.

  Raises ValueError if `documents` is a single text or not a sequence; at first use, if a document is not text.
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
  """Returns a source with some documents of the train split, drawn at random, and all documents of the other splits.

  A smaller sample is a part of a larger one. Raises ValueError, at first use, if there are fewer documents, or if the
  corpus is a mixture.
  """
  if corpus.mixing is not None:
    raise ValueError(f'{corpus.name} is a mixture, whose weights are not kept: draw documents of its sources')
  counts, notes = collections.Counter(), []

  def draw():
    train = corpus.splits['train']
    count = len(train)
    if not 0 < documents <= count:
      raise ValueError(f'{documents} documents cannot be drawn from the {count} of {corpus.name} to train on')
    counts.update(corpus.counts)
    notes.append(f'train: drew {documents:,} of {count:,} documents of {corpus.name}')
    places = np.random.default_rng(0).permutation(count)[:documents]
    return [(train, int(place)) for place in places]

  splits = {**corpus.splits, 'train': Documents(draw, lambda place: place[0][place[1]])}
  identity = repr(('sample', corpus.fingerprint, documents))
  return Source(f'{documents} of {corpus.name}', splits, digest(identity).hex(), corpus.license, counts, notes)


class Documents(Sequence[str]):
  """The documents `read(item)` of all items; `items()` is called at first use. `where(item)` names a document's place.
  """

  def __init__(self, items: Callable[[], Sequence], read: Callable[[Any], str],
               where: Callable[[Any], str] | None = None):
    self._items, self._read, self._where = functools.cache(items), read, where

  def place(self, i: int) -> str:
    """Returns the name of document i for messages: 'file:line', if the source knows it."""
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
  """Returns (documents, read) for `split`, of `count` shards, such as files. `load(i, counts)` reads shard i.

  The last two shards that were read stay in memory.
  """
  documents = lambda: ((a, b, document) for a in range(count) for b, document in enumerate(load(a, counts)))
  cached = functools.lru_cache(maxsize=2)(lambda a: load(a, collections.Counter()))
  return documents, lambda a, b: cached(a)[b]


def split(documents: Callable[[], Iterable[tuple[int, int, str]]], read: Callable[[int, int], str], validation: float,
          name: str, counts: collections.Counter, unique: bool = False, divisible: bool = True,
          where: Callable[[int, int], str] | None = None) -> dict[str, Documents]:
  """Splits documents by a hash of their text, in one pass at first use.

  With few documents, the last part of each document is held out instead: if a split is empty, or if fewer than four
  documents would be held out, and the parts have 1,000 characters or more on average.

  Args:
    documents: returns (a, b, text) of each document.
    read: returns the text of the document with the numbers (a, b).
    validation: the share of documents, or of each document, that is held out.
    name: the name of the source, for messages.
    counts: is cleared, and counts events.
    unique: whether to drop the second of two equal texts.
    divisible: whether a document may be cut.
    where: returns the name of the place of document (a, b), for messages.

  Raises ValueError if `validation` is not in [0, 1); at first use, if a split is empty, and no document can be cut.
  """
  if not 0 <= validation < 1:
    raise ValueError(f'validation={validation} is not a fraction in [0, 1)')
  names = ('train', 'validation') if validation else ('train',)

  @functools.cache
  def addresses() -> tuple[dict[str, np.ndarray], bool]:
    """Returns (a, b) of the documents of each split, [n, 2], and whether its documents are parts."""
    counts.clear()
    by_split, size = _by_hash(documents(), names, validation, unique, counts)
    rows = np.concatenate(list(by_split.values()))
    is_few = validation > 0 and len(by_split['validation']) < _FEWEST and size * validation >= _LONG * len(rows)
    if all(map(len, by_split.values())) and not (divisible and is_few):
      return by_split, False
    rows = rows[np.lexsort(rows.T[::-1])]   # in the order of the documents
    if not len(rows):
      events = ', '.join(f'{n:,} {event}' for event, n in counts.items() if n)
      raise ValueError(f'{name}: there is no document in it{events and f" ({events})"}; give files that hold some text')
    if not divisible:
      empty = next(split for split, rows_of_split in by_split.items() if not len(rows_of_split))
      raise ValueError(f'{name}: none of {len(rows)} records fell into the {empty} split with validation={validation}; '
                       'choose another share (--validation), or give more records')
    is_cut = [_last_part(read(*row), validation) is not None for row in rows.tolist()]
    if not any(is_cut):
      longest = max(len(read(*row)) for row in rows.tolist())
      raise ValueError(f'{name}: its documents ({len(rows)}, the longest of {longest} characters) are too short to '
                       f'hold out a share of {validation} of each; give more text, or another --validation')
    counts['documents whose last part is held out'] = sum(is_cut)
    return {'train': rows, 'validation': rows[is_cut]}, True

  def read_part(split: str, row: np.ndarray) -> str:
    document = read(*row.tolist())
    if not addresses()[1]:
      return document
    place = _last_part(document, validation)
    return document[:place] if split == 'train' else document[place:]

  return {split: Documents(lambda split=split: addresses()[0][split], functools.partial(read_part, split),
                           where and (lambda row: where(*row.tolist()))) for split in names}


def _by_hash(documents: Iterable[tuple[int, int, str]], names: Sequence[str], validation: float, unique: bool,
             counts: collections.Counter) -> tuple[dict[str, np.ndarray], int]:
  """Returns (a, b) of the documents of each split, [n, 2], and the characters of all of them."""
  by_split, keys, size = {split: array.array('q') for split in names}, set(), 0
  for a, b, document in documents:
    key = digest(document)
    if unique and key in keys:
      counts['duplicate dropped'] += 1
      continue
    if unique:
      keys.add(key)
    is_held_out = int.from_bytes(key[:8]) < validation * 2**64
    by_split['validation' if is_held_out else 'train'].extend((a, b))
    size += len(document)
  return {split: np.frombuffer(numbers, np.int64).reshape(-1, 2) for split, numbers in by_split.items()}, size


def _last_part(document: str, share: float) -> int | None:
  """Returns where the last part of a document begins; None if one of the two parts would be blank.

  It begins with a line, or with a word if no line begins after the cut.
  """
  place = int(len(document) * (1 - share))
  starts = [document.find(end, place - 1) + 1 for end in ('\n', ' ')]
  place = next((start for start in starts if start and document[start:].strip()), place)
  return place if document[:place].strip() and document[place:].strip() else None


def digest(document: str) -> bytes:
  """Returns 16 bytes that identify a text."""
  return hashlib.blake2b(document.encode('utf-8', 'surrogatepass'), digest_size=16).digest()


def unescaped(separator: str) -> str:
  r"""Returns a separator from the command line, with a newline for the two characters \n and a tab for \t."""
  return separator.replace(r'\n', '\n').replace(r'\t', '\t')


def require(module: str, extra: str) -> Any:
  """Imports an optional module. Raises ImportError, which names the extra of `lm` to install, if it is missing."""
  try:
    return importlib.import_module(module)
  except ImportError as error:
    raise ImportError(f"{module} is needed: pip install 'lm[{extra}]' ({error})") from None
