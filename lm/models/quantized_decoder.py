"""Decoders whose products have factors of 8 bits, also in training; and weights that are stored in int8 or int4."""
import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax

from lm import declarations
from lm.declarations import Role
from lm.models import moe
from lm.models.attention import Attention
from lm.models.layers import FeedForward
from lm.models.rounded_weights import RoundedWeight, group_size, grouped_weight, rounded_weight
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


def check_weights(model: Any, dtype: str) -> None:
  """Raises ValueError where a model cannot have weights of a dtype, int8 or int4, on the mesh that is set.

  All models can have weights of float32.
  """
  if dtype == 'float32':
    return
  parts = [model, *(getattr(block, name, None) for block in getattr(model, 'layers', ())
                    for name in ('attention', 'feed_forward'))]
  other = next((part for part in parts if type(part) not in (Transformer, Attention, FeedForward)), None)
  if other is not None:
    raise ValueError(f'a model with {type(other).__name__} cannot have weights of {dtype}, which a plain decoder with '
                     f'dense layers can have; leave out --weights={dtype}')
  _check_devices(jax.sharding.get_mesh().size, dtype)
  if dtype == 'int4':
    for weight in jax.tree.leaves(declarations.of(model)):
      if weight.role is Role.MATRIX:
        _check_groups(weight)


def _check_devices(count: int, dtype: str) -> None:
  if count > 1:
    raise ValueError(f'weights of {dtype} are for one device, and the model is on {count}; leave out '
                     f'--weights={dtype}')


def _check_groups(weight: declarations.Weight) -> None:
  """Raises ValueError for a matrix whose inputs cannot be divided into groups, or whose outputs into pairs."""
  _, end = weight.matrix_axes
  inputs, outputs = weight.array.shape[end - 1], math.prod(weight.array.shape[end:])
  if group_size(inputs) < 16 or outputs % 2:
    raise ValueError(f'a matrix with {inputs} inputs and {outputs} outputs cannot have weights of int4: its inputs (of '
                     'a head) must be a multiple of 16, and its outputs of 2; take --weights=int8')


def with_rounded_weights(model: Any, params: Any, dtype: str) -> Any:
  """Returns the parameters of a decoder with rounded weights; with those of float32, as they are.

  With int8, they replace the matrices of its blocks, the embedding and the head. With int4, only the matrices are in
  int4, and the tables stay in int8, because their rounding would cost more. They are for programs without a mesh;
  `float_weights` returns the same numbers for any program.

  Raises:
    ValueError: the model cannot have these weights, see `check_weights`, or it is on more devices than one.
  """
  check_weights(model, dtype)
  if dtype == 'float32':
    return params
  params = {name: params[name] for name in jax.eval_shape(model.init, jax.random.key(0))}
  devices = jax.tree.leaves(params)[0].sharding.device_set
  _check_devices(len(devices), dtype)
  return jax.device_put(_rounded(model, params, dtype), jax.sharding.SingleDeviceSharding(*devices))


@functools.partial(jax.jit, static_argnums=(0, 2))
def _rounded(model, params, dtype):
  def change(weight, value):
    if weight.role is not Role.MATRIX:
      return rounded_weight(value, (1,)) if weight.axes == 'VD' else value
    start, end = weight.matrix_axes
    return grouped_weight(value, end - 1) if dtype == 'int4' else rounded_weight(value, range(start, end))

  return jax.tree.map(change, declarations.of(model), params)


def float_weights(model: Any, params: Any, dtype: str) -> Any:
  """Returns parameters with the numbers of `with_rounded_weights` in float32, laid out as `params`."""
  def change(weight, value):
    weight = weight.floats() if isinstance(weight, RoundedWeight) else weight
    return jax.device_put(weight, value.sharding)

  rounded_params = with_rounded_weights(model, params, dtype)
  return jax.tree.map(change, rounded_params, {name: params[name] for name in rounded_params},
                      is_leaf=lambda leaf: isinstance(leaf, RoundedWeight))
