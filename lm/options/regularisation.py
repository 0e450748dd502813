"""Flags that keep a model from learning its text by heart: dropout, and changes to the text of training."""
import dataclasses

from lm.data.rows import augment
from lm.models import stack
from lm.options.usage import given


@dataclasses.dataclass(frozen=True)
class Regularisation:
  """Regularisation.

  Args:
    dropout: share of what each branch of a layer adds that is zeroed, and of the embedding.
    embedding_dropout: of the embedding; none for that of dropout.
    attention_dropout: of the probabilities of attention.
    layer_dropout: chance of each layer to be left out of a step.
    stochastic_depth: chance of the last layer to be left out of a row; that of others rises to it layer by layer.
  """
  dropout: float | None = None
  embedding_dropout: float | None = None
  attention_dropout: float | None = None
  layer_dropout: float | None = None
  stochastic_depth: float | None = None

  def __post_init__(self):
    if self.layer_dropout and self.stochastic_depth:
      raise ValueError(f'layer_dropout={self.layer_dropout} and stochastic_depth={self.stochastic_depth} both leave '
                       'layers out; give one of them')

  def of_layers(self, layers: int) -> stack.LayerDropout | None:
    """How layers are left out of training; None where none is."""
    if self.layer_dropout:
      return stack.layer_drop(layers, self.layer_dropout)
    return stack.stochastic_depth(layers, self.stochastic_depth) if self.stochastic_depth else None

  def given(self) -> dict[str, object]:
    """The flags that are given, by name."""
    return given(self)


@dataclasses.dataclass(frozen=True)
class Augmentations:
  """Augmentation of the text of training.

  Args:
    token_dropout: share of the tokens that are read of which <|mask|> takes the place, while targets stay.
    span_deletion: share of the text of a row that is cut out, in short spans.
    shuffle: share of the rows' texts whose lines change places.
    subword_sampling: share of the merges that bpe leaves out, or the exponent of a unigram tokenizer's probabilities.
  """
  token_dropout: float = 0.
  span_deletion: float = 0.
  shuffle: float = 0.
  subword_sampling: float = 0.

  def make(self) -> tuple[augment.Augmentation, ...]:
    """Those that are not 0. Lines change places before what is inside of them changes."""
    ordered = ((augment.Shuffle, self.shuffle), (augment.SpanDeletion, self.span_deletion),
               (augment.SubwordSampling, self.subword_sampling), (augment.TokenDropout, self.token_dropout))
    return tuple(make(value) for make, value in ordered if value)
