"""Operands of matrix products on a mesh, and results of which each device has a part.

A weight is stored in parts along D, and gathered for use. Where devices compute with different rows, each has a part of
the gradient of the weight, and the sum of the parts is scattered to where the weight is stored.

Activations between the products of a layer, where norms, dropout and residual sums are, are split along T over the mesh
axes of heads and hidden units too (Korthikanti et al. 2022, arXiv:2205.05198). They are gathered before the first
product of a layer, and the parts of the result of its last product are summed and scattered.

The types of JAX express this: an operand is `reduced` over the mesh axes whose devices have parts of its gradient, and
the gradient is `unreduced` over these axes.
"""
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm.sharding.axes import AXES, axes_of, entry_of, is_laid_out, names_of, spec
from lm.sharding.collectives import per_device
from lm.sharding.each_stage import custom_vjp
from lm.sharding.padded_vocabulary import padded


def gathered_spec(axes: str) -> P | None:
  """Returns the sharding of a weight in use: its parts along D are gathered, and other axes are split as in storage."""
  partition = spec(axes.replace('D', '-'))
  if partition is None or 'D' not in axes:
    return partition
  return _reduced(partition, set(axes_of('BT')) - set(axes_of(axes.replace('D', ''))))


def residual_spec(shape: tuple[int, ...]) -> P | None:
  """Returns the sharding of activations [B, T, D] between products; T is split further where its size allows."""
  partition = spec('BTD')
  if partition is None:
    return None
  if shape[1] != padded_length(shape[1]):
    return partition
  return P(partition[0], entry_of(axes_of('TF')), None)


def padded_length(length: int) -> int:
  """Returns the least number of positions, not below `length`, that devices can split between products."""
  mesh = jax.sharding.get_abstract_mesh()
  count = math.prod(mesh.shape[axis] for axis in axes_of('TF'))
  return -(-length // count) * count


def spread(x_BTD: jax.Array) -> jax.Array:
  """Returns activations as they are laid out between products."""
  partition = residual_spec(x_BTD.shape)
  return x_BTD if partition is None else jax.sharding.reshard(x_BTD, partition)


def enter(x_BTD: jax.Array) -> jax.Array:
  """Returns activations as they are laid out for products whose results are split over heads or hidden units."""
  return _enter(x_BTD, jax.typeof(x_BTD).sharding.spec) if is_laid_out() else x_BTD


def _gathered(x_BTD, before):
  del before
  return jax.sharding.reshard(x_BTD, _reduced(spec('BTD'), set(axes_of('F'))))


_enter = custom_vjp(_gathered, lambda x, before: (_gathered(x, before), None),
                    lambda before, _, gradient: (_sum(gradient, before),), nondiff_argnums=(1,))


def leave(y: jax.Array) -> jax.Array:
  """Returns the sum of the parts of activations that devices have, laid out as between products."""
  if not is_laid_out() or not jax.typeof(y).sharding.spec.unreduced:
    return y
  partition = jax.typeof(y).sharding.spec
  return _leave(y, P(*partition.partitions, reduced=partition.unreduced))


def _summed(y, gradient_partition):
  return _sum(y, residual_spec(y.shape) if y.ndim == 3 else P(*gradient_partition.partitions))


_leave = custom_vjp(_summed, lambda y, partition: (_summed(y, partition), None),
                    lambda partition, _, gradient: (jax.sharding.reshard(gradient, partition),), nondiff_argnums=(1,))


def whole(operand: jax.Array) -> jax.Array:
  """Returns an operand without the type that its gradient comes in parts; call it where nothing is differentiated."""
  if not is_laid_out():
    return operand
  partition = jax.typeof(operand).sharding.spec
  return jax.sharding.reshard(operand, partition.update(reduced=frozenset())) if partition.reduced else operand


def contracted(formula: str, operand: jax.Array) -> set[str]:
  """Returns the mesh axes that split axes of the first operand which are not in the result of a matrix product."""
  operands, result = formula.split('->')
  entries = zip(operands, jax.typeof(operand).sharding.spec.partitions)
  return _with_parts(axis for letter, entry in entries if letter not in result for axis in names_of(entry))


def gradient_spec(operand: jax.Array) -> P | None:
  """Returns the sharding of the gradient of an operand."""
  if not is_laid_out():
    return None
  partition = jax.typeof(operand).sharding.spec
  return partition.update(reduced=frozenset(), unreduced=partition.reduced)


def zero_gradient(operand: jax.Array) -> jax.Array:
  """Returns float32 zeros, to which gradients of an operand are added."""
  zeros, partition = jnp.zeros(operand.shape, jnp.float32), gradient_spec(operand)
  return zeros if partition is None else jax.sharding.reshard(zeros, partition)


def scale_gradient(gradient: jax.Array, factor: jax.Array) -> jax.Array:
  """Returns the gradient of an operand, of which devices have parts, times a scalar."""
  unreduced = jax.typeof(gradient).sharding.spec.unreduced
  factor = factor.astype(gradient.dtype)
  return gradient * (jax.sharding.reshard(factor, P(reduced=unreduced)) if unreduced else factor)


def gather(weight: jax.Array, axes: str) -> jax.Array:
  """Returns a weight for use, laid out as `gathered_spec` says. Its gradient is summed in float32.

  Where mesh axes do not divide the vocabulary, the weight in use has more rows: zeros (see `padded_vocabulary`).
  """
  weight = padded(weight, axes)
  return _gather(weight, axes) if is_laid_out() else weight


def _for_use(weight, axes):
  return jax.sharding.reshard(weight, gathered_spec(axes))


def _gather_backward(axes, like, gradient):
  return (_sum(gradient.astype(jnp.float32), spec(axes)).astype(like.dtype),)


_gather = custom_vjp(_for_use, lambda weight, axes: (_for_use(weight, axes), jnp.zeros((), weight.dtype)),
                     _gather_backward, nondiff_argnums=(1,))


def _reduced(partition, axes):
  """Returns a sharding of an operand whose gradient comes in parts."""
  return partition.update(reduced=frozenset(_with_parts(axes)))


def _with_parts(axes):
  """Returns the mesh axes of more than one device."""
  mesh = jax.sharding.get_abstract_mesh()
  return {axis for axis in axes if mesh.shape[axis] > 1}


def _sum(parts, partition):
  """Returns the sum of parts, laid out by `partition`: scattered along axes that it splits, else on all devices."""
  present = jax.typeof(parts).sharding.spec
  if not present.unreduced:
    return jax.sharding.reshard(parts, partition)
  scattered = [(axis, tuple(name for name in names_of(entry) if name in present.unreduced))
               for axis, entry in enumerate(partition)]
  scattered = [(axis, names) for axis, names in scattered if names]
  others = present.unreduced.difference(*(names for _, names in scattered))

  def add(x):
    for axis, names in scattered:
      x = jax.lax.psum_scatter(x, names, scatter_dimension=axis, tiled=True)
    return jax.lax.psum(x, tuple(name for name in AXES if name in others)) if others else x

  return per_device(add, partition)(parts)
