"""Meshes of some of the host's devices."""
import contextlib
import math
import re

import jax

from lm import sharding


def of_first_devices(shape: str) -> jax.sharding.Mesh:
  """Returns a mesh of as many of the first devices as the text needs."""
  return sharding.make_mesh(shape, jax.devices()[:math.prod(int(size) for size in re.findall(r':(\d+)', shape))])


def on(shape: str | None):
  """Sets a mesh of the first devices; none for None."""
  return contextlib.nullcontext() if shape is None else jax.set_mesh(of_first_devices(shape))
