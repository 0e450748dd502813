"""Meshes of the first devices of the host."""
import contextlib
import math
import re

import jax
import numpy as np

from lm import sharding
from lm.data.batch import Batch


def mesh_of(shape: str) -> jax.sharding.Mesh:
  """Returns a mesh of this shape, such as `fsdp:2,tensor:4`, of as many of the first devices as it needs."""
  return sharding.make_mesh(shape, jax.devices()[:math.prod(int(size) for size in re.findall(r':(\d+)', shape))])


def on(shape: str | None):
  """Returns a context that sets a mesh of this shape of the first devices; for None, one that sets no mesh."""
  return contextlib.nullcontext() if shape is None else jax.set_mesh(mesh_of(shape))


def packed_batch(vocab: int, rows: int, time: int, documents: int) -> Batch:
  """Returns random rows of at most so many documents, with weights of the targets."""
  rng = np.random.default_rng(1)
  tokens, targets = rng.integers(0, vocab, (2, rows, time)).astype('i4')
  segments = np.sort(rng.integers(1, documents + 1, (rows, time))).astype('i4')
  positions = np.stack([np.arange(time) - np.searchsorted(row, row) for row in segments]).astype('i4')
  return Batch(tokens, targets, rng.uniform(0, 2, (rows, time)).astype('f4'), positions, segments)


def random_params(model):
  """Returns random parameters as a run lays them out on the current mesh; the same values on any."""
  rng, mesh = np.random.default_rng(0), jax.sharding.get_mesh()

  def place(like):
    x = (0.3 * rng.normal(size=like.shape)).astype('f4')
    return x if mesh.empty else jax.device_put(x, jax.sharding.NamedSharding(mesh, like.sharding.spec))
  return jax.tree.map(place, jax.eval_shape(model.init, jax.random.key(0)))
