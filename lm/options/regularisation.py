"""Flags against overfitting: dropout, and augmentation of the text of training."""
import dataclasses

from lm.data.rows import augment
from lm.models import stack
from lm.options.usage import explicit_values


@dataclasses.dataclass(frozen=True)
class Regularisation:
  """Regularisation.

  Args:
    dropout: share of the output of each branch of a layer, and of the embedding, that is set to zero.
    embedding_dropout: the same share for the embedding alone; none for that of --dropout.
    attention_dropout: share of the attention probabilities that is set to zero.
    layer_dropout: probability that a layer is skipped in a step.
    stochastic_depth: probability that the last layer is skipped for a row; it grows to that value layer by layer.
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

  def layer_dropout_of(self, layers: int) -> stack.LayerDropout | None:
    """Returns how a number of layers are skipped in training; None where none is."""
    if self.layer_dropout:
      return stack.layer_drop(layers, self.layer_dropout)
    return stack.stochastic_depth(layers, self.stochastic_depth) if self.stochastic_depth else None

  def explicit_values(self) -> dict[str, object]:
    """Returns the flags that are not None, by name."""
    return explicit_values(self)


@dataclasses.dataclass(frozen=True)
class Augmentations:
  """Augmentation of the text of training.

  Args:
    token_dropout: share of the input tokens that <|mask|> replaces; targets stay as they are.
    span_deletion: share of the text of a row that is deleted, in short spans.
    shuffle: share of the rows whose lines are shuffled.
    subword_sampling: share of the merges that bpe skips, or the exponent of a unigram tokenizer's probabilities.
  """
  token_dropout: float = 0.
  span_deletion: float = 0.
  shuffle: float = 0.
  subword_sampling: float = 0.

  def make(self) -> tuple[augment.Augmentation, ...]:
    """Returns the augmentations whose share is not 0; lines are shuffled before their text changes."""
    in_order = ((augment.Shuffle, self.shuffle), (augment.SpanDeletion, self.span_deletion),
                (augment.SubwordSampling, self.subword_sampling), (augment.TokenDropout, self.token_dropout))
    return tuple(augmentation(share) for augmentation, share in in_order if share)
