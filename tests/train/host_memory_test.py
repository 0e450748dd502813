"""The state of the optimizer in the memory of the host: where it lies, and that it changes no result."""
import dataclasses
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import tpu
from helpers.meshes import mesh_of
from helpers.runs import RUN, go, logged, same, saved

from lm import optim, sharding, train
from lm.models import transformer
from lm.optim import averaging
from lm.options import Computation
from lm.train.guard import Guard
from lm.train.run import abstract_batch, abstract_state

ON_HOST = Computation(offload_optimizer=True).apply_to_steps(dataclasses.replace(
    RUN, optimizer=optim.with_average(optim.adamw(0.05), 0.9), guard=Guard(window=4, most=3)))
ON_DEVICES = dataclasses.replace(ON_HOST, offload_optimizer=False)


def kinds(tree):
  return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


def test_it_lies_on_the_host_between_steps():
  mesh = mesh_of('fsdp:2')
  with jax.set_mesh(mesh):
    state = jax.jit(lambda: train.init(ON_HOST))()
    abstract, average = abstract_state(ON_HOST, mesh), averaging.evaluation_params(state.opt_state, state.params)
    step = train.make_step(ON_HOST).lower(abstract, abstract_batch(ON_HOST, mesh)).compile()
  assert jax.tree.map(lambda x: (x.shape, x.sharding), state) == jax.tree.map(lambda x: (x.shape, x.sharding), abstract)
  new = step.output_shardings[0]
  after = {layout.memory_kind for layout, leaf in zip(jax.tree.leaves(new.opt_state), jax.tree.leaves(state.opt_state))
           if leaf.ndim}
  assert kinds(state.opt_state) == after == {'pinned_host'}
  assert kinds(state.params) == kinds(average) == {layout.memory_kind for layout in jax.tree.leaves(new.params)} == {
      'device'}


def test_it_changes_no_result_and_a_run_goes_on_with_it_or_without(tmp_path):
  """Losses and states are the same bits: with it, without it, and by a resume on another mesh that ends it."""
  for name, run in (('host', ON_HOST), ('devices', ON_DEVICES)):
    go(tmp_path / name, run)
  assert logged(tmp_path / 'host') == logged(tmp_path / 'devices')
  assert logged(tmp_path / 'host', 'validation/loss') == logged(tmp_path / 'devices', 'validation/loss')
  assert same(saved(tmp_path / 'host', ON_HOST)[1], saved(tmp_path / 'devices', ON_DEVICES)[1])
  for name, run in (('host', ON_DEVICES), ('devices', ON_HOST)):
    go(tmp_path / name, run, 'fsdp:4', steps=8)
  np.testing.assert_array_equal(*(list(logged(tmp_path / name).values()) for name in ('host', 'devices')))
  assert same(saved(tmp_path / 'host', ON_HOST)[1], saved(tmp_path / 'devices', ON_HOST)[1])


def test_it_is_refused_where_devices_cannot_read_the_memory_of_the_host(monkeypatch, tmp_path):
  device = types.SimpleNamespace(platform='toy', addressable_memories=lambda: [types.SimpleNamespace(kind='hbm')])
  with monkeypatch.context() as patch:
    patch.setattr(jax, 'local_devices', lambda: [device])
    with pytest.raises(ValueError, match='the state of the optimizer .* devices of toy have the memories hbm, and no '
                                         'pinned_host; leave out --offload_optimizer'):
      go(tmp_path, ON_HOST)


@pytest.mark.slow
@pytest.mark.long
def test_on_tpus_its_bytes_are_on_the_host():
  """Between the steps, devices of a slice of four chips have the parameters alone."""
  mesh = sharding.make_mesh('fsdp:4', tpu.devices('v5e:2x2'))
  model = transformer.llama(1024, 512, 2, 4, max_length=256, dtype=jnp.bfloat16)
  run = dataclasses.replace(RUN, model=model, data=dataclasses.replace(RUN.data, length=256), offload_optimizer=True)
  with jax.set_mesh(mesh):
    state = abstract_state(run, mesh)
    memory = train.make_step(run).lower(state, abstract_batch(run, mesh), {}).compile().memory_analysis()
  params, optimizer = (sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                           for leaf in jax.tree.leaves(tree) if leaf.ndim) for tree in (state.params, state.opt_state))
  assert memory.host_argument_size_in_bytes == memory.host_output_size_in_bytes == optimizer
  assert params <= memory.argument_size_in_bytes < 1.01 * params   # the batch and scalars are there too
