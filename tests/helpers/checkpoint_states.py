"""States to save and to restore on meshes of eight devices, and folders of their checkpoints."""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from lm.workdir import checkpoint


class State(NamedTuple):
  step: Any
  params: Any
  opt_state: Any


def make_mesh(*shape):
  return jax.make_mesh(shape, ('data', 'model'), axis_types=(AxisType.Explicit,) * 2,
                       devices=jax.devices()[:np.prod(shape)])


def make_state(mesh, seed=0, step=1):
  rng = np.random.default_rng(seed)
  put = lambda spec, x: jax.device_put(x, NamedSharding(mesh, spec))
  with jax.set_mesh(mesh):
    params = {'w': put(P('data', 'model'), rng.normal(size=(64, 256)).astype('f4')),
              'h': {'b': put(P('data'), jnp.asarray(rng.normal(size=16), jnp.bfloat16))}}
    optimizer = optax.adamw(1e-3)
    updates, opt_state = optimizer.update(params, optimizer.init(params), params)
    return State(put(P(), np.int32(step)), optax.apply_updates(params, updates), opt_state)


def abstract(state, mesh):
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, x.sharding.spec)),
                      state)


def same_bytes(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  return all(x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
             for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def fill(folder, mesh, steps=(10, 20), metrics=None, **kwargs):
  with checkpoint.Checkpoints(folder, **kwargs) as checkpoints:
    for i, step in enumerate(steps):
      checkpoints.save(step, make_state(mesh, step, step), {'seen': step}, metrics and metrics[i])
  return checkpoint.Checkpoints(folder, **kwargs)
