"""The one table from tensor axes to mesh axes, and how arrays are laid out by it.

Tensor axes are the letters of the shape legend in `models/transformer.py`. `TABLE` says which mesh axes split a letter.
All other code names letters only, so that a new mesh axis is a new entry of `AXES` and of the table.

The mesh axes are explicit: a wrong sharding is a type error. A mesh has only the axes whose size is above 1.
"""
import contextlib
import contextvars
import math
from collections.abc import Iterator

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from lm.sharding.each_stage import is_for_each_stage

# What each mesh axis splits. Devices that are neighbours on the last axis are next to each other: they exchange most.
AXES = {
    'replica': 'the batch; weights are whole on each part',
    'stage': 'the layers in a step of training, and otherwise what fsdp splits',
    'fsdp': 'the batch, and the weights and the state of the optimizer at rest',
    'context': 'the positions of a row, and weights at rest as fsdp does',
    'expert': 'experts, and for all other layers what fsdp splits',
    'tensor': 'heads, hidden units and the vocabulary',
}
# M are heads that have all positions: those of attention, where each device has whole rows for a part of its heads.
TABLE: dict[str, tuple[str, ...]] = {
    'B': ('replica', 'stage', 'fsdp', 'expert'), 'T': ('context',), 'D': ('fsdp', 'context', 'expert', 'stage'),
    'E': ('expert', 'tensor'), 'N': ('tensor',), 'K': ('tensor',), 'M': ('tensor', 'context'), 'F': ('tensor',),
    'V': ('tensor',)}

STAGE = 'stage'   # the last of the axes of D, so that `pipeline` exchanges parts of D for layers

_rows_are_whole = contextvars.ContextVar('rows_are_whole', default=False)


@contextlib.contextmanager
def whole_rows() -> Iterator[None]:
  """A context, or a decorator, in which no mesh axis splits the positions of a row.

  Programs without gradients are traced in it whose rows may have any number of positions, such as generation, or whose
  caches have all positions. Devices that hold parts of a row in training then compute the same.
  """
  token = _rows_are_whole.set(True)
  try:
    yield
  finally:
    _rows_are_whole.reset(token)


def axes_of(letters: str, mesh: Mesh | AbstractMesh | None = None) -> tuple[str, ...]:
  """Returns the mesh axes that split these tensor axes, each once, on the given mesh or the one in use.

  What is traced for each stage on its own has no tensor axis that is split over stages.
  """
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  table = {**TABLE, 'T': (), 'M': TABLE['N']} if _rows_are_whole.get() else TABLE
  axes = dict.fromkeys(axis for letter in letters for axis in table.get(letter, ()))
  return tuple(axis for axis in axes if axis in mesh.shape and not (axis == STAGE and is_for_each_stage()))


def check_table() -> None:
  """Raises ValueError for a table with which tensors would be split wrongly."""
  for letter, axes in TABLE.items():
    for axis in axes:
      if axis not in AXES:
        raise ValueError(f'the sharding table splits {letter} over {axis}, which is not a mesh axis; add it to AXES')
  # A mesh axis can split only one axis of a tensor: one that splits rows, or their positions, cannot split another axis
  # of activations. Exempt are D, because weights are gathered along it for use; E, because rows are exchanged between
  # experts; and M, because positions are exchanged for heads.
  for rows, exempt in (('B', 'BDE'), ('T', 'TDM')):
    for letter, axes in TABLE.items():
      shared = set(TABLE[rows]) & set(axes)
      if shared and letter not in exempt:
        raise ValueError(f'the sharding table splits both {rows} and {letter} over {", ".join(sorted(shared))}; give '
                         'them different mesh axes')
  activations = {axis for letter in 'BTF' for axis in TABLE.get(letter, ())}
  if not activations.issuperset(TABLE.get('E', ())):   # each row is sent to experts by one device
    raise ValueError(f'the sharding table splits experts E over {TABLE["E"]}, which do not all split activations; take '
                     f'mesh axes of {", ".join(activations)}')
  if TABLE.get('N') != TABLE.get('K'):   # each shard attends with the keys of its own queries
    raise ValueError(f'the sharding table splits query heads N over {TABLE.get("N")} and key heads K over '
                     f'{TABLE.get("K")}; give both the same mesh axes')


