"""Operations across devices, by the letters of tensor axes.

The first five are called inside a `jax.shard_map`, where each device holds its own part of a tensor.
"""
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lm.sharding.axes import STAGE, axes_of, is_laid_out
from lm.sharding.each_stage import is_for_each_stage, scope


def part_index(letter: str) -> jax.Array:
  """Returns which part of a tensor axis this device holds, from 0."""
  axes = axes_of(letter)
  return jax.lax.axis_index(axes) if axes else jnp.int32(0)


def sum_of_parts(x: jax.Array, letter: str) -> jax.Array:
  """Returns the sum of `x` over the devices that hold the parts of a tensor axis."""
  axes = axes_of(letter)
  return jax.lax.psum(x, axes) if axes else x


def mark_varying(x: jax.Array, letters: str, split: str = '') -> jax.Array:
  """Returns `x`, marked as different on the devices that hold the parts of these tensor axes; outside, `x` as it is.

  The gradient of `x` is then the sum over these devices. `split` are tensor axes whose parts `x` has already.
  """
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return x
  return _vary(x, tuple(axis for axis in axes_of(letters) if axis not in axes_of(split)))


def _vary(x, axes):
  axes = tuple(axis for axis in axes if axis not in jax.typeof(x).manual_axis_type.varying)
  return jax.lax.pcast(x, axes, to='varying') if axes else x


def exchange_parts(x: jax.Array, letter: str) -> jax.Array:
  """Cuts `x` along its first axis into a part for each device that holds a part of a tensor axis, and sends them.

  Returns the parts that these devices sent to this one, in the order of the devices.
  """
  axes = axes_of(letter)
  return jax.lax.all_to_all(x, axes, split_axis=0, concat_axis=0, tiled=True) if axes else x


def largest_of_all(x: jax.Array) -> jax.Array:
  """Returns the maximum over all devices that split activations between products."""
  return jax.lax.pmax(x, axes_of('BTF'))


def per_device(function: Callable[..., Any], out_specs: Any, check_vma: bool = True) -> Callable[..., Any]:
  """Returns `jax.shard_map` of a function of arrays as they are laid out; call it outside of others.

  In a pipeline, it can be called for each stage. There JAX would keep the axis of stages out of the `shard_map`, which
  XLA does not compile where operands are reduced over others; so the `shard_map` is made once for all stages.
  """
  def mapped(*args):
    return jax.shard_map(function, in_specs=_specs(args), out_specs=out_specs, check_vma=check_vma)(*args)

  if not is_for_each_stage():
    return mapped

  @jax.custom_batching.custom_vmap
  def for_each_stage(*args):   # gives only shapes and types: `for_all_stages` takes its place
    return mapped(*jax.tree.map(_without_parts, args))

  @for_each_stage.def_vmap
  def for_all_stages(stages, is_batched, *args):
    def of_stage(*args):
      args = jax.tree.map(lambda x, batched: x[0] if batched else x, args, tuple(is_batched))
      with scope(False):
        return jax.tree.map(lambda x: x[None], function(*args))

    specs = jax.tree.map(lambda spec: spec.update(partitions=(STAGE, *spec.partitions)), out_specs,
                         is_leaf=lambda spec: isinstance(spec, P))
    result = jax.shard_map(of_stage, in_specs=_specs(args), out_specs=specs, check_vma=check_vma)(*args)
    return result, jax.tree.map(lambda _: True, result)

  return for_each_stage


def _specs(args):
  return jax.tree.map(lambda x: jax.typeof(x).sharding.spec, args)


def _without_parts(x):
  spec = jax.typeof(x).sharding.spec
  return jax.sharding.reshard(x, P(*spec.partitions)) if spec.reduced or spec.unreduced else x


def top_k(x: jax.Array, k: int) -> tuple[jax.Array, jax.Array]:
  """Returns the k largest values along the last axis, which is not split, and their indices; call it outside.

  Each device takes those of its own part: XLA would gather `x` on all devices.
  """
  select = lambda x: tuple(jax.lax.top_k(x, k))
  if not is_laid_out():
    return select(x)
  layout = jax.typeof(x).sharding.spec
  return per_device(select, (layout, layout))(x)


def sum_over_devices(function: Callable[..., Any], whole: Any, rows: Any) -> Any:
  """Returns the sum over devices of `function(whole, *rows)`, each device with all of one tree and with its own rows.

  `function` returns (sums, tree), where the tree has the structure of `whole`, and is laid out as `whole` in the
  result. The rows are split over all devices of the mesh if these divide them, and otherwise as batches are.
  """
  if not is_laid_out():
    return function(whole, *rows)
  mesh, layouts = jax.sharding.get_abstract_mesh(), jax.tree.map(lambda x: jax.typeof(x).sharding.spec, whole)
  divides = jax.tree.leaves(rows)[0].shape[0] % math.prod(mesh.shape.values()) == 0
  axes = mesh.axis_names if divides else axes_of('B')

  def local(whole, *rows):
    return jax.tree.map(lambda x: jax.lax.psum(x, axes) if axes else x, function(whole, *rows))

  everywhere = jax.tree.map(lambda x: jax.sharding.reshard(x, P()), whole)
  rows = jax.tree.map(lambda x: jax.sharding.reshard(x, P(axes or None)), rows)
  specs = jax.tree.map(lambda _: P(), everywhere), *jax.tree.map(lambda _: P(axes or None), rows)
  sums, tree = jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=False)(everywhere, *rows)
  return sums, jax.tree.map(jax.sharding.reshard, tree, layouts)


def insert_rows(tree: Any, new: Any, rows: jax.Array) -> Any:
  """Returns `tree` with row i of `new` in the place of row `rows[i]`; rows that `tree` does not have are left out.

  Both are trees of arrays that are led by the rows of a batch, and are otherwise alike.
  """
  def insert(split, old, new, rows):
    own = rows - part_index('B') * len(old) if split else rows   # the places in this device's part
    return old.at[jnp.where((own >= 0) & (own < len(old)), own, len(old))].set(new, mode='drop')

  def place(old, new):
    if not is_laid_out():
      return insert(False, old, new, rows)
    layout = jax.typeof(old).sharding.spec
    whole = P(None, *layout[1:])
    return jax.shard_map(functools.partial(insert, layout[0] is not None), in_specs=(layout, whole, P()),
                         out_specs=layout, check_vma=False)(old, jax.sharding.reshard(new, whole), rows)

  return jax.tree.map(place, tree, new)


def take_rows(tree: Any, rows: jax.Array) -> Any:
  """Returns a tree of arrays whose row i is row `rows[i]` of `tree`, whose arrays are led by the rows of a batch."""
  def take(x):
    if not is_laid_out():
      return x[rows]
    layout = jax.typeof(x).sharding.spec
    whole = jax.sharding.reshard(x, P(None, *layout[1:]))
    return whole.at[rows].get(out_sharding=layout)
  return jax.tree.map(take, tree)
