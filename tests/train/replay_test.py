"""A replay names the layer and the module that was made to overflow: forward, backward only, in the optimizer only."""
import dataclasses
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.meshes import mesh_of
from helpers.runs import RUN, V, go

from lm import optim, train
from lm.models import attention, layers, rotary, stack, transformer
from lm.optim import schedules
from lm.train import not_finite, replay

pytestmark = pytest.mark.usefixtures('compiled_once')


def overflows(gate, up):
  return layers.silu_gated(gate, up) * 1e30 * 1e30


def has_no_gradient(gate, up):
  """The value is that of SiLU. The gradient of sqrt at 0 is infinite, times 0."""
  return layers.silu_gated(gate, up) + jnp.sqrt(0 * gate)


def overflows_in_half(gate, up):
  return layers.silu_gated(gate, up) + jnp.exp(12 + 0 * gate) * 1e-6


class OverflowingNorm(layers.RMSNorm):
  """A norm whose output is infinite, so that the first activation of its module is."""

  def __call__(self, x):
    return x * jnp.inf


def decoder(feed_forward=layers.silu_gated, norm=layers.RMSNorm, dtype=jnp.float32):
  """Returns a decoder whose second block of two has this activation, and this norm before attention."""
  def block(activation, norm):
    return layers.Block(attention.Attention(1, 1, 4, rotary.Rotary()), layers.FeedForward(4, activation),
                        norm(), layers.RMSNorm())
  blocks = [block(layers.silu_gated, layers.RMSNorm), block(feed_forward, norm)]
  return transformer.Transformer(V, 4, stack.stacks(blocks), layers.RMSNorm(), 16, dtype=dtype)


def ruining(step):
  """Returns an optimizer that is that of the run, but whose update of the embedding is infinite at a step."""
  def update(updates, state, params=None):
    factor = jnp.where(state == step - 1, jnp.inf, 1.)
    return {name: jax.tree.map(lambda x: x * factor, tree) if name == 'embedding' else tree
            for name, tree in updates.items()}, state + 1
  return optax.chain(optax.sgd(0.01), optax.GradientTransformation(lambda params: jnp.int32(0), update))


def replayed(workdir, **changes):
  """Returns the lines of a replay of the first step."""
  run, mesh = dataclasses.replace(RUN, **changes), mesh_of('fsdp:2')
  with jax.set_mesh(mesh):
    state = jax.jit(lambda: train.init(run))()
    batch = jax.tree.map(np.asarray, run.data.batches('train', run.objective, run.batch, run.seed)(0))
    not_finite.keep(workdir, 1, state, batch, {'loss': float('nan')})
    return replay.replay(run, workdir, mesh, 1)


@pytest.mark.slow
@pytest.mark.parametrize('settings, accumulate, place, later', [
    ({'feed_forward': overflows}, 2, 'layer 1, feed_forward: output', 'the normalised output of the last layer, '
     'the logits, the loss'),
    ({'norm': OverflowingNorm}, 1, 'layer 1, attention: query',
     'layer 1, attention: key, layer 1, attention: value'),
    ({'feed_forward': has_no_gradient}, 1, 'the gradient of layer 1, feed_forward: gate',
     'the gradient of layer 1, attention: residual, the gradient of layer 1, attention: attended')])
def test_the_layer_and_the_module_are_named(tmp_path, settings, accumulate, place, later):
  """Forward; forward, in an earlier module of the layer; backward only."""
  line, = replayed(tmp_path, model=decoder(**settings), accumulate=accumulate)
  assert line.startswith(f'step 1 in float32: the first that is not finite is {place}; after it: {later}'), line


@pytest.mark.parametrize('step, noticed, message', [
    (3, 4, 'step 4: the loss is nan'), (4, 4, 'step 4: the update made parameters')])
def test_an_update_that_ruins_parameters_is_found_from_the_checkpoint_before(tmp_path, step, noticed, message):
  """It is noticed when they are to be saved, or by the loss of the next step."""
  run = dataclasses.replace(RUN, optimizer=ruining(step), save_every=2, evaluate_every=6)
  with pytest.raises(train.NotFinite, match=f'{message}.*--replay={noticed}'):
    go(tmp_path, run)
  mesh = mesh_of('fsdp:2')
  with jax.set_mesh(mesh):
    first, *others = replay.replay(run, tmp_path, mesh, noticed)
  place = 'the first that is not finite is the update of the optimizer for embedding'
  assert first.startswith(f'step {step} in float32: {place}')
  assert others == ([] if step == noticed else
                    ['the parameters before step 4 are not finite: the update of step 3 made them so'])


def test_parameters_whose_squares_overflow_are_named_by_their_norm(tmp_path):
  run = dataclasses.replace(RUN, optimizer=optim.adamw(schedules.warmup_constant(1e30, 100, 2)))
  with pytest.raises(train.NotFinite, match=r'--replay=(\d)') as error:
    go(tmp_path, run)
  with jax.set_mesh(mesh_of('fsdp:2')):
    lines = replay.replay(run, tmp_path, mesh_of('fsdp:2'), int(re.search(r'--replay=(\d)', str(error.value))[1]))
  assert re.search(r'is the norm of the new parameters, whose largest value is 3\.\de\+29', lines[0]), lines
  assert not any('all values are finite' in line for line in lines), lines


@pytest.mark.slow
def test_what_is_finite_in_float32_is_named_in_the_dtype_of_the_run(tmp_path):
  first, second = replayed(tmp_path, model=decoder(overflows_in_half, dtype=jnp.float16))
  assert first.startswith('step 1 in float16: the first that is not finite is layer 1, feed_forward: output'), first
  assert second == 'step 1 in float32: all values are finite'


def test_a_step_that_is_finite_says_so(tmp_path):
  first, second = replayed(tmp_path)
  assert first == 'step 1 in float32: all values are finite' and 'does not come again' in second
  shutil.rmtree(tmp_path / 'failures')
  (tmp_path / 'checkpoints').mkdir()
  with jax.set_mesh(mesh_of('fsdp:2')):
    assert replay.replay(RUN, tmp_path, mesh_of('fsdp:2'), 1) == [first, f'{tmp_path} has no record of a fault at '
                                                                  'this step']


@pytest.mark.parametrize('step', [0, -1, RUN.steps + 1])
def test_a_step_that_the_run_does_not_have_is_refused(tmp_path, step):
  with pytest.raises(ValueError, match=f'the run has no step {step} to replay, its steps are 1 to'):
    replay.replay(RUN, tmp_path, mesh_of('fsdp:2'), step)
