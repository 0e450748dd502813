"""Decoders with 8 bits: products whose factors are rounded, also in training; and weights that are stored in int8."""
import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax

from lm import declarations
from lm.declarations import Role
from lm.models import moe
from lm.models.attention import Attention
from lm.models.int8_weights import Int8Weight, rounded_weight
from lm.models.layers import FeedForward
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


def with_int8_weights(model: Any, params: Any) -> Any:
  """Returns the parameters of a decoder with int8 in place of the matrices of its blocks, the embedding and the head.

  They are for programs without a mesh; `float_weights` returns the same numbers for any program.

  Raises:
    ValueError: the model is not a plain decoder with plain attention and feed-forward layers, or it is on more devices
      than one.
  """
  blocks = getattr(model, 'layers', ())
  parts = [model, *(getattr(block, name, None) for block in blocks for name in ('attention', 'feed_forward'))]
  other = next((part for part in parts if type(part) not in (Transformer, Attention, FeedForward)), None)
  if other is not None:
    raise ValueError(f'a model with {type(other).__name__} cannot have weights of int8, which a plain decoder with '
                     'dense layers can have; leave out --weights=int8')
  params = {name: params[name] for name in jax.eval_shape(model.init, jax.random.key(0))}
  device, *others = jax.tree.leaves(params)[0].sharding.device_set
  if others:
    raise ValueError(f'weights of int8 are for one device, and the model is on {1 + len(others)}; leave out '
                     '--weights=int8')
  return jax.device_put(_rounded(model, params), jax.sharding.SingleDeviceSharding(device))


@functools.partial(jax.jit, static_argnums=0)
def _rounded(model, params):
  def change(weight, value):
    if weight.role is Role.MATRIX:
      return rounded_weight(value, range(*weight.matrix_axes))
    return rounded_weight(value, (1,)) if weight.axes == 'VD' else value

  return jax.tree.map(change, declarations.of(model), params)


def float_weights(model: Any, params: Any) -> Any:
  """Returns parameters with the numbers of `with_int8_weights` in float32, laid out as `params`."""
  def change(weight, value):
    weight = weight.floats() if isinstance(weight, Int8Weight) else weight
    return jax.device_put(weight, value.sharding)

  rounded_params = with_int8_weights(model, params)
  return jax.tree.map(change, rounded_params, {name: params[name] for name in rounded_params},
                      is_leaf=lambda leaf: isinstance(leaf, Int8Weight))
