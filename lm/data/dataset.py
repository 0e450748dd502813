"""A corpus with a tokenizer: from documents to batches."""
import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from lm.data import clean, store, tokenizer
from lm.data.batches import Batches, Example
from lm.data.source import Source


@dataclasses.dataclass(frozen=True)
class Text:
  """Text to train on; `open` makes what is missing and opens the rest.

  Args:
    source: the documents.
    tokenizer: one, or a function that trains one on the cleaned training documents.
    length: T, positions a row.
    rules: cleaning, see `clean`.
    folder: where the tokenizer and the tokenised text are kept; None: in the workdir.
  """
  source: Source
  tokenizer: tokenizer.Tokenizer | Callable[[Iterable[str]], tokenizer.Tokenizer]
  length: int
  rules: Sequence[clean.Rule] = clean.DEFAULT
  folder: pathlib.Path | None = None

  def open(self, workdir: pathlib.Path, progress: Callable[[str], Any] = print) -> 'Opened':
    """Trains the tokenizer and tokenises, unless that is done.

    Raises ValueError if the folder has something of other settings, or the text is empty; OSError if it cannot be
    written.
    """
    folder = self.folder or workdir / 'data'
    found = self._tokenizer(folder / 'tokenizer', progress)
    stores = store.build(folder / 'tokens', self.source, found, self.rules, progress=progress)
    return Opened(stores, found, self.length)

  def _tokenizer(self, folder: pathlib.Path, progress) -> tokenizer.Tokenizer:
    if not callable(self.tokenizer):
      self.tokenizer.save(folder)
      return self.tokenizer
    if not (folder / 'done').exists():
      progress('training the tokenizer')
      documents = clean.clean(self.source.splits['train'], self.rules)
      made = self.tokenizer([d for d in documents if isinstance(d, str)])
      made.save(folder)
      (folder / 'done').write_text('')
    return tokenizer.load(folder)


@dataclasses.dataclass(frozen=True)
class Opened:
  """Tokenised text, by split."""
  stores: dict[str, store.Store]
  tokenizer: tokenizer.Tokenizer
  length: int

  @property
  def fingerprint(self) -> str:
    return self.stores['train'].fingerprint

  def batches(self, split: str, example: Callable[..., Example], rows: int, seed: int | None = 0,
              repeat: bool = True) -> Batches:
    return Batches(self.stores[split], example, self.length, rows, self.tokenizer.bos_id, self.tokenizer.eos_id, seed,
                   repeat)
