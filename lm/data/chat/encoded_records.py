"""Records as tokens: how JSON records are encoded, and how `Dialogue`, `Pair` and `Rated` are read back.

A `store.Store` keeps the tokens of a record, with these columns beside them:

  loss_mask   bool per token: whether the model learns to write it
  second      int64 per record: where the second dialogue of a pair begins, or the answer of a rated dialogue
  good        bool per record: the rating of a rated dialogue
"""
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence

import numpy as np

from lm.data import tokenizers
from lm.data.batch import Dialogue, Pair, Rated
from lm.data.chat import conversation, messages
from lm.data.encoding import Column, Encoded
from lm.data.store_reader import Store
from lm.workdir.describe import describe


@dataclasses.dataclass(frozen=True)
class RecordEncoder:
  """Encodes JSON records, as an `encoding.Encoder`."""
  tokenizer: tokenizers.Tokenizer
  kind: type
  template: conversation.Template
  keys: messages.Keys

  has_sizes = False   # bits per byte are not computed of records

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
    return [self._encoded(record) for record in documents]

  def _encoded(self, record: str) -> Encoded:
    """Returns the encoded record, or no tokens if one of its dialogues has nothing to learn: the store then drops it.

    Raises ValueError, with the record, if it has another shape or its template fails.
    """
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


class DialogueStore:
  """The records of a split: record i is a `Dialogue`, a `Pair`, or a `Rated` with the answer of its partner."""

  def __init__(self, split: str, stored: Store, kind: type):
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
    """Returns the dialogue that consists of these spans of the split's tokens."""
    join = lambda values: np.concatenate([values[span] for span in spans])
    return Dialogue(join(self._tokens).astype(np.int32), join(self._columns['loss_mask']))

  @functools.cached_property
  def _seconds(self) -> np.ndarray:
    """The places in the split's tokens where the second part of each record begins, [n]."""
    return self._offsets[:-1] + self._columns['second']

  @functools.cached_property
  def positions(self) -> np.ndarray:
    """The numbers of positions of the examples of all records, [n]: one less per dialogue than it has tokens."""
    sizes = np.diff(self._offsets)
    if self._kind is Dialogue:
      return sizes - 1
    if self._kind is Pair:
      return sizes - 2
    answers = sizes - self._columns['second']
    return sizes - answers + sizes + answers[self.partners] - 2

  @functools.cached_property
  def partners(self) -> np.ndarray:
    """The partners of rated records, [n]: for each, the number of a record with another prompt, which follows it.

    Records of one prompt, in a row, have the records of the next prompt as partners, in turn. Raises ValueError if all
    prompts are the same.
    """
    numbers: dict[bytes, int] = {}
    spans = zip(self._offsets, self._seconds)
    prompts = np.array([numbers.setdefault(self._tokens[a:b].tobytes(), len(numbers)) for a, b in spans], int)
    starts = np.flatnonzero(prompts != np.roll(prompts, 1))   # of runs of records with the same prompt
    if not len(starts):
      raise ValueError(f'{self._split}: all of its {len(self)} rated records have the same prompt, and each is '
                       'compared with an answer to another prompt; give, or hold out, records of at least two prompts')
    sizes, records = np.diff(starts, append=starts[0] + len(self)), np.arange(len(self))
    run = np.searchsorted(starts, records, 'right') - 1   # -1: the last run, which continues at the beginning
    following = (run + 1) % len(starts)
    place = (records - starts[run]) % len(self)
    return (starts[following] + place % sizes[following]) % len(self)
