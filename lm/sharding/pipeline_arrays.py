"""Arrays of a pipeline: layers and groups of rows, split over the mesh axis of stages.

At rest, the stages split rows and weights as `fsdp` does. For a step of training, weights are exchanged for whole
layers: of R * S layers, stage s of S has the layers s, S + s, 2 S + s, ..., one for each of R rounds. The rows of a
stage are cut into groups; a group of all stages is S microbatches, that of stage s being number s. So rows move only
along the pipeline.

All arrays of a pipeline are led by the axis of stages, [S, ...], of which each device has one entry.
"""
import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P

from lm.sharding.axes import STAGE, axes_of, entry_of, is_laid_out, names_of


@dataclasses.dataclass
class _Pipeline:
  """Groups of rows, and the repeats of the stacks so far, which are in the pipeline if the stages divide them."""
  groups: int
  repeats: list[int]


_pipeline = contextvars.ContextVar('pipeline', default=None)
_shares: contextvars.ContextVar[list[float] | None] = contextvars.ContextVar('shares', default=None)


def number_of_stages(mesh: Mesh | AbstractMesh | None = None) -> int:
  """Returns the number of stages of the given mesh or the one in use; 1 without a pipeline."""
  mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
  return mesh.shape.get(STAGE, 1)


@contextlib.contextmanager
def pipelined(groups: int) -> Iterator[None]:
  """A context in which stacks of layers are computed as pipelines, with so many groups of rows.

  Raises:
    ValueError: none of the stacks in it can be split over the stages of the mesh.
  """
  pipeline = _Pipeline(groups, [])
  token = _pipeline.set(pipeline)
  try:
    yield
  finally:
    _pipeline.reset(token)
  stages, repeats = number_of_stages(), pipeline.repeats
  if all(number % stages for number in repeats):
    most = max(repeats, default=1)
    fits = [f'stage:{size}' for size in range(2, most + 1) if most % size == 0]
    advice = f'choose {" or ".join(fits)}, or another number of layers' if fits else 'leave out the axis stage'
    raise ValueError(f'the mesh has stage:{stages}, which divides the repeats of no stack of layers of the model '
                     f'({", ".join(map(str, repeats)) or "it has none"}); {advice}')
  if _shares.get() is not None:
    idle = [stages - 1 for number in repeats if number % stages == 0]   # iterations of each pipeline
    works = [groups * number for number in repeats if number % stages == 0]
    _shares.get().append(sum(idle) / sum(idle + works))


@contextlib.contextmanager
def idle_shares() -> Iterator[list[float]]:
  """Yields a list that receives, for each pipelined gradient that is traced in this context, its bubble.

  That is the share of the iterations of layers in which a stage has no work.
  """
  token = _shares.set(shares := [])
  try:
    yield shares
  finally:
    _shares.reset(token)


def pipeline_groups(repeats: int) -> int | None:
  """Returns the groups of rows of the pipeline for layers that are repeated so often; None if they have none."""
  pipeline = _pipeline.get()
  if pipeline is None or not is_laid_out():
    return None
  pipeline.repeats.append(repeats)
  return pipeline.groups if repeats % number_of_stages() == 0 else None


def stage_numbers() -> jax.Array:
  """Returns the number of each stage, [S]."""
  return jnp.arange(number_of_stages(), out_sharding=P(STAGE))


def layers_to_stages(layers: Any) -> Any:
  """Returns a tree of arrays [L, ...] as [S, R, ...], where layer r * S + s is entry [s, r].

  An axis that is split over stages is exchanged for that of layers; other arrays are on all stages, and are cut.
  """
  stages = number_of_stages()

  def move(x):
    layout = (*jax.typeof(x).sharding.spec.partitions, *[None] * x.ndim)[:x.ndim]
    split = [axis for axis, entry in enumerate(layout) if STAGE in names_of(entry)]

    def local(x):
      x = x.reshape(-1, stages, *x.shape[1:])
      if not split:
        return jax.lax.dynamic_index_in_dim(x, jax.lax.axis_index(STAGE), 1, keepdims=False)[None]
      x = jax.lax.all_to_all(x, STAGE, split_axis=1, concat_axis=split[0] + 1, tiled=True)
      return jnp.squeeze(x, 1)[None]

    target = [_without_stage(entry) for entry in layout[1:]]
    return jax.shard_map(local, in_specs=P(*layout), out_specs=P(STAGE, None, *target))(x)

  return jax.tree.map(move, layers)


def rows_to_stages(rows: Any, groups: int) -> Any:
  """Returns a tree of arrays [B, ...] as [S, groups, B / (S groups), ...]. Row i goes to group i % groups.

  Raises:
    ValueError: the rows of a device are not a multiple of the groups.
  """
  def move(x):
    layout = (*jax.typeof(x).sharding.spec.partitions, *[None] * x.ndim)[1:x.ndim]
    x = jax.sharding.reshard(x, P(entry_of(axes_of('B')), *layout))

    def local(x):
      if x.shape[0] % groups:
        raise ValueError(f'{x.shape[0]} rows on each device are not a multiple of accumulate={groups}; choose another '
                         'batch, or another number of parts')
      return jnp.moveaxis(x.reshape(-1, groups, *x.shape[1:]), 1, 0)[None]

    target = P(STAGE, None, _without_stage(axes_of('B')), *layout)
    return jax.shard_map(local, out_specs=target)(x)

  return jax.tree.map(move, rows)


def rows_from_stages(x: jax.Array) -> jax.Array:
  """Returns rows [B, ...], given them as `rows_to_stages` returns them."""
  layout = (*jax.typeof(x).sharding.spec.partitions, *[None] * x.ndim)[3:x.ndim]

  def local(x):
    return jnp.moveaxis(x[0], 0, 1).reshape(-1, *x.shape[3:])

  return jax.shard_map(local, out_specs=P(entry_of(axes_of('B')), *layout))(x)


def take_round(layers: Any, numbers_S: jax.Array) -> Any:
  """Returns a tree of arrays [S, R, ...] as [S, ...], with the entry that each stage gives by its number."""
  def take(x):
    layout = jax.typeof(x).sharding.spec.partitions

    def local(x, numbers):
      return jax.lax.dynamic_index_in_dim(x, numbers[0], 1, keepdims=False)

    return jax.shard_map(local, out_specs=P(layout[0], *layout[2:]))(x, numbers_S)

  return jax.tree.map(take, layers)


def choose(is_first_S: jax.Array, first: Any, second: Any) -> Any:
  """Returns a tree of arrays [S, ...]: on each stage those of the first tree if its flag is true, else of the second.

  A scalar flag is for all stages. For the backward pass, only the flags are stored.
  """
  def select(a, b):
    def local(flag, a, b):
      return jax.lax.select(flag if flag.ndim == 0 else flag[0], a, b)

    return jax.shard_map(local, out_specs=jax.typeof(a).sharding.spec)(is_first_S, a, b)

  return jax.tree.map(select, first, second)


def shift(tree: Any, distance: int) -> Any:
  """Returns a tree of arrays [S, ...] where stage s + distance, counted around, has the entries of stage s."""
  stages = number_of_stages()
  pairs = [(stage, (stage + distance) % stages) for stage in range(stages)]

  def move(x):
    return jax.shard_map(lambda x: jax.lax.ppermute(x, STAGE, pairs), out_specs=jax.typeof(x).sharding.spec)(x)

  return jax.tree.map(move, tree)


def _without_stage(entry):
  return entry_of(tuple(axis for axis in names_of(entry) if axis != STAGE))
