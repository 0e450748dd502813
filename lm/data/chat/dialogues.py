"""Data sets of dialogues, pairs and rated dialogues: JSON records, encoded once, then packed into rows.

A `store.Store` keeps the tokens of a record, with these columns beside them:

  loss_mask   bool per token: whether the model learns to write it
  second      int64 per record: where the second dialogue of a pair begins, or the answer of a rated dialogue
  good        bool per record: the rating of a rated dialogue
"""
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import pathlib
import re
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lm.data import dataset, store, tokenizers
from lm.data.batch import KINDS, Dialogue, ExampleMaker, Pair, Rated, special
from lm.data.chat import conversation, messages
from lm.data.encoding import Column, Encoded
from lm.data.rows.packed_records import Packed, check_left_out
from lm.data.text.source import Source
from lm.workdir.describe import describe


@dataclasses.dataclass(frozen=True)
class Dialogues:
  """Dialogues (`kind=Dialogue`), pairs of a preferred and a rejected dialogue (`Pair`), or rated dialogues (`Rated`).

  A dialogue begins as its template writes it. The model learns to write the assistant's messages, each with the token
  that ends it; if the record has a prompt of its own, only the answer to it. Records longer than a row are left out,
  and a line says how many.

  Args:
    source: JSON records, in one of the shapes of `messages`.
    tokenizer: a tokenizer, or a function that trains one on the messages of the training records; None: the tokenizer
      in the folder, and the stored records are only opened, see `to_store`.
    length: T, positions per row.
    kind: what a record holds.
    template: how messages become tokens.
    keys: the names of the fields.
    folder: where the tokenizer and the tokens are kept; None: in the workdir.
    allow_left_out: whether to train if half of the records or more are left out.
    longest: the length of the longest row that the model reads; advice on `length` goes up to it.
    answer: a regular expression with one group, which matches the part of an answer that counts, see `essence`;
      None: all of the answer counts.

  Raises ValueError if `answer` is not a regular expression with one group.
  """
  source: Source
  tokenizer: tokenizers.Tokenizer | Callable[[Iterable[str]], tokenizers.Tokenizer] | None
  length: int
  kind: type = Dialogue
  template: conversation.Template = conversation.Turns()
  keys: messages.Keys = messages.Keys()
  folder: pathlib.Path | None = None
  allow_left_out: bool = dataclasses.field(default=False, compare=False)
  longest: float = dataclasses.field(default=math.inf, compare=False)
  answer: str | None = dataclasses.field(default=None, compare=False)

  source_length = None
  columns = inputs = types.MappingProxyType({})

  def __post_init__(self):
    if self.answer is None:
      return
    try:
      groups = re.compile(self.answer).groups
    except re.error as error:
      raise ValueError(f'--answer={self.answer} is not a regular expression: {error}') from None
    if groups != 1:
      raise ValueError(f'--answer={self.answer} has {groups} groups, and needs one; put parentheses around the part '
                       "that counts, as in '#### (.*)'; (?:...) is not a group")

  @property
  def text_fingerprint(self) -> str:
    """See `dataset.Text.text_fingerprint`."""
    return self.source.fingerprint

  def essence(self, answer: str) -> str | None:
    """Returns the first match of `self.answer` in an answer, without surrounding spaces; None if there is no match."""
    if self.answer is None:
      return answer
    match = re.search(self.answer, answer)
    return match[1].strip() if match and match[1] is not None else None

  def open(self, workdir: pathlib.Path, progress: Callable[[str], Any] = print, control: tuple[str, ...] = (),
           check: dataset.Check = dataset.unchecked) -> 'OpenDialogues':
    """Trains the tokenizer and encodes the records, unless that is done. The objective needs the tokens `control`.

    Raises ValueError if the folder has data of other settings, a record has another shape, `self.answer` never matches,
    or the tokenizer lacks a control token; OSError if the folder cannot be written.
    """
    folder = self._folder(workdir)
    if self.tokenizer is None:
      return self._reopen(folder, progress, control, check)
    answers = [answer for _, answer in self.questions('validation', 100)] if self.answer else []
    if answers and all(self.essence(answer) is None for answer in answers):
      raise ValueError(f'--answer={self.answer} finds nothing in the first {len(answers)} held-out answers, such as '
                       f'{answers[0][-100:]!r}; give a pattern that matches the part of them that counts')
    made_of = {'source': self.source.fingerprint} if callable(self.tokenizer) else {}
    renew = self.folder is None and dataset.untrained(workdir)
    tokenizer = dataset.open_tokenizer(folder, self.tokenizer, made_of, self._texts, progress,
                                       functools.partial(self._check, check), renew)
    special(tokenizer, control)
    if note := self.template.check(tokenizer):
      progress(note)
    stores = store.build(folder / 'tokens', self.source, self._encoder(tokenizer), (), progress=progress, renew=renew)
    return self._opened(stores, tokenizer, progress)

  def to_store(self) -> 'Dialogues':
    """Returns the data without its records, which opens what `open` wrote, and writes nothing."""
    return dataclasses.replace(self, source=self.source.to_store(), tokenizer=None)

  def _encoder(self, tokenizer: tokenizers.Tokenizer) -> '_RecordEncoder':
    return _RecordEncoder(tokenizer, self.kind, self.template, self.keys)

  def _check(self, check: dataset.Check, tokenizer: tokenizers.Tokenizer) -> None:
    settings = store.settings(self.source, self._encoder(tokenizer), ())
    check(store.fingerprint(settings, 'train'), tokenizer.fingerprint)

  def _reopen(self, folder: pathlib.Path, progress: Callable[[str], Any], control: tuple[str, ...],
              check: dataset.Check) -> 'OpenDialogues':
    tokenizer = dataset.load_tokenizer(folder / 'tokenizer')
    self._check(check, tokenizer)
    special(tokenizer, control)
    return self._opened(store.reopen(folder / 'tokens', self.source, self._encoder(tokenizer), ()), tokenizer, progress)

  def _opened(self, stores: dict[str, store.Store], tokenizer: tokenizers.Tokenizer, progress: Callable[[str], Any]
              ) -> 'OpenDialogues':
    return OpenDialogues(stores, tokenizer, self.kind, self.length, progress, self.allow_left_out, self.longest)

  def load_tokenizer(self, workdir: pathlib.Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer that `open` saved."""
    return dataset.load_tokenizer(self._folder(workdir) / 'tokenizer')

  def verify(self, workdir: pathlib.Path) -> list[str]:
    """See `dataset.verify`."""
    return dataset.verify(self._folder(workdir))

  def questions(self, split: str, count: int) -> list[tuple[messages.Messages, str]]:
    """Returns the first `count` records of a split as (messages before the last answer, that answer).

    The answer is the chosen one of a pair; dialogues that are rated bad are left out.
    """
    questions = []
    for record in itertools.islice(self.source.splits[split], count):
      prompt, answers, good = messages.read(record, self.kind, self.keys)
      dialogue = [*prompt, *answers[0]]
      last = max((i for i, message in enumerate(dialogue) if message['role'] == 'assistant'), default=0)
      if last and good is not False:
        questions.append((dialogue[:last], dialogue[last]['content']))
    return questions

  def _folder(self, workdir: pathlib.Path) -> pathlib.Path:
    return self.folder or workdir / 'data'

  def _texts(self) -> list[str]:
    records = (messages.read(record, self.kind, self.keys) for record in self.source.splits['train'])
    return [message['content'] for record in records for part in (record.prompt, *record.answers)
            for message in part]


@dataclasses.dataclass(frozen=True)
class OpenDialogues:
  """Encoded dialogues, by split."""
  stores: dict[str, store.Store]
  tokenizer: tokenizers.Tokenizer
  kind: type
  length: int
  progress: Callable[[str], Any] = print
  allow_left_out: bool = False
  longest: float = math.inf

  @property
  def fingerprint(self) -> str:
    return self.stores['train'].fingerprint

  @property
  def validation_sets(self) -> tuple[str, ...]:
    """Further held-out sets: those of the splits `validation-NAME`."""
    return tuple(split.removeprefix('validation-') for split in self.stores if split.startswith('validation-'))

  def records(self, split: str) -> 'DialogueStore':
    """The records of a split, or of the validation set `validation/NAME`."""
    return DialogueStore(split, self.stores[split.replace('validation/', 'validation-')], self.kind)

  def batches(self, split: str, objective: ExampleMaker, rows: int, seed: int | None = 0,
              repeat: bool = True) -> Packed:
    """See `Packed`. Raises ValueError if no record fits a row, or the objective needs other data."""
    if objective.needs is not self.kind:
      raise ValueError(f'the objective learns from {KINDS[objective.needs]}, and these are {KINDS[self.kind]}')
    packed = Packed(objective, special(self.tokenizer, objective.control), self.length, rows, seed, repeat,
                    records=self.records(split), longest=self.longest)
    rows_per_epoch = packed.rows_per_epoch
    if packed.left_out:
      share = packed.left_out / len(packed.records)
      line = (f'{split}: {packed.left_out:,} of {len(packed.records):,} records are left out, longer than a row of '
              f'{self.length} positions')
      self.progress(check_left_out(f'{line}; the others fill {rows_per_epoch:,} rows', share, packed.length_advice(),
                                   self.allow_left_out))
    return packed


class DialogueStore:
  """The records of a split. Record i is a `Dialogue`, a `Pair` or a `Rated`; see `partners` for what is mismatched."""

  def __init__(self, split: str, stored: store.Store, kind: type):
    self._split, self._kind = split, kind
    self._tokens, self._offsets = np.asarray(stored.tokens), np.asarray(stored.offsets)
    self._columns = {name: np.asarray(column) for name, column in stored.columns.items()}

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def __getitem__(self, i: int) -> Dialogue | Pair | Rated:
    if not 0 <= i < len(self):
      raise IndexError(f'record {i} of {len(self)}')
    start, end = self._offsets[i], self._offsets[i + 1]
    if self._kind is Dialogue:
      return self._dialogue(slice(start, end))
    second = self._seconds[i]
    if self._kind is Pair:
      return Pair(self._dialogue(slice(start, second)), self._dialogue(slice(second, end)))
    partner = self.partners[i]
    other_answer = slice(self._seconds[partner], self._offsets[partner + 1])
    return Rated(self._dialogue(slice(start, end)), bool(self._columns['good'][i]),
                 self._dialogue(slice(start, second), other_answer))

  def _dialogue(self, *spans: slice) -> Dialogue:
    """The dialogue that consists of these spans of the split's tokens."""
    join = lambda values: np.concatenate([values[span] for span in spans])
    return Dialogue(join(self._tokens).astype(np.int32), join(self._columns['loss_mask']))

  @functools.cached_property
  def _seconds(self) -> np.ndarray:
    """[n]: where the second part of each record begins in the split's tokens."""
    return self._offsets[:-1] + self._columns['second']

  @functools.cached_property
  def positions(self) -> np.ndarray:
    """[n]: the positions that an example of each record takes, one less per dialogue than it has tokens."""
    sizes = np.diff(self._offsets)
    if self._kind is Dialogue:
      return sizes - 1
    if self._kind is Pair:
      return sizes - 2
    answers = sizes - self._columns['second']
    return sizes - answers + sizes + answers[self.partners] - 2

  @functools.cached_property
  def partners(self) -> np.ndarray:
    """[n]: for each rated record, the number of a record with another prompt, taken in turn from those that follow it.

    Raises ValueError if all prompts are the same.
    """
    numbers: dict[bytes, int] = {}
    spans = zip(self._offsets, self._seconds)
    prompts = np.array([numbers.setdefault(self._tokens[a:b].tobytes(), len(numbers)) for a, b in spans], int)
    starts = np.flatnonzero(prompts != np.roll(prompts, 1))   # of runs of records with the same prompt
    if not len(starts):
      raise ValueError(f'{self._split}: all of its {len(self)} rated records have the same prompt, and each is '
                       'compared with an answer to another; give, or hold out, records of at least two prompts')
    sizes, records = np.diff(starts, append=starts[0] + len(self)), np.arange(len(self))
    run = np.searchsorted(starts, records, 'right') - 1   # -1: the last run, which continues at the beginning
    following = (run + 1) % len(starts)
    place = (records - starts[run]) % len(self)
    return (starts[following] + place % sizes[following]) % len(self)


@dataclasses.dataclass(frozen=True)
class _RecordEncoder:
  """A `store.Encoder` of JSON records."""
  tokenizer: tokenizers.Tokenizer
  kind: type
  template: conversation.Template
  keys: messages.Keys

  has_sizes = False   # nothing counts the bytes of a JSON record

  @property
  def vocab_size(self) -> int:
    return self.tokenizer.vocab_size

  @property
  def columns(self) -> Mapping[str, Column]:
    columns = {'loss_mask': Column(np.dtype(bool), 'token')}
    if self.kind is not Dialogue:
      columns['second'] = Column(np.dtype(np.int64), 'document')
    if self.kind is Rated:
      columns['good'] = Column(np.dtype(bool), 'document')
    return columns

  @property
  def fingerprint(self) -> str:
    facts = [self.tokenizer.fingerprint, self.kind.__name__, describe(self.template), describe(self.keys),
             self.tokenizer.adds_bos, list(self.columns)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

  def encode(self, documents: Sequence[str]) -> list[Encoded]:
    return [self._record(record) for record in documents]

  def _record(self, record: str) -> Encoded:
    """A record with a dialogue that has nothing to learn has no tokens, so that the store drops it."""
    prompt, answers, good = messages.read(record, self.kind, self.keys)
    try:
      parts = [self.template.encode(self.tokenizer, [*prompt, *answer], first=len(prompt)) for answer in answers]
    except ValueError as error:
      raise ValueError(f'{error}; in the record {record[:200]}') from None
    if not all(mask.any() for _, mask in parts):
      return Encoded(np.zeros(0, np.int32))
    tokens, mask = (np.concatenate(arrays) for arrays in zip(*parts))
    columns = {'loss_mask': mask}
    if self.kind is Pair:
      columns['second'] = np.int64(len(parts[0][0]))
    if self.kind is Rated:
      columns |= {'second': np.int64(mask.argmax()), 'good': np.bool_(good)}
    return Encoded(tokens, columns)
