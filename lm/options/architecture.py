"""Flags of a decoder's shape: numbers one by one, or a published size by name."""
import dataclasses

from lm.models import transformer
from lm.options.computation import Computation
from lm.options.regularisation import Regularisation
from lm.options.sizes import NAMED, Architecture, Name, Size
from lm.options.usage import explicit_values


@dataclasses.dataclass(frozen=True)
class Shape:
  """Shape of the model.

  Args:
    size: name of a published model, whose shape and vocabulary are used; other flags replace its numbers one by one.
    architecture: kind of decoder.
    layers: number of layers.
    width: size of the residual stream.
    heads: number of heads of attention.
    kv_heads: number of heads of keys and values, for llama only; none for as many as --heads.
    head_size: size of each head, for llama only; none for the width divided by the heads.
    hidden: width of the feed-forward layers, for llama only; none for 8/3 of the width.
    tied: whether the output head is the embedding, for llama only.
    qk_norm: whether the queries and the keys of each head are normalised as in Qwen 3, for llama only.
    rope_theta: base of the rotary positions, for llama only; none for 10,000.
  """
  size: Name | None = None
  architecture: Architecture | None = None
  layers: int | None = None
  width: int | None = None
  heads: int | None = None
  kv_heads: int | None = None
  head_size: int | None = None
  hidden: int | None = None
  tied: bool | None = None
  qk_norm: bool | None = None
  rope_theta: float | None = None

  def resolve(self, default: Size) -> Size:
    """Returns the shape: the numbers that flags give, then those of --size, then those of `default`.

    Raises:
      ValueError: a flag is given that the architecture does not have.
    """
    numbers = explicit_values(self)
    size = NAMED[numbers.pop('size')] if self.size else default
    architecture = self.architecture or size.architecture
    if architecture != size.architecture:   # the other numbers belong to the other architecture
      size = Size(architecture, size.layers, size.width, size.heads, vocab=size.vocab)
    for name in ('kv_heads', 'head_size', 'hidden', 'tied', 'qk_norm', 'rope_theta'):
      if architecture == 'gpt2' and name in numbers:
        raise ValueError(f'--{name}={numbers[name]} is for --architecture=llama, and this is gpt2; leave it out')
    return dataclasses.replace(size, **numbers)

  def decoder(self, default: Size, vocab: int, max_length: int, computation: Computation = Computation(),
              regularisation: Regularisation = Regularisation()) -> transformer.Transformer:
    """Returns a decoder; numbers that no flag gives are those of `default`."""
    size = self.resolve(default)
    options = {'max_length': max_length, 'dropout': regularisation.dropout or 0.,
               'embedding_dropout': regularisation.embedding_dropout,
               'attention_dropout': regularisation.attention_dropout or 0.,
               'layer_dropout': regularisation.layer_dropout_of(size.layers)}
    if size.architecture == 'gpt2':
      return computation.apply(transformer.gpt2(vocab, size.width, size.layers, size.heads, **options))
    return computation.apply(transformer.llama(
        vocab, size.width, size.layers, size.heads, kv_heads=size.kv_heads, hidden=size.hidden, theta=size.rope_theta,
        tied=size.tied, head_size=size.head_size, qk_norm=size.qk_norm, **options))

  def refuse(self, default: Size, source: str) -> None:
    """Raises ValueError where flags give another shape than `default`, which `source` gives."""
    if self.resolve(default) != default:
      flags = ' '.join(f'--{name}={value}' for name, value in explicit_values(self).items())
      raise ValueError(f'{source} gives the shape of the model, and {flags} is given too; leave one of them out')

  def explicit_values(self) -> dict[str, object]:
    """Returns the flags that are not None, by name."""
    return explicit_values(self)
