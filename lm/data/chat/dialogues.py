"""Dialogues, pairs and rated dialogues to train on: records of JSON, once made tokens, then packed into rows.

The tokens lie in a `store.Store`, which knows of none of this: `_Encoder` looks to it like a tokenizer, of which a
document is the JSON of a record, and an id is 2 * token + asked, or stands between the two parts of a record.
"""
import dataclasses
import functools
import hashlib
import itertools
import json
import pathlib
import re
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lm.data import dataset, store, tokenizers
from lm.data.batch import KINDS, Dialogue, ExampleMaker, Pair, Rated, special
from lm.data.chat import conversation, messages
from lm.data.rows.packing import Packed
from lm.data.text.source import Source
from lm.workdir.describe import describe


@dataclasses.dataclass(frozen=True)
class Dialogues:
  """Dialogues (`kind=Dialogue`), pairs of a preferred and another one (`Pair`), or rated ones (`Rated`).

  A dialogue begins as its template writes it. Asked is what the assistant says, with the token that ends it: all that
  it says, or only the answer where a prompt is given by itself. A record longer than a row is left out, and a line
  tells how many.

  Args:
    source: records of JSON, in one of the shapes of `messages`.
    tokenizer: one, or a function that trains one on what is said in the training records.
    length: T, positions a row.
    kind: what a record holds.
    template: how messages become tokens.
    keys: how the fields are named.
    folder: where the tokenizer and the tokens are kept; None: in the workdir.
    allow_left_out: whether training may go on where half of the records or more are left out.
    answer: a regular expression with one group, which finds what counts of an answer, see `essence`; None: all of it.

  Raises ValueError where `answer` is none with one group.
  """
  source: Source
  tokenizer: tokenizers.Tokenizer | Callable[[Iterable[str]], tokenizers.Tokenizer]
  length: int
  kind: type = Dialogue
  template: conversation.Template = conversation.Turns()
  keys: messages.Keys = messages.Keys()
  folder: pathlib.Path | None = None
  allow_left_out: bool = dataclasses.field(default=False, compare=False)
  answer: str | None = dataclasses.field(default=None, compare=False)

  source_length = None
  columns = types.MappingProxyType({})

  def __post_init__(self):
    if self.answer is None:
      return
    try:
      groups = re.compile(self.answer).groups
    except re.error as error:
      raise ValueError(f'--answer={self.answer} is no regular expression: {error}') from None
    if groups != 1:
      raise ValueError(f'--answer={self.answer} has {groups} groups; put parentheses around what counts, and only '
                       "there, as in '#### (.*)'; (?:...) is no group")

  def essence(self, answer: str) -> str | None:
    """What counts of an answer: what `self.answer` finds first, without spaces around it; None if it finds nothing."""
    if self.answer is None:
      return answer
    match = re.search(self.answer, answer)
    return match[1].strip() if match and match[1] is not None else None

  def open(self, workdir: pathlib.Path, progress: Callable[[str], Any] = print, control: tuple[str, ...] = (),
           check: dataset.Check = dataset.unchecked) -> 'OpenDialogues':
    """Trains the tokenizer and makes tokens, unless that is done. `control` names tokens that the objective needs.

    Raises ValueError if the folder has something of other settings, a record is of another shape, `self.answer` finds
    nothing, or the tokenizer lacks a control token; OSError if it cannot be written.
    """
    folder = self._folder(workdir)
    answers = [answer for _, answer in self.questions('validation', 100)] if self.answer else []
    if answers and all(self.essence(answer) is None for answer in answers):
      raise ValueError(f'--answer={self.answer} finds nothing in the first {len(answers)} held-out answers, such as '
                       f'{answers[0][-100:]!r}; give a pattern that finds what counts in them')
    made_of = {'source': self.source.fingerprint} if callable(self.tokenizer) else {}
    renew = self.folder is None and dataset.untrained(workdir)
    encoder_of = lambda tokens: _Encoder(tokens, self.kind, self.template, self.keys)
    found = dataset.open_tokenizer(folder, self.tokenizer, made_of, self._texts, progress, lambda tokens: check(
        store.fingerprint(store.settings(self.source, encoder_of(tokens), ()), 'train'), tokens.fingerprint), renew)
    special(found, control)
    if note := self.template.check(found):
      progress(note)
    encoder = encoder_of(found)
    stores = store.build(folder / 'tokens', self.source, encoder, (), progress=progress, renew=renew)
    return OpenDialogues(stores, found, self.kind, self.length, progress, self.allow_left_out)

  def load_tokenizer(self, workdir: pathlib.Path) -> tokenizers.Tokenizer:
    """The tokenizer that `open` made."""
    return dataset.load_tokenizer(self._folder(workdir) / 'tokenizer')

  def verify(self, workdir: pathlib.Path) -> list[str]:
    """See `dataset.verify`."""
    return dataset.verify(self._folder(workdir))

  def questions(self, split: str, count: int) -> list[tuple[messages.Messages, str]]:
    """The first records of a split but for their answers, and these (chosen, or good), to see what a model says."""
    found = []
    for record in itertools.islice(self.source.splits[split], count):
      prompt, answers, good = messages.read(record, self.kind, self.keys)
      said = [*prompt, *answers[0]]
      last = max((i for i, message in enumerate(said) if message['role'] == 'assistant'), default=0)
      if last and good is not False:
        found.append((said[:last], said[last]['content']))
    return found

  def _folder(self, workdir: pathlib.Path) -> pathlib.Path:
    return self.folder or workdir / 'data'

  def _texts(self) -> list[str]:
    records = (messages.read(record, self.kind, self.keys) for record in self.source.splits['train'])
    return [message['content'] for record in records for part in (record.prompt, *record.answers)
            for message in part]


