"""Data sets of dialogues, pairs and rated dialogues: JSON records, encoded once, then packed into rows."""
import dataclasses
import functools
import itertools
import math
import pathlib
import re
import types
from collections.abc import Callable, Iterable
from typing import Any

from lm.data import dataset, store, stored_tokenizer, tokenizers
from lm.data.batch import KINDS, Dialogue, ExampleMaker, special
from lm.data.chat import conversation, messages
from lm.data.chat.encoded_records import DialogueStore, RecordEncoder
from lm.data.rows.packed_records import Packed, check_left_out
from lm.data.text.source import Source


@dataclasses.dataclass(frozen=True)
class Dialogues:
  """Dialogues (`kind=Dialogue`), pairs of a preferred and a rejected dialogue (`Pair`), or rated dialogues (`Rated`).

  A dialogue begins as its template writes it. The model learns to write the assistant's messages, each with the token
  that ends it; if the record has a prompt of its own, only the answer to it. Records longer than a row are left out,
  and their number is printed.

  Args:
    source: JSON records, in one of the shapes of `messages`.
    tokenizer: a tokenizer, or a function that trains one on the messages of the training records; None: the tokenizer
      in the folder, and the stored records are only opened, see `to_store`.
    length: T, positions per row.
    kind: what a record holds.
    template: how messages become tokens.
    keys: the names of the fields.
    folder: where the tokenizer and the tokens are stored; None: in the workdir.
    allow_left_out: whether to train if half of the records or more are left out.
    longest: the length of the longest row that the model reads; no longer row is recommended.
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
    """Trains the tokenizer and encodes the records, unless the folder has both, and opens the result.

    Args: as of `dataset.Text.open`.

    Raises:
      ValueError: the folder has data of other settings, a record has another shape, `self.answer` never matches, or the
        tokenizer lacks a control token.
      OSError: the folder cannot be written.
    """
    folder = self._folder(workdir)
    if self.tokenizer is None:
      return self._reopen(folder, progress, control, check)
    answers = [answer for _, answer in self.questions('validation', 100)] if self.answer else []
    if answers and all(self.essence(answer) is None for answer in answers):
      raise ValueError(f'--answer={self.answer} finds nothing in the first {len(answers)} held-out answers, such as '
                       f'{answers[0][-100:]!r}; give a pattern that matches the part of them that counts')
    training_data = {'source': self.source.fingerprint} if callable(self.tokenizer) else {}
    renew = self.folder is None and dataset.untrained(workdir)
    tokenizer = stored_tokenizer.prepare(folder, self.tokenizer, training_data, self._texts, progress,
                                         functools.partial(self._check, check), renew)
    special(tokenizer, control)
    if note := self.template.check(tokenizer):
      progress(note)
    stores = store.build(folder / 'tokens', self.source, self._encoder(tokenizer), (), progress=progress, renew=renew)
    return self._open_dialogues(stores, tokenizer, progress)

  def to_store(self) -> 'Dialogues':
    """Returns the data without its records, which only opens what `open` wrote."""
    return dataclasses.replace(self, source=self.source.to_store(), tokenizer=None)

  def _encoder(self, tokenizer: tokenizers.Tokenizer) -> RecordEncoder:
    return RecordEncoder(tokenizer, self.kind, self.template, self.keys)

  def _check(self, check: dataset.Check, tokenizer: tokenizers.Tokenizer) -> None:
    settings = store.settings(self.source, self._encoder(tokenizer), ())
    check(store.fingerprint(settings, 'train'), tokenizer.fingerprint)

  def _reopen(self, folder: pathlib.Path, progress: Callable[[str], Any], control: tuple[str, ...],
              check: dataset.Check) -> 'OpenDialogues':
    tokenizer = stored_tokenizer.load(folder / 'tokenizer')
    self._check(check, tokenizer)
    special(tokenizer, control)
    stores = store.reopen(folder / 'tokens', self.source, self._encoder(tokenizer), ())
    return self._open_dialogues(stores, tokenizer, progress)

  def _open_dialogues(self, stores: dict[str, store.Store], tokenizer: tokenizers.Tokenizer,
                      progress: Callable[[str], Any]) -> 'OpenDialogues':
    return OpenDialogues(stores, tokenizer, self.kind, self.length, progress, self.allow_left_out, self.longest)

  def load_tokenizer(self, workdir: pathlib.Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer that `open` stored."""
    return stored_tokenizer.load(self._folder(workdir) / 'tokenizer')

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
    """Returns the content of each message in the training records."""
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
    """Names of further held-out sets: the splits `validation-NAME`."""
    return tuple(split.removeprefix('validation-') for split in self.stores if split.startswith('validation-'))

  def records(self, split: str) -> 'DialogueStore':
    """Returns the records of a split, or of the validation set `validation/NAME`."""
    return DialogueStore(split, self.stores[split.replace('validation/', 'validation-')], self.kind)

  def batches(self, split: str, objective: ExampleMaker, rows: int, seed: int | None = 0,
              repeat: bool = True) -> Packed:
    """Returns the batches of a split; see `Packed` for the arguments.

    Raises ValueError if no record fits a row, too many are left out, or the objective needs other data.
    """
    if objective.needs is not self.kind:
      raise ValueError(f'the objective learns from {KINDS[objective.needs]}, and the data has {KINDS[self.kind]}; '
                       'choose another objective, or other data')
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
