"""The mesh, and the one table from tensor axes to mesh axes.

The mesh has two axes: `data` splits the batch, and the weights at rest (fully sharded data parallelism);
`model` splits heads, hidden units and vocabulary (tensor parallelism). Tensor axes are the letters of the
shape legend in `models/transformer.py`. The axes are explicit: a wrong sharding is a type error.
"""
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

AXES = ('data', 'model')
TABLE = {'B': 'data', 'D': 'data', 'N': 'model', 'K': 'model', 'F': 'model', 'V': 'model', 'E': 'model'}


def make_mesh(shape: str | None = None, devices=None) -> jax.sharding.Mesh:
  """A mesh from `'8x1'` (data x model); None puts every device on `data`. ValueError if it does not fit the devices."""
  devices = jax.devices() if devices is None else devices
  try:
    sizes = [len(devices), 1] if shape is None else [int(n) for n in shape.split('x')]
    valid = len(sizes) == len(AXES) and min(sizes) > 0
  except ValueError:
    valid = False
  if not valid:
    raise ValueError(f'mesh {shape!r} is not DATAxMODEL, two positive numbers such as {len(devices)}x1')
  if math.prod(sizes) != len(devices):
    raise ValueError(f'mesh {shape!r} needs {math.prod(sizes)} devices, but there are {len(devices)}')
  return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 2, devices=devices)


def abstract_mesh(shape: str, device: jax.sharding.AbstractDevice | None = None) -> jax.sharding.AbstractMesh:
  """A mesh without devices, on which full-size programs are lowered; for another kind of device where it is given."""
  return jax.sharding.AbstractMesh(tuple(int(n) for n in shape.split('x')), AXES, axis_types=(AxisType.Explicit,) * 2,
                                   abstract_device=device)


def platform() -> str:
  """What the program that is being traced is for: that of the mesh in use, which need not be of this machine."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def spec(axes: str) -> P | None:
  """The sharding of a tensor with these axes: `spec('BTD') == P('data', None, None)`; None where no mesh is set.

  None also inside a `shard_map`, where each device computes what it holds by itself. A mesh axis is used once, by the
  first letter that asks: a weight's D is split over `data`, an activation's is not.
  """
  if not _is_laid_out():
    return None
  taken: list[str | None] = []
  for letter in axes:
    axis = TABLE.get(letter)
    taken.append(None if axis in taken else axis)
  return P(*taken)


def _is_laid_out() -> bool:
  """Whether tensors have shardings: there is a mesh, and it is not taken apart by a `shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and not mesh.are_all_axes_manual


def constrain(x: jax.Array, axes: str) -> jax.Array:
  """`x`, laid out as the table says."""
  layout = spec(axes)
  return x if layout is None else jax.sharding.reshard(x, layout)


def split_axis(x: jax.Array, axis: int, sizes: tuple[int, int]) -> jax.Array:
  """`x` with an axis as two of these sizes, of which the first is laid out as the axis was."""
  # The layout is given: `jnp.reshape` drops the mesh axis of an axis of size 1.
  return _reshape(x, x.shape[:axis] + sizes + x.shape[axis + 1:], lambda spec: (*spec[:axis + 1], None,
                                                                                *spec[axis + 1:]))


def merge_axes(x: jax.Array, axis: int) -> jax.Array:
  """`x` with an axis and the next one, which is not split, as one axis, laid out as the first."""
  shape = x.shape[:axis] + (x.shape[axis] * x.shape[axis + 1],) + x.shape[axis + 2:]
  return _reshape(x, shape, lambda spec: spec[:axis + 1] + spec[axis + 2:])


def _reshape(x, shape, layout):
  if not _is_laid_out():
    return x.reshape(shape)
  spec = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)[:x.ndim]
  return jax.lax.reshape(x, shape, out_sharding=P(*layout(spec)))


def gathered(axes: str) -> P | None:
  """The sharding of a weight in use: whole along D (its shards gathered from `data`), still split along `model`."""
  layout = spec(axes)
  return None if layout is None else P(*(a if a == 'model' else None for a in layout))


def gather(weight: jax.Array, axes: str) -> jax.Array:
  """A weight for use, laid out as `gathered` says."""
  layout = gathered(axes)
  return weight if layout is None else jax.sharding.reshard(weight, layout)


def check(axes: str, sizes: tuple[int, ...], name: str) -> None:
  """ValueError unless every axis divides by its mesh axis."""
  mesh = jax.sharding.get_abstract_mesh()
  for letter, size, axis in zip(axes, sizes, spec(axes) or ()):
    if axis is not None and size % mesh.shape[axis]:
      raise ValueError(f'{name}: its axis {letter} has size {size}, which the mesh axis {axis}={mesh.shape[axis]} '
                       f'does not divide; choose another --mesh or size')


def layout(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh, partition: P | None) -> jax.sharding.Sharding:
  """How an array lies on a mesh; None lies whole on each device. With an empty mesh, where none is set: on one device.
  """
  if mesh.empty:   # of which a NamedSharding would end the process when it is used
    return SingleDeviceSharding(jax.local_devices()[0])
  return NamedSharding(mesh, P() if partition is None else partition)


def require(mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> None:
  """ValueError where no mesh is set, for what needs one."""
  if mesh.empty:
    raise ValueError('no mesh is set: call it in "with jax.set_mesh(sharding.make_mesh()) as mesh:"')


def local_rows(rows: int, mesh: jax.sharding.Mesh) -> range:
  """The rows of a global batch that this process's devices hold."""
  slices = [i[0] for i in layout(mesh, P('data')).addressable_devices_indices_map((rows,)).values()]
  return range(min(s.start or 0 for s in slices), max(rows if s.stop is None else s.stop for s in slices))


def shard_rows(batch, mesh: jax.sharding.Mesh):
  """A tree of this process's rows `[b, ...]` of a global batch `[B, ...]`, on the devices."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(layout(mesh, P('data')), x), batch)


def sum_over_devices(function: Callable[..., Any], whole: Any, rows: Any) -> Any:
  """Sums of `function(whole, *rows)` over devices: each is given all of one tree, and its rows of the others.

  Rows are split over all devices of the mesh where these divide them, else over those that split batches. Sums are
  laid out as `whole` where they have its structure: (sums, tree like whole) is what the function returns.
  """
  if not _is_laid_out():
    return function(whole, *rows)
  mesh, layouts = jax.sharding.get_abstract_mesh(), jax.tree.map(lambda x: jax.typeof(x).sharding.spec, whole)
  axes = AXES if jax.tree.leaves(rows)[0].shape[0] % math.prod(mesh.shape.values()) == 0 else AXES[:1]

  def local(whole, *rows):
    return jax.tree.map(lambda x: jax.lax.psum(x, axes), function(whole, *rows))

  everywhere = jax.tree.map(lambda x: jax.sharding.reshard(x, P()), whole)
  rows = jax.tree.map(lambda x: jax.sharding.reshard(x, P(axes)), rows)
  specs = jax.tree.map(lambda _: P(), everywhere), *jax.tree.map(lambda _: P(axes), rows)
  sums, tree = jax.shard_map(local, in_specs=specs, out_specs=P(), check_vma=False)(everywhere, *rows)
  return sums, jax.tree.map(jax.sharding.reshard, tree, layouts)