@dataclasses.dataclass(frozen=True)
class OpenDialogues:
  """Dialogues as tokens, by split."""
  stores: dict[str, store.Store]
  tokenizer: tokenizers.Tokenizer
  kind: type
  length: int
  progress: Callable[[str], Any] = print
  allow_left_out: bool = False

  @property
  def fingerprint(self) -> str:
    return self.stores['train'].fingerprint

  def records(self, split: str) -> 'DialogueStore':
    return DialogueStore(split, self.stores[split], self.kind, self.tokenizer.vocab_size)

  def batches(self, split: str, objective: ExampleMaker, rows: int, seed: int | None = 0,
              repeat: bool = True) -> Packed:
    """See `Packed`. ValueError where no record fits a row, or the objective needs other data."""
    if objective.needs is not self.kind:
      raise ValueError(f'the objective learns from {KINDS[objective.needs]}, and these are {KINDS[self.kind]}')
    packed = Packed(objective, special(self.tokenizer, objective.control), self.length, rows, seed, repeat,
                    records=self.records(split))
    rows_per_epoch = packed.rows_per_epoch
    if packed.left_out:
      share = packed.left_out / len(packed.records)
      line = (f'{split}: {packed.left_out:,} of {len(packed.records):,} records are left out, longer than a row of '
              f'{self.length} positions')
      lengths = f'--length={packed.length_for(0.9)} keeps 90 % of them, --length={packed.length_for(0.99)} keeps 99 %'
      if share >= 0.5 and not self.allow_left_out:
        raise ValueError(f'{line}; {lengths}. To train on the few that fit, give --allow_left_out')
      line = f'{line}; the others fill {rows_per_epoch:,} rows'
      self.progress(f'warning: {line}; {lengths}' if share >= 0.1 else line)
    return packed


