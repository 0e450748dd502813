"""Flags of a tokenizer that is trained, or read from a file."""
import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

from lm.data import tokenizers
from lm.options.usage import given


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Tokenizer.

  Args:
    tokenizer_kind: of the tokenizer that is trained; by default bpe. Bytes are not trained.
    tokenizer_file: use this .model or tokenizer.json rather than training a tokenizer.
    vocab: tokens of the tokenizer that is trained, and of the model.
    character_coverage: share of the text whose characters have a token each, from 0.98 to 1, by default 0.9995; rarer
      ones are spelled in bytes. Lower it for Chinese text and a small vocabulary.
  """
  tokenizer_kind: Literal['bpe', 'unigram', 'bytes'] | None = None
  tokenizer_file: str | None = None
  vocab: int | None = None
  character_coverage: float | None = None

  def __post_init__(self):
    if self.vocab is not None and self.vocab < 1:
      raise ValueError(f'--vocab={self.vocab} is not positive; leave it out, or give it 1 at least')
    if self.character_coverage is not None and (self.tokenizer_file or self.tokenizer_kind == 'bytes'):
      raise ValueError(f'--character_coverage={self.character_coverage} is for a tokenizer that is trained; leave it '
                       'out')

  def tokenizer(self, vocab: int, control: tuple[str, ...] = (), kind: Literal['bpe', 'unigram'] | None = None
                ) -> tokenizers.Tokenizer | tokenizers.InFile | Callable[..., tokenizers.Tokenizer]:
    """A tokenizer, or its file, or a function that trains one of `vocab` tokens on documents.

    It has room for the `control` tokens beside those that every tokenizer has. `kind` is what is written down of a
    tokenizer whose kind no flag gives, which is bpe.
    """
    names = [name for name in control if name not in tokenizers.CONTROL]
    options = {'control': (*tokenizers.CONTROL, *names)} if names else {}
    if self.tokenizer_file:
      return tokenizers.InFile(self.tokenizer_file)
    if self.tokenizer_kind == 'bytes':
      return tokenizers.Bytes(**options)
    if chosen := self.tokenizer_kind or kind:
      options['kind'] = chosen
    if self.character_coverage is not None:
      options['character_coverage'] = self.character_coverage
    return functools.partial(tokenizers.train_sentencepiece, vocab=vocab, **options)

  def given(self) -> dict[str, object]:
    """The flags that are given, by name."""
    return given(self)
