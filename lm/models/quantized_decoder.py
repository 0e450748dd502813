"""A decoder whose products with weights have factors of 8 bits, in training, scoring and generation."""
import dataclasses
from typing import Any

import flax.linen as nn

from lm.models import moe
from lm.models.rounding import INT8, Rounding, rounded
from lm.models.transformer import Transformer


class Quantized(Transformer):
  """A decoder that rounds the factors of all products with weights in its blocks to the dtypes of `rounding`.

  Stored weights are float32, as are norms, the softmax of attention, the loss and the products with the head.
  """
  rounding: Rounding = INT8

  def _blocks(self, *args: Any) -> Any:
    with rounded(self.rounding):
      return super()._blocks(*args)


def quantized(model: Any, rounding: Rounding) -> Quantized:
  """Returns a decoder with rounding.

  Raises:
    ValueError: the model is not a plain decoder, or has experts, whose products are not rounded.
    ImportError: Qwix is missing; the message says what to install.
  """
  rounding.check()
  if type(model) not in (Transformer, Quantized):
    raise ValueError(f'a model of class {type(model).__name__} cannot multiply in 8 bits; take --precision=bfloat16')
  if any(isinstance(getattr(block, 'feed_forward', None), moe.Experts) for block in model.layers):
    raise ValueError('experts cannot be multiplied in 8 bits; take --precision=bfloat16')
  return Quantized(**{**_fields(model), 'rounding': rounding})


def exact(model: Any) -> Any:
  """Returns the model without rounding."""
  if not isinstance(model, Quantized):
    return model
  return Transformer(**{name: value for name, value in _fields(model).items() if name != 'rounding'})


def _fields(model: nn.Module) -> dict[str, Any]:
  return {f.name: getattr(model, f.name) for f in dataclasses.fields(model) if f.name not in ('parent', 'name')}
