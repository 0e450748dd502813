"""Layers that are a pipeline compute what they compute one after the other."""
import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.experts import KINDS
from helpers.meshes import mesh_of, on, packed_batch, random_params
from helpers.runs import RUN
from helpers.slow import slow

from lm import sharding, train
from lm.models import attention, encoder_decoder, layers, moe, pipeline, rotary, stack, transformer
from lm.models.context import Aux, Context, read
from lm.models.kernels import Visible
from lm.objectives.next_token import next_token
from lm.train import flops
from lm.train.gradient import accumulate_gradients

VOCAB, ROWS, TIME = 32, 8, 8
# These programs are run once: optimising them takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})


def close(a, b, tolerance=5e-6):
  np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * (np.abs(b).max() + 0.01))


def microbatch_of(row, rows, stages, groups):
  """Returns the number of the microbatch of a row, which is row `row % (rows // stages)` of its stage."""
  return row % groups * stages + row // (rows // stages)


@pytest.mark.parametrize('stages, rounds, groups', [(4, 2, 3), *slow((2, 3, 2), (8, 1, 1))])
def test_each_microbatch_goes_through_all_layers_in_order(stages, rounds, groups):
  """Layers that do not commute, beside a loop over them; the sums say how often which pair of both met."""
  rng, rows, depth = np.random.default_rng(0), 2 * stages * groups, stages * rounds
  factors, terms, x, others = (rng.uniform(0.5, 1.5, shape).astype('f4') for shape in (
      (depth, 1, 1, 8), (depth,), (rows, 1, 8), (rows, 1)))
  numbers = np.eye(depth, dtype='f4')

  def layer(weights, microbatch, x, other):
    factor, term, number = weights
    met = jnp.outer(number, jax.nn.one_hot(microbatch, stages * groups))
    return jnp.sin(x * factor + term * other[..., None]), (met, jnp.float32(1))

  def piped(weights, x, others):
    policy = jax.checkpoint_policies.nothing_saveable
    y, sums = pipeline.run(layer, (*weights, numbers), x, others, groups, policy)
    return jnp.sum(y ** 2), (y, sums)

  def plain(weights, x, others):
    for weight in zip(*weights, numbers):
      x, _ = layer(weight, 0, x, others)
    return jnp.sum(x ** 2), x

  gradient = lambda loss, *args: jit(jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True))(*args)
  (value, y), grads = gradient(plain, (factors, terms), x, others)
  with on(f'stage:{stages}'):
    weights = sharding.constrain(factors, 'L--D'), sharding.constrain(terms, 'L')   # exchanged, and cut
    laid_out = [sharding.constrain(a, axes) for a, axes in ((x, 'BTD'), (others, 'BT'))]
    (actual_value, (actual_y, (met, count))), actual_grads = gradient(piped, weights, *laid_out)
  jax.tree.map(close, (actual_value, actual_y, actual_grads), (value, y, grads))
  np.testing.assert_array_equal(met, np.ones((depth, stages * groups)))
  assert count == met.size


class Noise(nn.Module):
  """Adds noise, if there is a key."""

  @nn.compact
  def __call__(self, x_BTD, context, cache=None):
    layers.weight(self, 'unused', 'D', (x_BTD.shape[-1],), nn.initializers.ones)
    keys = context.keys(1)
    noise = 0 if keys[0] is None else jax.random.normal(keys[0], x_BTD.shape, out_sharding=sharding.spec('BTD'))
    return context.tap('output', x_BTD + noise), cache, Aux()


