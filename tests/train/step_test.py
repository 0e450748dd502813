"""A step is the same on any mesh and in any number of parts, and refuses a loss of another form."""
import dataclasses

import jax
import numpy as np
import pytest
from helpers.meshes import mesh_of
from helpers.runs import RUN, Bigram, Data, V, go

from lm import optim, sharding, train
from lm.data.batch import Batch
from lm.models import transformer
from lm.objectives import objective
from lm.objectives.next_token import next_token

pytestmark = pytest.mark.usefixtures('compiled_once')


def one_step(run, mesh, batch, state=None):
  """Returns the state and metrics after a step, in NumPy, from a new state or the given one."""
  with jax.set_mesh(mesh_of(mesh)):
    state = jax.jit(lambda: train.init(run))() if state is None else jax.device_put(state, jax.tree.map(
        lambda s: s.sharding, train.abstract_state(run, mesh_of(mesh))))
    before = jax.tree.map(np.array, state)
    return before, jax.tree.map(np.asarray, train.make_step(run)(state, sharding.shard_rows(batch, mesh_of(mesh))))


def test_a_step_of_a_decoder_is_the_same_on_any_mesh():
  model = transformer.llama(V, width=16, layers=1, heads=4, kv_heads=2, hidden=16, max_length=16, dropout=0.1)
  run = dataclasses.replace(RUN, model=model, optimizer=optim.sgd(lambda step: 0.1))
  batch = Data().batches('train', run.objective, 8)(0)
  state, single = one_step(run, 'fsdp:1', batch)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6),
               one_step(run, 'fsdp:4,tensor:2', batch, state)[1], single)


@pytest.mark.parametrize('denominator', [objective.token_mean, objective.sequence_mean])
def test_accumulation_is_one_large_batch(denominator):
  rng = np.random.default_rng(0)
  batch = Data().batches('train', next_token(), 8)(0)
  uneven = rng.random(batch.weights.shape) ** 4 * 3 * rng.integers(2, size=(8, 1))   # some rows have weight zero
  batch = batch._replace(weights=(uneven * batch.weights).astype(np.float32))
  run = dataclasses.replace(RUN, model=Bigram(dropout=0.), objective=next_token(denominator),
                            optimizer=optim.sgd(lambda step: 1.))
  state, whole = one_step(run, 'fsdp:2', batch)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7),
               one_step(dataclasses.replace(run, accumulate=4), 'fsdp:2', batch, state)[1], whole)


@pytest.mark.slow
def test_parts_of_a_step_drop_out_differently():
  run = dataclasses.replace(RUN, model=Bigram(dropout=0.5), optimizer=optim.sgd(lambda step: 0.), accumulate=2)
  one = Data().batches('train', next_token(), 4)(0)
  twice = Batch(*(None if x is None else np.repeat(x, 2, axis=0) for x in one))   # row i goes to part i % 2
  losses = []
  for batch, r in ((twice, run), (one, dataclasses.replace(run, batch=4, accumulate=1))):
    with jax.set_mesh(mesh_of('fsdp:1')):
      state, step = jax.jit(lambda r=r: train.init(r))(), train.make_step(r)
      for _ in range(2):
        state, metrics = step(state, sharding.shard_rows(batch, mesh_of('fsdp:1')))
        losses.append(float(metrics['loss']))
  assert len(set(losses)) == 4   # no two steps are the same


@pytest.mark.parametrize('result, kind', [
    (lambda loss, weight, sums: loss, 'a scalar'),
    (lambda loss, weight, sums: (loss, weight), 'a scalar, a scalar'),
    (lambda loss, weight, sums: (loss, weight, {'nll': loss}), r"a scalar, a scalar, \['nll'\]"),
    (lambda loss, weight, sums: (loss[None], weight, sums), r'an array \[1\], a scalar, .*')])
def test_a_loss_that_returns_something_else_is_refused(result, kind, tmp_path):
  def loss(*args):
    return result(*RUN.objective.loss(*args))
  with pytest.raises(ValueError, match=f'the loss of the objective returned {kind}; return .loss_sum, weight_sum, '):
    go(tmp_path, objective=dataclasses.replace(RUN.objective, loss=loss))
  assert not list(tmp_path.iterdir())
