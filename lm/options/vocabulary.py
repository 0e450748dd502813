"""Flags of a tokenizer that is trained, or read from a file."""
import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

from lm.data import tokenizers
from lm.options.usage import explicit_values


@dataclasses.dataclass(frozen=True)
class Vocabulary:
  """Tokenizer.

  Args:
    tokenizer_kind: kind of the tokenizer that is trained, by default bpe; bytes need no training.
    tokenizer_file: a .model or tokenizer.json to use, in place of training a tokenizer.
    vocab: number of tokens of the tokenizer that is trained, and of the model.
    character_coverage: share of the text whose characters have a token each, from 0.98 to 1, by default 0.9995; rarer
      characters are encoded as bytes. Lower it for Chinese text and a small vocabulary.
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
    """Returns a tokenizer, or its file, or a function that trains one of `vocab` tokens on documents.

    Args:
      vocab: the number of tokens.
      control: names of control tokens that it has beside those of every tokenizer.
      kind: is stored as the kind where no flag gives one; such a tokenizer is of the kind bpe.
    """
    names = [name for name in control if name not in tokenizers.CONTROL]
    options = {'control': (*tokenizers.CONTROL, *names)} if names else {}
    if self.tokenizer_file:
      return tokenizers.InFile(self.tokenizer_file)
    if self.tokenizer_kind == 'bytes':
      return tokenizers.Bytes(**options)
    if self.tokenizer_kind or kind:
      options['kind'] = self.tokenizer_kind or kind
    if self.character_coverage is not None:
      options['character_coverage'] = self.character_coverage
    return functools.partial(tokenizers.train_sentencepiece, vocab=vocab, **options)

  def explicit_values(self) -> dict[str, object]:
    """Returns the flags that are not None, by name."""
    return explicit_values(self)