def platform() -> str:
  """Returns the platform that the traced program is for: that of the mesh in use, which may be another machine's."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return jax.default_backend() if device is None else device.platform


def parts(letter: str, mesh: Mesh | AbstractMesh | None = None) -> int:
  """Returns the number of parts into which a tensor axis is split, on the given mesh or the one in use; 1 without one.
  """
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  return math.prod(mesh.shape[axis] for axis in axes_of(letter, mesh))


def padded_rows(rows: int) -> int:
  """Returns the least number of rows, not below `rows`, that the mesh in use can split."""
  count = parts('B')
  return -(-rows // count) * count


def spec(axes: str) -> P | None:
  """Returns the sharding of a tensor with these axes: `spec('BTD') == P('fsdp', None, None)`.

  Returns None where no mesh is set, and inside a `shard_map`, where each device computes with its own part. Each mesh
  axis splits only the first letter that has it. D is split in a weight, but not in an activation, which has B.
  """
  if not is_laid_out():
    return None
  used: set[str] = set()
  entries: list[str | tuple[str, ...] | None] = []
  for letter in axes:
    free = tuple(axis for axis in axes_of(letter) if axis not in used)
    if letter == 'D' and 'B' in axes:
      free = ()
    used.update(free)
    entries.append(entry_of(free))
  return P(*entries)


def stored_spec(axes: str, shape: tuple[int, ...]) -> P | None:
  """Returns the sharding of a weight at rest: `spec(axes)`, except where the mesh axes of V do not divide its size.

  These mesh axes then split D in its place, so that each device stores as much as if they had split V.
  """
  partition = spec(axes)
  if partition is None or 'V' not in axes or shape[axes.index('V')] % parts('V') == 0:
    return partition
  entries = dict(zip(axes, partition))
  moved, entries['V'] = names_of(entries['V']), None
  if 'D' in entries:
    entries['D'] = entry_of((*names_of(entries['D']), *moved))
  return P(*(entries[letter] for letter in axes))


def entry_of(axes: tuple[str, ...]) -> str | tuple[str, ...] | None:
  """Returns mesh axes as an entry of a PartitionSpec."""
  if len(axes) > 1:
    return axes
  return axes[0] if axes else None


def names_of(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """Returns the mesh axes of an entry of a PartitionSpec."""
  if entry is None:
    return ()
  return (entry,) if isinstance(entry, str) else entry


def is_laid_out() -> bool:
  """Returns whether tensors have shardings: a mesh is set, and this is not the inside of a `shard_map`."""
  mesh = jax.sharding.get_abstract_mesh()
  return not mesh.empty and not mesh.manual_axes


def is_on_one_device() -> bool:
  """Returns whether no tensor is split: on one device, without a mesh, and inside a `shard_map`."""
  return not is_laid_out() or jax.sharding.get_abstract_mesh().size == 1


def constrain(x: jax.Array, axes: str) -> jax.Array:
  """Returns `x`, laid out as the table says."""
  partition = spec(axes)
  return x if partition is None else jax.sharding.reshard(x, partition)


def store(x: jax.Array, axes: str) -> jax.Array:
  """Returns a weight, laid out as at rest."""
  partition = stored_spec(axes, x.shape)
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
  partition = jax.typeof(x).sharding.spec
  entries = change((*partition.partitions, *[None] * x.ndim)[:x.ndim])
  return jax.lax.reshape(x, shape, out_sharding=partition.update(partitions=entries))


def check(axes: str, sizes: tuple[int, ...], name: str, partition: P | None = None) -> None:
  """Raises ValueError unless the mesh axes of each tensor axis divide its size.

  `partition` says which mesh axes these are; None stands for those of the table.
  """
  mesh, partition = jax.sharding.get_abstract_mesh(), spec(axes) if partition is None else partition
  for letter, size, entry in zip(axes, sizes, partition or ()):
    names = names_of(entry)
    count = math.prod(mesh.shape[axis] for axis in names)
    if size % count:
      divisors = [number for number in range(1, count) if size % number == 0]
      moved = [axis for axis in names if axis not in axes_of(letter)]
      reason = f' ({", ".join(moved)} is one of them because it does not divide V)' if moved else ''
      raise ValueError(f'{name}: its axis {letter} has size {size}, which is not a multiple of {count}, the size of '
                       f'the mesh axes {", ".join(f"{axis}:{mesh.shape[axis]}" for axis in names)}{reason}; choose '
                       f'another --mesh, where that size is {" or ".join(map(str, divisors))}, or another size of the '
                       'model')


def layout(mesh: Mesh | AbstractMesh, partition: P | None) -> jax.sharding.Sharding:
  """Returns how an array lies on a mesh. A partition of None is whole on each device; an empty mesh is one device."""
  if mesh.empty:   # a NamedSharding of an empty mesh would end the process when it is used
    return SingleDeviceSharding(jax.local_devices()[0])
  return NamedSharding(mesh, P() if partition is None else partition)


def row_layout(mesh: Mesh | AbstractMesh) -> jax.sharding.Sharding:
  """Returns how an array `[B, ...]` lies on a mesh."""
  return layout(mesh, P(entry_of(axes_of('B', mesh))))


def require(mesh: Mesh | AbstractMesh) -> None:
  """Raises ValueError where the mesh is empty, because none is set."""
  if mesh.empty:
    raise ValueError('no mesh is set: call it in "with jax.set_mesh(sharding.make_mesh()) as mesh:"')


def require_whole_rows() -> None:
  """Raises ValueError where a mesh axis splits the positions of rows."""
  if parts('T') > 1:
    raise ValueError('a cache has all positions of its rows, and the mesh splits them over '
                     f'{", ".join(axes_of("T"))}; trace the program in sharding.whole_rows()')


def local_rows(rows: int, mesh: Mesh) -> range:
  """Returns the rows of a global batch that the devices of this process hold."""
  slices = [indices[0] for indices in row_layout(mesh).addressable_devices_indices_map((rows,)).values()]
  return range(min(s.start or 0 for s in slices), max(rows if s.stop is None else s.stop for s in slices))


def shard_rows(batch, mesh: Mesh):
  """Returns a tree of global arrays `[B, ...]` on the devices, from this process's rows `[b, ...]`."""
  return jax.make_array_from_process_local_data(row_layout(mesh), batch)   # one call takes less time than many
