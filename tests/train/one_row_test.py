"""Every objective and every kind of model trains on meshes with one row for each device, in a batch or a part of it."""
import dataclasses

import jax
import numpy as np
import pytest
from helpers.every_run import CASES, DECODER, LENGTH, VOCAB, configured
from helpers.meshes import mesh_of
from helpers.runs import RUN, Bigram
from helpers.slow import slow

from lm import sharding, train
from lm.data.batch import KINDS, Batch
from lm.objectives import (
  next_token,
)
from lm.train import noise_scale


def test_the_cases_are_of_every_kind_of_data():
  assert {objective.needs for _, objective in CASES.values()} == set(KINDS)


@pytest.mark.parametrize('name, mesh, accumulate', [
    *((name, 'fsdp:1', 1) for name in CASES if name != 'experts'), ('next_token', 'fsdp:2', 2),
    *slow(('experts', 'fsdp:1', 1), ('experts', 'fsdp:2', 2), ('experts', 'tensor:2', 1), ('dpo', 'fsdp:2', 2))])
def test_one_row_is_trained_by_any_objective(name, mesh, accumulate):
  rows = accumulate * mesh_of(mesh).shape.get('fsdp', 1)
  with jax.set_mesh(mesh_of(mesh)):
    train.check(configured(name, batch=rows, accumulate=accumulate), mesh_of(mesh))


@pytest.mark.parametrize('mesh', ['fsdp:2', *slow('fsdp:1', 'tensor:2')])
def test_parts_of_one_row_add_up_to_the_batch(mesh):
  run = dataclasses.replace(RUN, model=Bigram(dropout=0., vocab=VOCAB), batch=4)
  rng = np.random.default_rng(0)
  batch = Batch(*rng.integers(0, VOCAB, (2, 4, LENGTH)).astype('i4'), rng.uniform(0.5, 2, (4, LENGTH)).astype('f4'))
  losses = []
  with jax.set_mesh(mesh_of(mesh)):
    rows = sharding.shard_rows(batch, mesh_of(mesh))
    for accumulate in (1, 4 // mesh_of(mesh).shape.get('fsdp', 1)):
      state, step = jax.jit(lambda: train.init(run))(), train.make_step(dataclasses.replace(run, accumulate=accumulate))
      for _ in range(2):
        state, metrics = step(state, rows)
        losses += [float(metrics['loss']), float(metrics['grad_norm'])]
  assert losses[:4] == pytest.approx(losses[4:], rel=1e-5)


def test_the_noise_scale_reads_one_row():
  with jax.set_mesh(mesh_of('fsdp:1')):
    gradient = noise_scale.gradient_of(DECODER.apply, next_token.next_token(), {})
    shapes = jax.eval_shape(gradient, jax.eval_shape(DECODER.init, jax.random.key(0)),
                            train.abstract_batch(configured('next_token', batch=1), mesh_of('fsdp:1')))
  assert shapes[1].shape == ()