def test_each_layer_has_a_key_for_each_microbatch():
  key, groups, noise = jax.random.key(1), 2, (stack.Stack((Noise(),), 4),)
  with on('stage:2,fsdp:2'):
    x = sharding.constrain(jnp.zeros((ROWS, 2, 4)), 'BTD')
    params = jax.jit(lambda: stack.init(noise, key, x, Context(None, Visible())))()

    def run(key):
      with sharding.pipelined(groups):
        return stack.run(noise, params, x, Context(None, Visible(), key))[0]

    actual = np.asarray(jit(run)(key))
  shape, rows = (ROWS // 4, 2, 4), {}
  for row in range(ROWS):
    rows.setdefault(microbatch_of(row, ROWS, 2, groups), []).append(row)
  for microbatch, own in rows.items():
    keys = [jax.random.fold_in(each, microbatch) for each in jax.random.split(key, 4)]
    close(actual[own], sum(jax.random.normal(jax.random.split(each, 1)[0], shape) for each in keys))
  taps = (('output', read),)
  with (on('stage:2'), pytest.raises(ValueError, match='activations are tapped, output, in a step .* stage'),
        sharding.pipelined(1)):
    jax.eval_shape(lambda: stack.run(noise, params, jnp.zeros((2, 2, 4)), Context(None, Visible(), taps=taps)))


def decoder(mixer, feed_forward, depth):
  block = layers.Block(mixer, feed_forward, layers.RMSNorm(), layers.LayerNorm())
  return transformer.Transformer(VOCAB, 16, stack.stacks([block] * depth), layers.LayerNorm(), TIME, positions=True)


def with_source(batch):
  rng = np.random.default_rng(2)
  segments = np.sort(rng.integers(1, 4, (ROWS, 2 * TIME))).astype('i4')
  return batch._replace(source=rng.integers(0, VOCAB, (ROWS, 2 * TIME)).astype('i4'), source_segments=segments)


LLAMA = transformer.llama(VOCAB, 16, 4, heads=4, hidden=16, max_length=TIME)
GROUPED = attention.Attention(4, 2, 4, rotary.Rotary(), bias=True, sinks=True,
                              scores=attention.AttentionScores(window=5))
EXPERTS = dataclasses.replace(KINDS['qwen2'], balance=(moe.SequenceBalance(0.1),))
MODELS = {'llama': LLAMA, 'stored': LLAMA.clone(remat=None),
          'gpt2': transformer.gpt2(VOCAB, 16, 4, heads=4, max_length=TIME),
          'experts': decoder(GROUPED, EXPERTS, 2),
          't5': encoder_decoder.t5(VOCAB, 16, 2, heads=4, head_size=4, hidden=16)}


def loss_and_gradients(model, mesh, parts=1):
  """Returns the mean loss, the auxiliary loss among it, the sums over targets, and the gradients of the mean loss."""
  def loss(params, batch, key):
    outputs = []

    def apply(*args, **kwargs):
      outputs.append(model.apply(*args, **kwargs))
      return outputs[-1]

    value, weight, sums = next_token().loss(apply, params, batch, key)
    aux = outputs[0].aux.loss
    return value if aux is None else value + weight * aux, (weight, sums)

  with on(mesh):
    batch = packed_batch(VOCAB, ROWS, TIME, 3)
    batch = with_source(batch) if model.reads_source else batch
    rows = batch if mesh is None else sharding.shard_rows(batch, jax.sharding.get_mesh())
    gradient = lambda params, rows: accumulate_gradients(loss, params, rows, None, parts)
    (value, (weight, sums)), grads = jax.tree.map(np.asarray, jit(gradient)(random_params(model), rows))
    return value / weight, sums, jax.tree.map(lambda x: x / weight, grads)


@functools.cache
def on_one_device(name):
  return loss_and_gradients(MODELS[name], None)


@pytest.mark.parametrize('name, mesh, parts', [
    ('llama', 'stage:2,fsdp:2', 2),
    *slow(('gpt2', 'stage:4,tensor:2', 1), ('experts', 'stage:2,context:2,expert:2', 1)),
    *(pytest.param(*case, marks=[pytest.mark.slow, pytest.mark.long]) for case in (
        ('t5', 'stage:2,fsdp:2', 2), ('stored', 'replica:2,stage:4', 1), ('experts', 'stage:2,expert:2,tensor:2', 2)))])
def test_losses_and_gradients_are_those_of_one_device(name, mesh, parts):
  jax.tree.map(close, loss_and_gradients(MODELS[name], mesh, parts), on_one_device(name))


def run_of(model):
  data = dataclasses.replace(RUN.data, length=TIME)
  return dataclasses.replace(RUN, model=model.clone(vocab=RUN.model.vocab), data=data, batch=12)


@pytest.mark.parametrize('run, mesh, message', [
    (run_of(LLAMA.clone(width=24)), 'stage:3', r'repeats of no stack .* \(4\); choose stage:2 or stage:4, or another'),
    (RUN, 'stage:2', r'repeats of no stack .* \(it has none\); leave out the axis stage')])
def test_a_number_of_stages_that_divides_no_stack_is_refused(run, mesh, message):
  with jax.set_mesh(mesh := mesh_of(mesh)), pytest.raises(ValueError, match=message):
    train.check(run, mesh)


def test_the_share_of_idle_iterations_is_that_of_the_schedule():
  """Of 2 groups of microbatches through 4 layers, each of 2 stages computes 8 times in 9 iterations."""
  with on('stage:2,fsdp:2'), sharding.idle_shares() as shares:
    train.check(dataclasses.replace(run_of(LLAMA), batch=8, accumulate=2), mesh_of('stage:2,fsdp:2'))
  assert shares == [1 / 9]


def test_iterations_without_work_do_not_count_as_operations():
  counts = [flops.flops_per_token(run_of(LLAMA), mesh_of(mesh)) for mesh in ('stage:4', 'fsdp:4')]
  assert counts[0] == counts[1] > 0
