"""FLOPs of training equal closed forms, on meshes, and the log of a run has its MFU."""
import dataclasses
import types

import jax
import numpy as np
import pytest
from helpers.every_run import DECODER, LENGTH, configured
from helpers.meshes import mesh_of
from helpers.runs import RUN, go, logged

from lm import train
from lm.data.rows.stages import Stage
from lm.objectives.next_token import next_token
from lm.studies import costs
from lm.train import flops
from lm.workdir import throughput

HEAD, MATRICES, SCORES = 64 * 8, 4 * 8 * 8 + 3 * 8 * 8, 2 * LENGTH * 8   # multiplications of a token of `DECODER`


@pytest.mark.parametrize('name, forward_and_backward', [
    ('next_token', 6 * (HEAD + MATRICES + SCORES)),
    ('distil', 8 * (HEAD + MATRICES + SCORES)),   # of a teacher of the same shape, only the forward pass
    ('reward', 6 * (MATRICES + SCORES + 8))])
def test_a_token_costs_the_products_with_its_matrices(name, forward_and_backward):
  for mesh in ('fsdp:1', 'fsdp:4,tensor:2'):
    with jax.set_mesh(mesh_of(mesh)):
      assert flops.flops_per_token(configured(name), mesh_of(mesh)) == forward_and_backward


def test_what_is_computed_again_does_not_count():
  with jax.set_mesh(mesh_of('fsdp:1')):
    both = [flops.flops_per_token(dataclasses.replace(configured('next_token'), model=DECODER.clone(remat=remat)),
                                  mesh_of('fsdp:1'))
            for remat in (None, jax.checkpoint_policies.nothing_saveable)]
  assert both[0] == both[1]


def test_only_factors_that_are_trained_have_gradients():
  w, frozen, x = np.zeros((4, 5), 'f4'), np.zeros((5, 6), 'f4'), np.zeros((3, 4), 'f4')

  def once(w, x, frozen):
    return (x @ w) @ frozen

  products = 2 * 3 * 4 * 5, 2 * 3 * 5 * 6
  expected = 2 * products[0] + 2 * products[1]
  assert flops.count_training(once, w, x, frozen) == expected
  assert flops.count_training(jax.jit(jax.checkpoint(once)), w, x, frozen) == expected
  assert flops.count_training(lambda *args: once(*map(jax.lax.stop_gradient, args)), w, x, frozen) == sum(products)

  def repeated(w, x):   # x depends on w from the second iteration on
    return jax.lax.scan(lambda y, _: (y @ w, None), x, None, 7)[0]

  square = np.zeros((4, 4), 'f4')
  assert flops.count_training(repeated, square, x) == 7 * 3 * 2 * 3 * 4 * 4
  chosen = lambda w, x: jax.lax.cond(x.sum() > 0, lambda: x @ w, lambda: x @ x.T @ x)
  assert flops.count_training(chosen, square, x) == 2 * 2 * 3 * 4 * 4
  with pytest.raises(ValueError, match='whose number of iterations is not known'):
    flops.count_training(lambda w, x: jax.lax.while_loop(lambda y: y.sum() < 1, lambda y: y @ w, x), square, x)


@pytest.mark.slow
def test_a_program_costs_the_same_on_every_mesh():
  """This is the cost of all devices together, also where a part is written for one device, as attention is."""
  configuration, counted = dataclasses.replace(configured('next_token'), batch=8), set()
  for mesh in map(mesh_of, ('fsdp:1', 'fsdp:8', 'fsdp:4,tensor:2')):
    with jax.set_mesh(mesh):
      loss = lambda params, batch: next_token().loss(DECODER.apply, params, batch, None)
      params, batch = jax.eval_shape(DECODER.init, jax.random.key(0)), train.abstract_batch(configuration, mesh)
      counted.add((costs.cost(configuration, 'flops', mesh, optimizer=False),
                   flops.count_training(loss, params, batch)))
  (step, training), = counted
  assert training == 6 * (HEAD + MATRICES + SCORES) * 8 * LENGTH
  assert step == training + SCORES * 8 * LENGTH   # the backward pass computes the scores of attention again


def test_the_log_of_a_run_has_its_mfu(tmp_path, monkeypatch, capsys):
  peak = 1e9
  go(tmp_path / 'unknown', evaluate_batches=1)
  assert not logged(tmp_path / 'unknown', 'mfu') and 'MFU' not in capsys.readouterr().out   # a CPU has no known peak
  monkeypatch.setitem(throughput._GPU_PEAK, 'cpu', peak)
  go(tmp_path / 'known', evaluate_batches=1)
  speed, mfu = (logged(tmp_path / 'known', name) for name in ('tokens_per_second', 'mfu'))
  head = 6 * RUN.model.vocab * RUN.model.width   # the head is the only product of this model
  assert speed and mfu == pytest.approx({step: head * value / (2 * peak) for step, value in speed.items()})


def test_short_rows_of_a_warm_up_count_their_own_flops():
  device = types.SimpleNamespace(device_kind='NVIDIA H200')
  with jax.set_mesh(mesh := mesh_of('fsdp:1')):
    cost = flops.flops_by_step(configured('next_token', stages=(Stage(2, 8, LENGTH // 2),)), mesh, [device])
  short, long = (6 * (HEAD + MATRICES + scores) for scores in (SCORES / 2, SCORES))
  assert [cost(step) for step in (1, 2, 3, 6)] == [short, short, long, long]   # the first step is number 1


@pytest.mark.parametrize('kind', ['TPU v99', 'NVIDIA H100 80GB HBM3 MIG 1g.10gb'])
def test_an_unknown_device_is_reported_once(kind, capsys):
  device = types.SimpleNamespace(device_kind=kind, num_cores=1)
  assert flops.flops_by_step(RUN, mesh_of('fsdp:2'), [device, device]) is None
  assert capsys.readouterr().out.count(f'the peak FLOP/s of {kind} is not known') == 1
