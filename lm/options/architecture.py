"""Flags of a decoder's shape: numbers one by one, or a published size by name."""
import dataclasses

from lm.models import transformer
from lm.options.computation import Computation
from lm.options.regularisation import Regularisation
from lm.options.sizes import NAMED, Architecture, Name, Size
from lm.options.usage import given


@dataclasses.dataclass(frozen=True)
class Shape:
  """Shape of the model.

  Args:
    size: the shape and the vocabulary of a published model, whose other flags, where they are given, replace numbers.
    architecture: the kind of decoder.
    layers: how many.
    width: of the residual stream.
    heads: of attention.
    kv_heads: heads of keys and values of llama; none for as many as --heads.
    hidden: width of the feed-forward of llama; none for 8/3 of the width.
    tied: whether the head of llama is the embedding.
    rope_theta: base of the rotary positions of llama; none for 10,000.
  """
  size: Name | None = None
  architecture: Architecture | None = None
  layers: int | None = None
  width: int | None = None
  heads: int | None = None
  kv_heads: int | None = None
  hidden: int | None = None
  tied: bool | None = None
  rope_theta: float | None = None

  def resolved(self, default: Size) -> Size:
    """The numbers that flags give, else those of --size, else those of `default`.

    Raises:
      ValueError: a flag is given that the architecture does not have.
    """
    numbers = given(self)
    size = NAMED[numbers.pop('size')] if self.size else default
    architecture = self.architecture or size.architecture
    if architecture != size.architecture:   # whose other numbers are of another kind
      size = dataclasses.replace(size, kv_heads=None, hidden=None, tied=True, rope_theta=10_000.)
    for name in ('kv_heads', 'hidden', 'tied', 'rope_theta') if architecture == 'gpt2' else ():
      if name in numbers:
        raise ValueError(f'--{name}={numbers[name]} is for --architecture=llama, and this is gpt2; leave it out')
    return dataclasses.replace(size, **numbers)

  def decoder(self, default: Size, vocab: int, max_length: int, computation: Computation = Computation(),
              regularisation: Regularisation = Regularisation()) -> transformer.Transformer:
    """A decoder without parameters. `default` has the numbers that no flag gives."""
    size, rates = self.resolved(default), regularisation
    options = {'max_length': max_length, 'dropout': rates.dropout or 0., 'embedding_dropout': rates.embedding_dropout,
               'attention_dropout': rates.attention_dropout or 0., 'layer_dropout': rates.of_layers(size.layers),
               'dtype': computation.dtype, 'remat': computation.policy}
    if size.architecture == 'gpt2':
      return transformer.gpt2(vocab, size.width, size.layers, size.heads, **options)
    return transformer.llama(vocab, size.width, size.layers, size.heads, kv_heads=size.kv_heads, hidden=size.hidden,
                             theta=size.rope_theta, tied=size.tied, **options)

  def refuse(self, default: Size, source: str) -> None:
    """ValueError where flags give another shape than `default`, and `source` gives the shape already."""
    if self.resolved(default) != default:
      flags = ' '.join(f'--{name}={value}' for name, value in given(self).items())
      raise ValueError(f'{source} gives the shape of the model, and {flags} is given too; leave one of them out')

  def given(self) -> dict[str, object]:
    """The flags that are given, by name."""
    return given(self)
