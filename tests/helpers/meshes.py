"""Meshes of the first devices of the host."""
import contextlib
import math
import re

import jax

from lm import sharding


def mesh_of(shape: str) -> jax.sharding.Mesh:
  """Returns a mesh of this shape, such as `fsdp:2,tensor:4`, of as many of the first devices as it needs."""
  return sharding.make_mesh(shape, jax.devices()[:math.prod(int(size) for size in re.findall(r':(\d+)', shape))])


def on(shape: str | None):
  """Returns a context that sets a mesh of this shape of the first devices; for None, one that sets no mesh."""
  return contextlib.nullcontext() if shape is None else jax.set_mesh(mesh_of(shape))
