"""A decoder by the few numbers that experiments choose."""
import dataclasses
from typing import Any, Literal

from lm.models import stack, transformer


@dataclasses.dataclass(frozen=True)
class Shape:
  """The shape of a decoder that is made from nothing. Raises ValueError where layers are left out in two ways."""
  architecture: Literal['llama', 'gpt2'] = 'llama'
  layers: int = 6
  width: int = 384
  heads: int = 6
  kv_heads: int | None = None
  dropout: float = 0.
  embedding_dropout: float | None = None   # None: that of dropout
  attention_dropout: float = 0.
  layer_dropout: float = 0.
  stochastic_depth: float = 0.

  def __post_init__(self):
    if self.layer_dropout and self.stochastic_depth:
      raise ValueError(f'layer_dropout={self.layer_dropout} and stochastic_depth={self.stochastic_depth} both leave '
                       'layers out; give one of them')

  def decoder(self, vocab: int, max_length: int, dtype: Any, remat: Any) -> transformer.Transformer:
    options = {'max_length': max_length, 'dropout': self.dropout, 'embedding_dropout': self.embedding_dropout,
               'attention_dropout': self.attention_dropout, 'dtype': dtype, 'remat': remat}
    if self.layer_dropout:
      options['layer_dropout'] = stack.layer_drop(self.layers, self.layer_dropout)
    if self.stochastic_depth:
      options['layer_dropout'] = stack.stochastic_depth(self.layers, self.stochastic_depth)
    if self.architecture == 'gpt2':
      return transformer.gpt2(vocab, self.width, self.layers, self.heads, **options)
    return transformer.llama(vocab, self.width, self.layers, self.heads, kv_heads=self.kv_heads, **options)