class DialogueStore:
  """The records of a store: number i is a `Dialogue`, a `Pair` or a `Rated`, mismatched as `partners` says."""

  def __init__(self, split: str, stored: store.Store, kind: type, vocab: int):
    self._split = split
    self._tokens, self._offsets = np.asarray(stored.tokens), np.asarray(stored.offsets)
    self._kind, self._vocab = kind, vocab

  def __len__(self) -> int:
    return len(self._offsets) - 1

  def __getitem__(self, i: int) -> Dialogue | Pair | Rated:
    if not 0 <= i < len(self):
      raise IndexError(f'record {i} of {len(self)}')
    start, end = self._offsets[i], self._offsets[i + 1]
    if self._kind is Dialogue:
      return _dialogue(self._tokens[start:end])
    mark = self._marks[i]
    first, second = self._tokens[start:mark], self._tokens[mark + 1:end]
    if self._kind is Pair:
      return Pair(_dialogue(first), _dialogue(second))
    partner = self.partners[i]
    other = self._tokens[self._marks[partner] + 1:self._offsets[partner + 1]]
    good = bool(self._tokens[mark] - 2 * self._vocab)
    return Rated(_dialogue(np.concatenate([first, second])), good, _dialogue(np.concatenate([first, other])))

  @functools.cached_property
  def _marks(self) -> np.ndarray:
    """Of each record, where what stands between its two parts is."""
    return np.flatnonzero(self._tokens >= 2 * self._vocab)

  @functools.cached_property
  def positions(self) -> np.ndarray:
    """What an example of each takes: the tokens of its dialogues, less one of each."""
    sizes = np.diff(self._offsets)
    if self._kind is Dialogue:
      return sizes - 1
    if self._kind is Pair:
      return sizes - 3
    prompts = self._marks - self._offsets[:-1]
    answers = sizes - prompts - 1
    return 2 * prompts + answers + answers[self.partners] - 2

  @functools.cached_property
  def partners(self) -> np.ndarray:
    """Of each rated record, the number of one with another prompt: of those that follow, in turn.

    ValueError where all prompts are the same.
    """
    numbers: dict[bytes, int] = {}
    spans = zip(self._offsets, self._marks)
    prompts = np.array([numbers.setdefault(self._tokens[a:b].tobytes(), len(numbers)) for a, b in spans], int)
    starts = np.flatnonzero(prompts != np.roll(prompts, 1))   # of runs of records with the same prompt
    if not len(starts):
      raise ValueError(f'{self._split}: all of its {len(self)} rated records have the same prompt, and each is '
                       'compared with an answer to another; give, or hold out, records of two prompts at least')
    sizes, records = np.diff(starts, append=starts[0] + len(self)), np.arange(len(self))
    run = np.searchsorted(starts, records, 'right') - 1   # -1, the last, goes on at the beginning
    following = (run + 1) % len(starts)
    place = (records - starts[run]) % len(self)
    return (starts[following] + place % sizes[following]) % len(self)


def _dialogue(values: np.ndarray) -> Dialogue:
  return Dialogue((values >> 1).astype(np.int32), (values & 1).astype(bool))


@dataclasses.dataclass(frozen=True)
class _Encoder:
  """Records of JSON to ints. Of a `Rated`, the two parts are the prompt and the answer."""
  tokenizer: tokenizers.Tokenizer
  kind: type
  template: conversation.Template
  keys: messages.Keys

  lossless = True   # nobody counts the bytes of its documents, which are JSON

  @property
  def vocab_size(self) -> int:
    return 2 * self.tokenizer.vocab_size + 2   # the last two stand between parts, before what is bad, or good

  @property
  def fingerprint(self) -> str:
    facts = [self.tokenizer.fingerprint, self.kind.__name__, describe(self.template), describe(self.keys),
             *([] if self.tokenizer.adds_bos else ['no bos']),
             *(['mismatched of another prompt'] if self.kind is Rated else [])]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]

  def encode_batch(self, records: Sequence[str]) -> list[np.ndarray]:
    """Of a record in which nothing is asked, nothing: it is dropped."""
    return [self._record(record) for record in records]

  def _record(self, record: str) -> np.ndarray:
    prompt, answers, good = messages.read(record, self.kind, self.keys)
    try:
      made = [self._made(prompt, answer) for answer in answers]
    except ValueError as error:
      raise ValueError(f'{error}; in the record {record[:200]}') from None
    if not all((values & 1).any() for values in made):
      return np.zeros(0, np.int32)
    if self.kind is Dialogue:
      return made[0]
    mark = [2 * self.tokenizer.vocab_size + bool(good)]
    if self.kind is Rated:
      first = int((made[0] & 1).argmax())
      made = [made[0][:first], made[0][first:]]
    return np.concatenate([made[0], mark, made[1]])

  def _made(self, prompt: messages.Messages, answer: messages.Messages) -> np.ndarray:
    ids, asked = self.template.encode(self.tokenizer, [*prompt, *answer], first=len(prompt))
    return 2 * ids + asked
