"""Meshes of devices: made from a text such as `fsdp:8,tensor:4`, or chosen for the devices."""
import math
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh

from lm.sharding.axes import AXES, check_table

RENAMED = {'data': 'fsdp', 'model': 'tensor'}   # names of earlier versions


def make_mesh(shape: str | None = None, devices: Sequence[Any] | None = None) -> Mesh:
  """Returns a mesh from a text such as `'fsdp:4,tensor:2'`; None puts every device on `fsdp`.

  The order of the axes in the text does not matter, and an axis that is left out has size 1. The size -1, for one axis,
  is what remains of the devices. Where the devices are of several slices, `replica` goes across them if its size is a
  multiple of their number.

  Raises:
    ValueError: the text cannot be read, or does not fit the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = _sizes('fsdp:-1' if shape is None else shape, len(devices))
  count = math.prod(sizes.values())
  if count != len(devices):
    raise ValueError(f'mesh {shape!r} needs {count} devices, but JAX sees {len(devices)}; give sizes whose '
                     f'product is {len(devices)}, such as fsdp:{len(devices)}')
  explicit = (AxisType.Explicit,) * len(sizes)
  slices, replicas = len({getattr(device, 'slice_index', 0) for device in devices}), sizes.get('replica', 1)
  if slices > 1 and replicas % slices == 0:
    within = replicas // slices, *list(sizes.values())[1:]
    grid = mesh_utils.create_hybrid_device_mesh(within, (slices, *[1] * (len(sizes) - 1)), devices)
    return Mesh(grid, tuple(sizes), axis_types=explicit)
  return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=explicit, devices=devices)


def choose_mesh(fits: Callable[[AbstractMesh], None], devices: Sequence[Any] | None = None) -> tuple[Mesh, str]:
  """Returns the mesh that is used where none is given, and the reason for it.

  Weights are split over as many devices as they fit, since that needs the least memory; the rest, and slices, hold
  replicas. `fits(mesh)` raises ValueError where a model or a batch does not fit a mesh.

  Raises:
    ValueError: none of the meshes fits; this is the error of the last one.
  """
  devices = jax.devices() if devices is None else devices
  slices, error = len({getattr(device, 'slice_index', 0) for device in devices}), None
  for replicas in (count for count in range(slices, len(devices) + 1) if _divides(count, slices, len(devices))):
    shape = f'replica:{replicas},fsdp:{len(devices) // replicas}'
    try:
      fits(abstract_mesh(shape))
    except ValueError as failure:
      error = failure
      continue
    if replicas == slices == 1:
      reason = 'weights are split over all devices, which needs the least memory'
    elif replicas == slices:
      reason = f'weights are split over the devices of each of the {slices} slices'
    else:
      reason = f'weights are split over {len(devices) // replicas} devices; over more: {error}'
    return make_mesh(shape, devices), reason
  raise error


def _divides(count: int, slices: int, devices: int) -> bool:
  """Whether so many replicas have the same number of devices each, and so many replicas are on each slice."""
  return count % slices == 0 and devices % count == 0


def abstract_mesh(shape: str, device: jax.sharding.AbstractDevice | None = None) -> AbstractMesh:
  """Returns a mesh without devices, on which full-size programs are lowered; `device` is the kind they are lowered for.
  """
  sizes = _sizes(shape)
  return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=(AxisType.Explicit,) * len(sizes),
                      abstract_device=device)


def mesh_text(mesh: Mesh | AbstractMesh) -> str:
  """Returns a mesh as text, such as `'fsdp:4,tensor:2'`."""
  return ','.join(f'{axis}:{size}' for axis, size in mesh.shape.items())


def _sizes(shape: str, devices: int | None = None) -> dict[str, int]:
  """Returns the mesh axes of a size above 1, in the order of `AXES`; fsdp:1 if there is none.

  The size -1 becomes what remains of the number of devices.
  """
  check_table()
  sizes = dict(_parts(shape))
  free = [axis for axis, size in sizes.items() if size == -1]
  if free:
    others = math.prod(size for size in sizes.values() if size > 0)
    if len(free) > 1 or devices is None:
      raise ValueError(f'mesh {shape!r} has the size -1 for {", ".join(free)}; give it to one axis, where the number '
                       'of devices is known')
    if devices % others:
      divisors = [number for number in range(1, devices + 1) if devices % number == 0]
      raise ValueError(f'mesh {shape!r} leaves no whole number of devices for the axis {free[0]}: {others} does not '
                       f'divide the {devices} devices; give other sizes, whose product is '
                       f'{" or ".join(map(str, divisors))}')
    sizes[free[0]] = devices // others
  return {axis: sizes[axis] for axis in AXES if sizes.get(axis, 1) > 1} or {'fsdp': 1}


def _parts(shape: str) -> Iterator[tuple[str, int]]:
  """Yields the axes and sizes of a mesh in text."""
  if re.fullmatch(r'\d+x\d+', shape):
    fsdp, tensor = shape.split('x')
    raise ValueError(f'mesh {shape!r} does not name its axes; write --mesh=fsdp:{fsdp},tensor:{tensor}')
  names = set()
  for part in shape.split(','):
    axis, colon, size = (word.strip() for word in part.partition(':'))
    if not colon:
      raise ValueError(f'mesh {shape!r} has the part {part!r}, which is not AXIS:SIZE; write it as in fsdp:8; the axes '
                       f'are {", ".join(AXES)}')
    if axis not in AXES:
      renamed = f'; it is now called {RENAMED[axis]}' if axis in RENAMED else ''
      raise ValueError(f'mesh {shape!r} has the axis {axis!r}, which does not exist{renamed}; choose from '
                       f'{", ".join(AXES)}')
    if axis in names:
      raise ValueError(f'mesh {shape!r} has the axis {axis} twice; give it once')
    if not re.fullmatch(r'0*[1-9]\d*|-1', size):
      raise ValueError(f'mesh {shape!r} has the size {size!r} for the axis {axis}; give a whole number from 1, or -1 '
                       'for what remains')
    names.add(axis)
    yield axis, int(size)
