"""A corpus and its tokenizer: from documents to batches."""
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import types
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lm.data import store, stored_tokenizer, tokenizers
from lm.data.batch import ExampleMaker, special
from lm.data.batches import Batches
from lm.data.chat.messages import Messages
from lm.data.encoding import TextEncoder
from lm.data.rows.packed_documents import Stream, TokenDocuments
from lm.data.text import clean
from lm.data.text.mixture import Mixed
from lm.data.text.source import Mixing, Source, texts
from lm.workdir.describe import describe

# Takes the fingerprints of data and of its tokenizer, before any file is written; raises an error to refuse them.
Check = Callable[[str, str], Any]


def unchecked(data: str, tokenizer: str) -> None:
  """Accepts any data."""


@dataclasses.dataclass(frozen=True)
class Text:
  """Text to train on.

  Args:
    source: the documents, as a `Source`, or as a sequence of texts, of which one in twenty is held out.
    tokenizer: a tokenizer, or its file, or a function that trains one on the cleaned training documents; None: the
      tokenizer in the folder, and the stored tokens are only opened, see `to_store`.
    length: T, positions per row.
    rules: the rules of cleaning, see `clean`.
    folder: where the tokenizer and the tokens are stored; None: in the workdir.
    source_length: S, positions per row that an encoder reads, for objectives that make sources.
  """
  source: Source | Sequence[str]
  tokenizer: tokenizers.Tokenizer | tokenizers.InFile | Callable[[Iterable[str]], tokenizers.Tokenizer] | None
  length: int
  rules: Sequence[clean.Rule] = clean.DEFAULT
  folder: pathlib.Path | None = None
  source_length: int | None = None

  kind = np.ndarray
  columns = inputs = types.MappingProxyType({})
  template = None

  def __post_init__(self):
    if not isinstance(self.source, Source | None):
      object.__setattr__(self, 'source', texts(self.source))

  @property
  def text_fingerprint(self) -> str:
    """The fingerprint of the cleaned documents, which does not depend on the tokenizer or the length."""
    return hashlib.sha256(repr((self.source.fingerprint, describe(self.rules))).encode()).hexdigest()[:16]

  def questions(self, split: str, count: int) -> list[tuple[Messages, str]]:
    """Returns no questions, because documents have none; see `chat.dialogues.Dialogues.questions`."""
    del split, count
    return []

  def open(self, workdir: pathlib.Path, progress: Callable[[str], Any] = print, control: tuple[str, ...] = (),
           check: Check = unchecked) -> 'OpenText':
    """Trains the tokenizer and tokenises the text, unless the folder has both, and opens the result.

    Args:
      workdir: holds the folder, unless the data has one of its own.
      progress: is called with lines to print.
      control: names of control tokens that the objective needs.
      check: see `Check`.

    Raises:
      ValueError: the folder has data of other settings, a split has no text, or the tokenizer lacks a control token.
      OSError: the folder cannot be written.
    """
    folder = self._folder(workdir)
    if self.tokenizer is None:
      return self._reopen(folder, control, check)
    training_data = {}
    if callable(self.tokenizer):
      training_data = {'rules': describe(self.rules), 'source': self.source.fingerprint}
    renew = self.folder is None and untrained(workdir)
    tokenizer = with_bos(stored_tokenizer.prepare(folder, self.tokenizer, training_data, self._training_documents,
                                                  progress, functools.partial(self._check, check), renew))
    special(tokenizer, control)
    stores = store.build(folder / 'tokens', self.source, TextEncoder(tokenizer), self.rules, progress=progress,
                         renew=renew)
    if not tokenizer.lossless and any(opened.sizes is None for opened in stores.values()):
      progress(f'{folder / "tokens"} has no sizes of its tokens in bytes, so that no bits per byte are shown; to see '
               'them, delete it, and it is made again from the text')
    return OpenText(stores, tokenizer, self.length, self.source_length, self.source.mixing)

  def to_store(self) -> 'Text':
    """Returns the data without its text, which only opens what `open` wrote."""
    return dataclasses.replace(self, source=self.source.to_store(), tokenizer=None)

  def _training_documents(self) -> list[str | clean.Drop]:
    """Returns the results of cleaning the training documents. Raises ValueError if nothing remains of a split."""
    for split, documents in self.source.splits.items():
      if all(isinstance(document, clean.Drop) for document in clean.clean(documents, self.rules)):
        raise ValueError(f'{self.source.name}: no document is left in {split} of {len(documents):,} read, after '
                         'cleaning; give more text')
    return list(clean.clean(self.source.splits['train'], self.rules))

  def _check(self, check: Check, tokenizer: tokenizers.Tokenizer) -> None:
    settings = store.settings(self.source, TextEncoder(tokenizer), self.rules)
    check(_fingerprint(store.fingerprint(settings, 'train'), self.source.mixing), tokenizer.fingerprint)

  def _reopen(self, folder: pathlib.Path, control: tuple[str, ...], check: Check) -> 'OpenText':
    tokenizer = with_bos(stored_tokenizer.load(folder / 'tokenizer'))
    self._check(check, tokenizer)
    special(tokenizer, control)
    stores = store.reopen(folder / 'tokens', self.source, TextEncoder(tokenizer), self.rules)
    return OpenText(stores, tokenizer, self.length, self.source_length, self.source.mixing)

  def load_tokenizer(self, workdir: pathlib.Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer that `open` stored."""
    return with_bos(stored_tokenizer.load(self._folder(workdir) / 'tokenizer'))

  def verify(self, workdir: pathlib.Path) -> list[str]:
    """See the function `verify`."""
    return verify(self._folder(workdir))

  def _folder(self, workdir: pathlib.Path) -> pathlib.Path:
    return self.folder or workdir / 'data'


def with_bos(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """Returns the tokenizer with `adds_bos` set, because the documents of a data set begin with bos."""
  return tokenizer if tokenizer.adds_bos else dataclasses.replace(tokenizer, adds_bos=True)


def untrained(workdir: pathlib.Path) -> bool:
  """Returns whether the data in a workdir may be replaced: no model was trained on it, here or in another workdir."""
  return not (workdir / 'data').is_symlink() and not any((workdir / 'checkpoints').glob('[0-9]*'))


def verify(folder: pathlib.Path) -> list[str]:
  """Compares all files of a tokenizer and of tokens with their checksums. Returns the paths that have no checksums.

  Raises ValueError, with the paths, if files are not as they were written.
  """
  return [*stored_tokenizer.verify(folder / 'tokenizer'), *store.verify(folder / 'tokens')]


def _fingerprint(train: str, mixing: Mixing | None) -> str:
  """Returns the fingerprint of training data, from that of its store and from the weights of a mixture."""
  return train if mixing is None else hashlib.sha256(f'{train} {mixing.weights}'.encode()).hexdigest()[:16]


def _numbered(name: str) -> Iterator[str]:
  """Yields name, name-2, name-3, ..."""
  yield name
  for number in itertools.count(2):
    yield f'{name}-{number}'


@dataclasses.dataclass(frozen=True)
class OpenText:
  """Tokenised text, by split."""
  stores: dict[str, store.Store]
  tokenizer: tokenizers.Tokenizer
  length: int
  source_length: int | None = None
  mixing: Mixing | None = None

  @property
  def fingerprint(self) -> str:
    return _fingerprint(self.stores['train'].fingerprint, self.mixing)

  @functools.cached_property
  def _validation_stores(self) -> dict[str, TokenDocuments]:
    stores = {split.removeprefix('validation-'): opened for split, opened in self.stores.items()
              if split.startswith('validation-')}
    if self.mixing is not None and 'validation' in self.stores:
      for source, part in zip(self.mixing.sources, self.stores['validation'].parts()):
        if len(part.offsets) > 1:   # a source has no set if all of its held-out documents were dropped
          name = next(name for name in _numbered(source.name) if name not in stores)
          stores[name] = part
    return stores

  @property
  def validation_sets(self) -> tuple[str, ...]:
    """Names of further held-out sets: the splits `validation-NAME`, and the held-out documents of each source."""
    return tuple(self._validation_stores)

  def batches(self, split: str, objective: ExampleMaker, rows: int, seed: int | None = 0, repeat: bool = True,
              context: int = 0) -> Batches:
    """Returns the batches of a split, or of the validation set `validation/NAME`; see `Stream` for the arguments.

    The training batches of a mixture read its sources by weight, see `Mixed`, unless `repeat` is False.

    Raises ValueError if the tokenizer lacks a control token, or if all documents of a source were dropped.
    """
    settings = (objective, special(self.tokenizer, objective.control), self.length, rows, seed, repeat,
                self.source_length)
    if self.mixing is None or split != 'train' or not repeat:
      validation_set = split.removeprefix('validation/')
      opened = self.stores[split] if validation_set == split else self._validation_stores[validation_set]
      return Stream(*settings, store=opened, context=context)
    parts = self.stores[split].parts()
    for source, part in zip(self.mixing.sources, parts):
      if len(part.offsets) < 2:
        raise ValueError(f'{source.name}: no document of it is in {split}, because all were dropped (the second of '
                         'two equal documents is dropped); give it the weight 0')
    return Mixed(*settings, mixing=self.mixing, streams=tuple(Stream(*settings, store=part) for part in parts))

  def text(self, split: str) -> str:
    """Returns all cleaned documents of a split, joined."""
    return ''.join(self.documents(split))

  def documents(self, split: str) -> list[str]:
    """Returns the cleaned documents of a split, as their tokens say."""
    stored = self.stores[split]
    return [self.tokenizer.decode(stored[i]) for i in range(len(stored))]
