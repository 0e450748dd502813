"""A data set of ratings: candidates with references, encoded in memory and packed into rows."""
import dataclasses
import functools
import hashlib
import pathlib
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from lm.data import dataset, stored_tokenizer, tokenizers
from lm.data.batch import KINDS, ExampleMaker, RatedPair, special
from lm.data.chat.messages import Messages
from lm.data.rows.packed_records import Packed, check_left_out
from lm.data.text import rating_records
from lm.data.text.source import Source


class Pairs(Sequence[RatedPair]):
  """Encoded ratings. `positions` are the tokens of each candidate with its longest reference."""

  def __init__(self, records: Sequence[rating_records.Rating], tokenizer: tokenizers.Tokenizer):
    texts = list(dict.fromkeys(text for record in records for text in (record.candidate, *record.references)))
    encoded = dict(zip(texts, tokenizer.encode_batch(texts)))
    self._pairs = [RatedPair(tuple(encoded[text] for text in record.references), encoded[record.candidate],
                             record.rating) for record in records]
    self.positions = np.array([max(map(len, pair.references)) + len(pair.candidate) for pair in self._pairs], int)

  def __len__(self) -> int:
    return len(self._pairs)

  def __getitem__(self, i: int) -> RatedPair:
    return self._pairs[i]


@dataclasses.dataclass(frozen=True)
class RatedPairs:
  """Ratings of candidates, as `lm.data.text.rating_records` reads them. Records longer than a row are left out.

  Args:
    source: the records.
    tokenizer: a tokenizer, or a function that trains one on the texts of the training records; None: the tokenizer in
      the workdir, of a run that is only opened.
    length: T, positions per row.
  """
  source: Source
  tokenizer: tokenizers.Tokenizer | Callable[[Iterable[str]], tokenizers.Tokenizer] | None
  length: int

  kind = RatedPair
  source_length = template = None
  columns = inputs = types.MappingProxyType({})

  @property
  def text_fingerprint(self) -> str:
    """See `dataset.Text.text_fingerprint`."""
    return self.source.fingerprint

  def questions(self, split: str, count: int) -> list[tuple[Messages, str]]:
    """Returns no questions, because ratings have none."""
    del split, count
    return []

  def open(self, workdir: pathlib.Path, progress: Callable[[str], Any] = print, control: tuple[str, ...] = (),
           check: dataset.Check = dataset.unchecked) -> 'OpenRatedPairs':
    """Trains the tokenizer, unless the folder has it, and encodes the records.

    Args: as of `dataset.Text.open`.

    Raises ValueError if a record is no rating, if the tokenizer lacks a control token, or if the run was opened
    without its script: the records are not stored.
    """
    if self.tokenizer is None:
      raise ValueError(f'{workdir}: the ratings of this run are not stored in it; open it with its script, '
                       'experiments/learned_metric.py')

    def check_tokenizer(tokenizer):
      check(self._fingerprint(tokenizer), tokenizer.fingerprint)
    training_data = {'source': self.source.fingerprint} if callable(self.tokenizer) else {}
    tokenizer = stored_tokenizer.prepare(workdir / 'data', self.tokenizer, training_data, self._texts, progress,
                                         check_tokenizer, dataset.untrained(workdir))
    special(tokenizer, control)
    stores = {split: Pairs(list(map(rating_records.read, records)), tokenizer)
              for split, records in self.source.splits.items()}
    return OpenRatedPairs(stores, tokenizer, self.length, self._fingerprint(tokenizer), progress)

  def to_store(self) -> 'RatedPairs':
    """Returns the data without its records."""
    return dataclasses.replace(self, source=self.source.to_store(), tokenizer=None)

  def load_tokenizer(self, workdir: pathlib.Path) -> tokenizers.Tokenizer:
    """Returns the tokenizer that `open` stored."""
    return stored_tokenizer.load(workdir / 'data' / 'tokenizer')

  def verify(self, workdir: pathlib.Path) -> list[str]:
    """Returns no faults beyond those of the tokenizer, which opening finds: nothing else is stored."""
    self.load_tokenizer(workdir)
    return []

  def _fingerprint(self, tokenizer: tokenizers.Tokenizer) -> str:
    return hashlib.sha256(repr(('ratings', self.source.fingerprint, tokenizer.fingerprint)).encode()).hexdigest()[:16]

  def _texts(self) -> list[str]:
    records = map(rating_records.read, self.source.splits['train'])
    return [text for record in records for text in (record.candidate, *record.references)]


@dataclasses.dataclass(frozen=True)
class OpenRatedPairs:
  """Encoded ratings, by split."""
  stores: dict[str, Pairs]
  tokenizer: tokenizers.Tokenizer
  length: int
  fingerprint: str
  progress: Callable[[str], Any] = print

  @functools.cached_property
  def validation_sets(self) -> tuple[str, ...]:
    """Names of further held-out sets: the splits `validation-NAME`."""
    return tuple(split.removeprefix('validation-') for split in self.stores if split.startswith('validation-'))

  def batches(self, split: str, objective: ExampleMaker, rows: int, seed: int | None = 0, repeat: bool = True
              ) -> Packed:
    """Returns the batches of a split; see `Packed` for the arguments.

    Raises ValueError if the objective needs other data, no record fits a row, or half of them or more do not.
    """
    if objective.needs is not RatedPair:
      raise ValueError(f'the objective learns from {KINDS[objective.needs]}, and the data has {KINDS[RatedPair]}; '
                       'choose another objective, or other data')
    pairs = self.stores[split.replace('validation/', 'validation-')]
    packed = Packed(objective, special(self.tokenizer, objective.control), self.length, rows, seed, repeat,
                    records=pairs)
    if packed.left_out:
      line = f'{split}: {packed.left_out:,} of {len(pairs):,} ratings are longer than a row of {self.length} positions'
      self.progress(check_left_out(line, packed.left_out / len(pairs), packed.length_advice(), False))
    return packed
