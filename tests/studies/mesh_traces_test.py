"""Traces of a run on several meshes: the same batches, and losses that differ by rounding alone.

This file is also the program of a process of a cluster, whose trace it prints.
"""
import dataclasses
import json
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from helpers import as_shipped, every_run
from helpers.experts import KINDS
from helpers.meshes import mesh_of
from helpers.runs import RUN, Bigram, Data
from processes_test import address, results

from lm import optim, sharding, train
from lm.models import attention, moe, rotary, transformer
from lm.optim import schedules
from lm.studies import mesh_traces

pytestmark = pytest.mark.usefixtures('compiled_once')   # most traces of a test have one program
LENGTH = 16
RUN = dataclasses.replace(
    RUN, model=transformer.llama(260, 32, 2, heads=4, max_length=LENGTH, dropout=0.1), data=Data(length=LENGTH),
    batch=16, steps=20, optimizer=optim.adamw(schedules.warmup_constant(0.01, 100, 2)))


@pytest.fixture(scope='module')
def reference(compiled_once):
  return mesh_traces.trace(RUN, RUN.data, mesh_of('fsdp:1'))


@pytest.fixture(scope='module')
def bound(reference):
  return mesh_traces.bound(reference, mesh_traces.perturbed(RUN, RUN.data, mesh_of('fsdp:1')), RUN.batch * LENGTH)


@pytest.mark.slow
@pytest.mark.parametrize('mesh', [
    'replica:8', 'fsdp:2,context:4', 'replica:2,fsdp:2,tensor:2',
    # Two processes, and a run that goes on, below, have these meshes too.
    *(pytest.param(mesh, marks=pytest.mark.long) for mesh in ('fsdp:8', 'fsdp:4,tensor:2'))])
def test_losses_and_norms_of_20_steps_differ_by_rounding_alone(mesh, reference, bound):
  trace = mesh_traces.trace(RUN, RUN.data, mesh_of(mesh))
  assert trace.batches == reference.batches and len(trace.losses) == 20
  difference = mesh_traces.deviation(trace, reference)
  assert np.all(difference <= bound), (difference / bound).max(axis=1)
  assert np.all(bound < 1e-3) and reference.losses[-1] < 0.9 * reference.losses[0]   # the run learns


@pytest.mark.slow
def test_a_run_goes_on_from_its_checkpoint_on_another_mesh(tmp_path, reference, bound):
  trace = mesh_traces.resumed(RUN, tmp_path, [mesh_of('fsdp:4,tensor:2'), mesh_of('replica:2,fsdp:2')], 10)
  assert trace.mesh == 'fsdp:4,tensor:2, from step 11 on replica:2,fsdp:2'
  assert trace.batches == reference.batches and len(trace.losses) == 20
  difference = mesh_traces.deviation(trace, reference)
  assert np.all(difference <= bound) and difference[0, -1] > 0, (difference / bound).max(axis=1)


def test_a_signal_ends_a_run_that_would_go_on_on_another_mesh(tmp_path, monkeypatch):
  monkeypatch.setattr('lm.train.interrupt.Interrupt.should_stop', lambda self, step: step == 1)
  run = dataclasses.replace(RUN, model=Bigram(), data=Data(), optimizer=optim.adamw(0.01))
  with pytest.raises(train.Stopped):
    mesh_traces.resumed(run, tmp_path, [mesh_of('fsdp:1')] * 2, 10)


@pytest.mark.slow
def test_two_processes_equal_one(reference, bound):
  """Processes of 4 devices each have the batches of one process, and its losses and norms to rounding."""
  root, coordinator = pathlib.Path(__file__).parents[2], address()
  environment = os.environ | {
      'PYTHONPATH': f'{root}:{root / "tests"}',
      'XLA_FLAGS': f'{as_shipped.QUICK} --xla_force_host_platform_device_count=4',
      'JAX_PLATFORMS': 'cpu', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'}
  processes = [subprocess.Popen([sys.executable, __file__, coordinator, str(i)], env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for i in range(2)]
  ends = results(processes)
  assert [process.returncode for process in processes] == [0, 0], ends
  losses, norms, batches = json.loads(ends[0][0].splitlines()[-1])
  assert batches == reference.batches
  trace = mesh_traces.Trace('', np.float64(losses), np.float64(norms), batches, None)
  difference = mesh_traces.deviation(trace, reference)
  assert np.all(difference <= bound), (difference / bound).max(axis=1)


EXPERTS = KINDS['deepseek'].clone(balance=(moe.SequenceBalance(0.1),))


@pytest.mark.slow
@pytest.mark.parametrize('model, mesh', [
    (transformer.llama(260, 32, 2, heads=4, max_length=LENGTH), 'stage:2,fsdp:4'),
    (every_run.decoder(attention.Attention(4, 4, 8, rotary.Rotary()), EXPERTS).clone(vocab=260, width=32),
     'fsdp:2,expert:4')], ids=['pipeline', 'experts'])
def test_losses_and_norms_of_a_pipeline_and_of_experts_differ_by_rounding_alone(model, mesh):
  """Without dropout, whose masks in a pipeline are those of its microbatches."""
  run = dataclasses.replace(RUN, model=model)
  reference = mesh_traces.trace(run, run.data, mesh_of('fsdp:1'))
  bound = mesh_traces.bound(reference, mesh_traces.perturbed(run, run.data, mesh_of('fsdp:1')), run.batch * LENGTH)
  trace = mesh_traces.trace(run, run.data, mesh_of(mesh))
  assert trace.batches == reference.batches
  difference = mesh_traces.deviation(trace, reference)
  assert np.all(difference <= bound), (difference / bound).max(axis=1)


@pytest.mark.slow
def test_another_seed_differs_by_more(reference, bound):
  trace = mesh_traces.trace(dataclasses.replace(RUN, seed=1), RUN.data, mesh_of('fsdp:1'))
  assert trace.batches != reference.batches
  assert np.all(mesh_traces.deviation(trace, reference) > 10 * bound)


def test_the_bound_has_the_rounding_of_a_sum_and_a_multiple_of_the_largest_move():
  make = lambda *losses: mesh_traces.Trace('', np.float64(losses), np.float64(losses), '', {})
  reference = make(1., 2.)
  actual = mesh_traces.bound(reference, [make(1., 2 + 2e-6), make(1 - 1e-6, 2.)], targets=1024)
  np.testing.assert_allclose(actual, np.full((2, 2), 20 * 2 ** -24 + 8e-6), rtol=1e-6)
  np.testing.assert_allclose(mesh_traces.deviation(make(1.5, 2.), reference), [[0.5, 0.5]] * 2)   # the largest so far


if __name__ == '__main__':
  sharding.join(sys.argv[1], 2, int(sys.argv[2]))
  assert (jax.process_count(), jax.device_count()) == (2, 8)
  TRACE = mesh_traces.trace(RUN, RUN.data, sharding.make_mesh('fsdp:8'))
  print(json.dumps([TRACE.losses.tolist(), TRACE.norms.tolist(), TRACE.batches]))
