"""The mesh, and the one table from tensor axes to mesh axes.

Tensor axes are the letters of the shape legend in `models/transformer.py`. `TABLE` says which mesh axis, or which tuple
of mesh axes, splits a letter. All other code names letters only, so that a new mesh axis is a new entry of the table.

* `data` splits the batch, and the weights while they are stored (fully sharded data parallelism).
* `model` splits heads, hidden units, vocabulary and experts (tensor and expert parallelism).

The mesh axes are explicit: a wrong sharding is a type error.
"""
import math
import re

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

DEFAULT = 'data'   # the mesh axis that has all devices where no mesh is given
TABLE: dict[str, str | tuple[str, ...]] = {
    'B': 'data', 'D': 'data', 'N': 'model', 'K': 'model', 'F': 'model', 'V': 'model', 'E': 'model'}


def mesh_axes() -> tuple[str, ...]:
  """Returns the names of all mesh axes, in the order in which the table mentions them."""
  return tuple(dict.fromkeys(axis for letter in TABLE for axis in axes_of(letter)))


def axes_of(letters: str) -> tuple[str, ...]:
  """Returns the mesh axes that split these tensor axes, each once; none for letters that are not in the table."""
  entries = [TABLE.get(letter, ()) for letter in letters]
  return tuple(dict.fromkeys(axis for entry in entries for axis in ((entry,) if isinstance(entry, str) else entry)))


def make_mesh(shape: str | None = None, devices=None) -> Mesh:
  """Returns a mesh from a text such as `'data:4,model:2'`; None puts every device on `data`.

  The order of the axes in the text does not matter, and an axis that is left out has size 1. Raises ValueError where
  the text cannot be read, or does not fit the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = _sizes(f'{DEFAULT}:{len(devices)}' if shape is None else shape)
  if math.prod(sizes) != len(devices):
    raise ValueError(f'mesh {shape!r} needs {math.prod(sizes)} devices, but there are {len(devices)}; give sizes whose '
                     f'product is {len(devices)}, such as {DEFAULT}:{len(devices)}')
  return jax.make_mesh(sizes, mesh_axes(), axis_types=(AxisType.Explicit,) * len(sizes), devices=devices)


def abstract_mesh(shape: str, device: jax.sharding.AbstractDevice | None = None) -> AbstractMesh:
  """Returns a mesh without devices, on which full-size programs are lowered; `device` is the kind they are lowered for.
  """
  sizes = _sizes(shape)
  return AbstractMesh(sizes, mesh_axes(), axis_types=(AxisType.Explicit,) * len(sizes), abstract_device=device)


def mesh_text(mesh: Mesh | AbstractMesh, axes: tuple[str, ...] | None = None) -> str:
  """Returns a mesh as text, such as `'data:4,model:2'`: all of its axes, or those that are given."""
  return ','.join(f'{axis}:{mesh.shape.get(axis, 1)}' for axis in (mesh.axis_names if axes is None else axes))


def _sizes(shape: str) -> tuple[int, ...]:
  """Returns the size of each mesh axis, in the order of `mesh_axes`."""
  _check_table()
  names, sizes = mesh_axes(), {}
  if re.fullmatch(r'\d+x\d+', shape):
    data, model = shape.split('x')
    raise ValueError(f'mesh {shape!r} does not name its axes; write --mesh=data:{data},model:{model}')
  for part in shape.split(','):
    axis, colon, size = (word.strip() for word in part.partition(':'))
    if not colon:
      raise ValueError(f'mesh {shape!r} has the part {part!r}, which is not AXIS:SIZE; write it as in {DEFAULT}:8; the '
                       f'axes are {", ".join(names)}')
    if axis not in names:
      raise ValueError(f'mesh {shape!r} has the axis {axis!r}, which does not exist; choose from {", ".join(names)}')
    if axis in sizes:
      raise ValueError(f'mesh {shape!r} has the axis {axis} twice; give it once')
    if not re.fullmatch(r'0*[1-9]\d*', size):
      raise ValueError(f'mesh {shape!r} has the size {size!r} for the axis {axis}; give a whole number from 1')
    sizes[axis] = int(size)
  return tuple(sizes.get(name, 1) for name in names)


def _check_table() -> None:
  """Raises ValueError for a table with which tensors would be split wrongly."""
  # Rows and what they are multiplied with stand in one tensor, where a mesh axis can split only one of them. D is
  # exempt, since weights are gathered along it for use.
  for letter in TABLE:
    shared = set(axes_of('B')) & set(axes_of(letter))
    if shared and letter not in 'BD':
      raise ValueError(f'the sharding table splits both B and {letter} over {", ".join(sorted(shared))}; give them '
                       'different mesh axes')
  if axes_of('N') != axes_of('K'):   # each shard attends with the keys of its own queries
    raise ValueError(f'the sharding table splits query heads N over {axes_of("N")} and key heads K over '
                     f'{axes_of("K")}; give both the same mesh axes')


def platform() -> str:
  """Returns the platform that the traced program is for: that of the mesh in use, which may be another machine's."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def parts(letter: str, mesh: Mesh | AbstractMesh | None = None) -> int:
  """Returns the number of parts into which a tensor axis is split, on the given mesh or the one in use; 1 without one.
  """
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  return math.prod(mesh.shape.get(axis, 1) for axis in axes_of(letter))


