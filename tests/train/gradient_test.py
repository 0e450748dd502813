"""Gradients that are clipped by row equal a loop over rows, on any mesh."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.meshes import mesh_of
from helpers.runs import RUN
from helpers.slow import slow

from lm import optim, train
from lm.data.batch import Batch
from lm.models import transformer
from lm.train import gradient

MODEL = transformer.llama(64, 16, 1, heads=2, hidden=24, max_length=8)
BOUND = 0.5


def batch():
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, 64, (16, 9)).astype('i4')
  weights = (rng.uniform(size=(16, 8)) < 0.8).astype('f4')
  weights[3] = 0   # nothing but padding
  return Batch(tokens[:, :-1], tokens[:, 1:], weights, segments=np.ones((16, 8), 'i4'))


@pytest.mark.parametrize(('mesh', 'accumulate'), [('fsdp:4,tensor:2', 1), ('fsdp:8', 2), *slow(('fsdp:8', 1))])
def test_gradients_clipped_by_row_equal_a_plain_loop(mesh, accumulate):
  run = dataclasses.replace(RUN, model=MODEL, batch=16, accumulate=accumulate, gradient=gradient.ClippedByRow(BOUND),
                            optimizer=optim.sgd(lambda step: 1., momentum=0.))
  params = jax.tree.map(lambda x: 3 * np.asarray(x), jax.jit(MODEL.init)(jax.random.key(1)))
  with jax.set_mesh(mesh_of(mesh)):
    layouts = jax.tree.map(lambda x: x.sharding, train.abstract_state(run, mesh_of(mesh)).params)
    state = train.begin(run, jax.device_put(params, layouts))
    rows = jax.tree.map(lambda x: jax.device_put(x, jax.sharding.NamedSharding(mesh_of(mesh), jax.P('fsdp'))), batch())
    new, metrics = train.make_step(run)(state, rows)
  total, losses, norms = None, [], []

  def mean(params, row):
    loss, weight, _ = run.objective.loss(MODEL.apply, params, row, None)
    return loss / jnp.maximum(weight, 1e-30)

  of_row = jax.jit(jax.value_and_grad(mean))
  for i in range(16):
    loss, grads = of_row(params, jax.tree.map(lambda x, i=i: x[i:i + 1], batch()))
    norm = np.sqrt(sum(np.sum(np.square(g)) for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g, norm=norm: g * min(1, BOUND / max(norm, 1e-30)), grads)
    total = grads if total is None else jax.tree.map(jnp.add, total, grads)
    losses.append(loss)
    norms.append(norm)
  assert min(norms) == 0 and np.sum(np.array(norms) > BOUND) > 3
  np.testing.assert_allclose(metrics['loss'], np.mean(losses), rtol=1e-5)
  jax.tree.map(lambda a, b, g: np.testing.assert_allclose(a - b, g / 16, atol=1e-6), params, new.params, total)
