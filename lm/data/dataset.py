"""A corpus with a tokenizer: from documents to batches."""
import contextlib
import dataclasses
import functools
import hashlib
import itertools
import pathlib
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lm.data import store, tokenizers
from lm.data.batch import ExampleMaker, special
from lm.data.batches import Batches
from lm.data.chat.messages import Messages
from lm.data.encoding import TextEncoder
from lm.data.rows.packed_documents import Stream, TokenDocuments
from lm.data.store_reader import OtherSettings
from lm.data.text import clean
from lm.data.text.mixture import Mixed
from lm.data.text.source import Mixing, Source, texts
from lm.sharding import hosts
from lm.workdir import atomic, integrity, locks
from lm.workdir.describe import describe, differences

# Is given the fingerprints of the data and of its tokenizer before anything is written, and raises where they are not
# those that are wanted.
Check = Callable[[str, str], Any]


def unchecked(data: str, tokenizer: str) -> None:
  """Accepts any data."""


@dataclasses.dataclass(frozen=True)
class Text:
  """Text to train on; `open` makes what is missing and opens the rest.

  Args:
    source: the documents, as a `Source`, or as a sequence of texts, of which one in twenty is held out.
    tokenizer: one, or a function that trains one on the cleaned training documents; None: the one in the folder, and
      the text in its tokens is only opened, see `to_store`.
    length: T, positions a row.
    rules: cleaning, see `clean`.
    folder: where the tokenizer and the tokenised text are kept; None: in the workdir.
    source_length: S, positions a row that an encoder reads, for objectives that make sources.
  """
  source: Source | Sequence[str]
  tokenizer: tokenizers.Tokenizer | Callable[[Iterable[str]], tokenizers.Tokenizer] | None
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
    """The fingerprint of the cleaned documents, whatever the tokenizer and the length are."""
    return hashlib.sha256(repr((self.source.fingerprint, describe(self.rules))).encode()).hexdigest()[:16]

  def questions(self, split: str, count: int) -> list[tuple[Messages, str]]:
    """See `chat.dialogues.Dialogues.questions`: documents have none."""
    del split, count
    return []

  def open(self, workdir: pathlib.Path, progress: Callable[[str], Any] = print, control: tuple[str, ...] = (),
           check: Check = unchecked) -> 'OpenText':
    """Trains the tokenizer and tokenises, unless that is done. `control` names tokens that the objective needs.

    Raises ValueError if the folder has something of other settings, the text is empty, or the tokenizer lacks a control
    token; OSError if it cannot be written.
    """
    folder = self._folder(workdir)
    if self.tokenizer is None:
      return self._reopen(folder, control, check)
    made_of = {'rules': describe(self.rules), 'source': self.source.fingerprint} if callable(self.tokenizer) else {}

    def documents() -> list[str | clean.Drop]:   # to train a tokenizer on, where the splits hold text
      for split in self.source.splits:
        if all(isinstance(document, clean.Drop) for document in clean.clean(self.source.splits[split], self.rules)):
          raise ValueError(f'{self.source.name}: no document is left in {split} of {len(self.source.splits[split]):,} '
                           'read, after cleaning; give more text')
      return list(clean.clean(self.source.splits['train'], self.rules))

    renew = self.folder is None and untrained(workdir)
    tokenizer = with_bos(open_tokenizer(folder, self.tokenizer, made_of, documents, progress,
                                        functools.partial(self._check, check), renew))
    special(tokenizer, control)
    stores = store.build(folder / 'tokens', self.source, TextEncoder(tokenizer), self.rules, progress=progress,
                         renew=renew)
    if not tokenizer.lossless and any(opened.sizes is None for opened in stores.values()):
      progress(f'{folder / "tokens"} does not say how many bytes its tokens stand for: no bits per byte are shown')
    return OpenText(stores, tokenizer, self.length, self.source_length, self.source.mixing)

  def to_store(self) -> 'Text':
    """Returns the data without its text, which opens what `open` wrote, and writes nothing."""
    return dataclasses.replace(self, source=self.source.to_store(), tokenizer=None)

  def _check(self, check: Check, tokenizer: tokenizers.Tokenizer) -> None:
    settings = store.settings(self.source, TextEncoder(tokenizer), self.rules)
    check(_fingerprint(store.fingerprint(settings, 'train'), self.source.mixing), tokenizer.fingerprint)

  def _reopen(self, folder: pathlib.Path, control: tuple[str, ...], check: Check) -> 'OpenText':
    tokenizer = with_bos(load_tokenizer(folder / 'tokenizer'))
    self._check(check, tokenizer)
    special(tokenizer, control)
    stores = store.reopen(folder / 'tokens', self.source, TextEncoder(tokenizer), self.rules)
    return OpenText(stores, tokenizer, self.length, self.source_length, self.source.mixing)

  def load_tokenizer(self, workdir: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer that `open` made."""
    return with_bos(load_tokenizer(self._folder(workdir) / 'tokenizer'))

  def verify(self, workdir: pathlib.Path) -> list[str]:
    """See `verify`."""
    return verify(self._folder(workdir))

  def _folder(self, workdir: pathlib.Path) -> pathlib.Path:
    return self.folder or workdir / 'data'


def with_bos(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
  """Returns the tokenizer with `adds_bos` set, because the documents of a data set begin with bos."""
  return tokenizer if tokenizer.adds_bos else dataclasses.replace(tokenizer, adds_bos=True)


def open_tokenizer(folder: pathlib.Path, given: tokenizers.Tokenizer | Callable, made_of: Mapping[str, Any],
                   documents: Callable[[], Iterable[str | clean.Drop]], progress: Callable[[str], Any],
                   check: Callable[[tokenizers.Tokenizer], Any], renew: bool = False) -> tokenizers.Tokenizer:
  """The tokenizer in `folder`: saved there or, where a function is given, trained on `documents()`; unless it is there.

  `check` is called with it before it is written. Raises ValueError if the one that is there was made with other
  settings, another tokenizer or of something else, and is not to be renewed.
  """
  settings, trains = folder / 'tokenizer' / 'settings.json', callable(given)
  wanted = {'tokenizer': describe(given) if trains else given.fingerprint, **made_of}

  def differing() -> list[str] | None:
    made_with = _read(settings) or {}
    facts = {name: value for name, value in made_with.items() if name not in ('fingerprint', 'checksums')}
    return differences(facts, wanted) if made_with else None

  def missing() -> bool:
    lines = differing()
    return lines is None or bool(lines) and renew

  def make():
    if differing():
      progress(f'{folder} was made with other settings, and nothing was trained on it: it is made anew')
    tokenizer = given
    if trains:
      texts = [document for document in documents() if isinstance(document, str)]
      progress('training the tokenizer')
      tokenizer = given(texts)
    check(tokenizer)
    settings.unlink(missing_ok=True)   # until the new one is whole, there is none
    tokenizer.save(settings.parent)
    _record(settings, wanted, tokenizers.load(settings.parent))

  def adopt():
    saved = load_tokenizer(settings.parent)
    check(saved)
    progress(f'{settings.parent} was written without checksums; its tokenizer has the fingerprint {saved.fingerprint}, '
             'by which it is known from now on')
    with contextlib.suppress(OSError):   # another user's folder: nothing is noted there
      _record(settings, wanted, saved)

  with hosts.process_0_first('tokenizer'):
    if missing():   # asked again under the lock: only what is to be made needs it
      folder.parent.mkdir(parents=True, exist_ok=True)
      with locks.hold(folder.parent, f'waiting for the process that makes {settings.parent}', progress):
        if missing():
          make()
    elif not differing() and 'checksums' not in (_read(settings) or {}):
      adopt()
  if lines := differing():
    raise OtherSettings(f'{folder} was made with other settings; go back to them, or choose another --workdir\n  '
                     + '\n  '.join(lines))
  tokenizer = load_tokenizer(settings.parent)
  check(tokenizer)
  return tokenizer


def untrained(workdir: pathlib.Path) -> bool:
  """Whether nothing was trained on the data in a workdir, nor can be elsewhere: it may be made anew."""
  return not (workdir / 'data').is_symlink() and not any((workdir / 'checkpoints').glob('[0-9]*'))


def load_tokenizer(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """The tokenizer that `open_tokenizer` saved in a folder. ValueError if its files are not as they were then.

  Of folders of before there were checksums, only the fingerprint is compared, if there is one.
  """
  facts, advice = _read(folder / 'settings.json') or {}, 'put what was written there back'
  integrity.compare({folder / name: number for name, number in facts.get('checksums', {}).items()}, advice)
  saved = tokenizers.load(folder)
  if facts.get('fingerprint') not in (None, saved.fingerprint):
    raise ValueError(f'{folder} is damaged: its tokenizer has the fingerprint {saved.fingerprint}, and '
                     f'{facts["fingerprint"]} was written; {advice}')
  return saved


def verify(folder: pathlib.Path) -> list[str]:
  """Compares all bytes of a tokenizer and of the text in its tokens with their checksums. Returns what has none.

  ValueError, with the paths, where files are not as they were written.
  """
  path, without = folder / 'tokenizer' / 'settings.json', []
  if facts := _read(path):
    load_tokenizer(path.parent)
    without = [] if 'checksums' in facts else [str(path.parent)]
  return [*without, *store.verify(folder / 'tokens')]


def _record(settings: pathlib.Path, made_of: Mapping[str, Any], saved: tokenizers.Tokenizer) -> None:
  """Says, beside a tokenizer, what it was made of and which files it is; written last."""
  checksums = {path.name: integrity.checksum(path) for path in sorted(settings.parent.iterdir())
               if path.is_file() and path != settings and path.suffix != '.new'}
  facts = {**made_of, 'fingerprint': saved.fingerprint, 'checksums': checksums}
  atomic.write(settings, integrity.json_with_checksum(facts))


def _read(settings: pathlib.Path) -> dict | None:
  """None if the tokenizer was not made, or not to the end; ValueError, with the path, if the file is damaged."""
  try:
    return integrity.parse_json_with_checksum(settings.read_text())[0]
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise ValueError(f'{settings} is damaged ({error}); put what was written there back') from None


def _fingerprint(train: str, mixing: Mixing | None) -> str:
  """Of the data of training: of its store, and of the weights of a mixture."""
  return train if mixing is None else hashlib.sha256(f'{train} {mixing.weights}'.encode()).hexdigest()[:16]


def _numbered(name: str) -> Iterator[str]:
  """The name, then name-2, name-3, ..."""
  yield name
  yield from (f'{name}-{number}' for number in itertools.count(2))


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
        if len(part.offsets) > 1:   # not of a source whose held-out documents were all dropped
          name = next(name for name in _numbered(source.name) if name not in stores)
          stores[name] = part
    return stores

  @property
  def validation_sets(self) -> tuple[str, ...]:
    """Further held-out sets: those of the splits `validation-NAME`, and what each source of a mixture holds out."""
    return tuple(self._validation_stores)

  def batches(self, split: str, objective: ExampleMaker, rows: int, seed: int | None = 0, repeat: bool = True,
              context: int = 0) -> Batches:
    """See `Stream`. Where training repeats a mixture, its sources are read by weight: see `Mixed`.

    `validation/NAME` is one of the validation sets.
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
        raise ValueError(f'{source.name}: no document of it is in {split}, for all were dropped (the second of two '
                         'equal ones is); give it the weight 0')
    return Mixed(*settings, mixing=self.mixing, streams=tuple(Stream(*settings, store=part) for part in parts))

  def text(self, split: str) -> str:
    """All documents of a split, cleaned, one after the other."""
    documents = self.stores[split]
    return ''.join(self.tokenizer.decode(documents[i]) for i in range(len(documents)))