def padded_rows(rows: int) -> int:
  """Returns the least number of rows, not below `rows`, that the mesh in use can split."""
  count = parts('B')
  return -(-rows // count) * count


def spec(axes: str) -> P | None:
  """Returns the sharding of a tensor with these axes: `spec('BTD') == P('data', None, None)`.

  Returns None where no mesh is set, and inside a `shard_map`, where each device computes with its own part. Each mesh
  axis splits only the first letter that has it: D is split in a weight, but not in an activation, which has B.
  """
  if not is_laid_out():
    return None
  used: set[str] = set()
  entries: list[str | tuple[str, ...] | None] = []
  for letter in axes:
    free = tuple(axis for axis in axes_of(letter) if axis not in used)
    used.update(free)
    entries.append(_entry(free))
  return P(*entries)


def _entry(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
  """Returns mesh axes as an entry of a PartitionSpec."""
  if len(axes) > 1:
    return axes
  return axes[0] if axes else None


def is_laid_out() -> bool:
  """Returns whether tensors have shardings: a mesh is set, and this is not the inside of a `shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and not mesh.are_all_axes_manual


def constrain(x: jax.Array, axes: str) -> jax.Array:
  """Returns `x`, laid out as the table says."""
  partition = spec(axes)
  return x if partition is None else jax.sharding.reshard(x, partition)


def split_axis(x: jax.Array, axis: int, sizes: tuple[int, int]) -> jax.Array:
  """Returns `x` with one axis as two axes of these sizes; the first is laid out as the axis was."""
  # The layout is given, because `jnp.reshape` drops the mesh axis of an axis of size 1.
  return _reshape(x, x.shape[:axis] + sizes + x.shape[axis + 1:],
                  lambda entries: (*entries[:axis + 1], None, *entries[axis + 1:]))


def merge_axes(x: jax.Array, axis: int) -> jax.Array:
  """Returns `x` with an axis and the next one, which is not split, as one axis that is laid out as the first was."""
  shape = x.shape[:axis] + (x.shape[axis] * x.shape[axis + 1],) + x.shape[axis + 2:]
  return _reshape(x, shape, lambda entries: entries[:axis + 1] + entries[axis + 2:])


def _reshape(x, shape, change):
  """Reshapes `x`; `change` gives the entries of the new PartitionSpec from those of the old one."""
  if not is_laid_out():
    return x.reshape(shape)
  entries = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)[:x.ndim]
  return jax.lax.reshape(x, shape, out_sharding=P(*change(entries)))


def gathered_spec(axes: str) -> P | None:
  """Returns the sharding of a weight in use: its parts along D are gathered, and other axes are split as in storage."""
  return spec(axes.replace('D', '-'))


def gather(weight: jax.Array, axes: str) -> jax.Array:
  """Returns a weight for use, laid out as `gathered_spec` says."""
  partition = gathered_spec(axes)
  return weight if partition is None else jax.sharding.reshard(weight, partition)


def check(axes: str, sizes: tuple[int, ...], name: str) -> None:
  """Raises ValueError unless the mesh axes of each tensor axis divide its size."""
  mesh = jax.sharding.get_abstract_mesh()
  for letter, size, entry in zip(axes, sizes, spec(axes) or ()):
    names = () if entry is None else (entry,) if isinstance(entry, str) else entry
    count = math.prod(mesh.shape[axis] for axis in names)
    if size % count:
      raise ValueError(f'{name}: its axis {letter} has size {size}, which is not a multiple of {count}, the size of '
                       f'the mesh axes {mesh_text(mesh, names)}; choose another --mesh or size')


def layout(mesh: Mesh | AbstractMesh, partition: P | None) -> jax.sharding.Sharding:
  """Returns how an array lies on a mesh. A partition of None is whole on each device; an empty mesh is one device."""
  if mesh.empty:   # a NamedSharding of an empty mesh would end the process when it is used
    return SingleDeviceSharding(jax.local_devices()[0])
  return NamedSharding(mesh, P() if partition is None else partition)


def row_layout(mesh: Mesh | AbstractMesh) -> jax.sharding.Sharding:
  """Returns how an array `[B, ...]` lies on a mesh."""
  return layout(mesh, P(_entry(axes_of('B'))))


def require(mesh: Mesh | AbstractMesh) -> None:
  """Raises ValueError where the mesh is empty, because none is set."""
  if mesh.empty:
    raise ValueError('no mesh is set: call it in "with jax.set_mesh(sharding.make_mesh()) as mesh:"')


def local_rows(rows: int, mesh: Mesh) -> range:
  """Returns the rows of a global batch that the devices of this process hold."""
  slices = [indices[0] for indices in row_layout(mesh).addressable_devices_indices_map((rows,)).values()]
  return range(min(s.start or 0 for s in slices), max(rows if s.stop is None else s.stop for s in slices))


def shard_rows(batch, mesh: Mesh):
  """Returns a tree of global arrays `[B, ...]` on the devices, from this process's rows `[b, ...]`."""
  return jax.tree.map(lambda x: jax.make_array_from_process_local_data(row_layout(mesh), x), batch)
