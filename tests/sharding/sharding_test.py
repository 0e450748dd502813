"""Numbers are the same on any mesh, and weights are split by the table."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import as_shipped
from helpers.meshes import on
from helpers.slow import slow
from jax.sharding import PartitionSpec as P

from lm import sharding
from lm.data.batch import Batch
from lm.models import attention, rotary, stack, transformer
from lm.models import layers as parts
from lm.models.context import Aux
from lm.objectives.next_token import next_token

MESHES = ['fsdp:1', 'fsdp:8', 'fsdp:4,tensor:2', 'fsdp:2,tensor:4']
VOCAB, ROWS, TIME = 32, 8, 8
# One program with every kind of weight and part: grouped queries, rotary and learned positions, gates, biases.
TURN = rotary.Rotary(scaling=rotary.LongRope((1., 1.), (2., 3.), 4, 1.))   # its factors depend on the length of a text
MODEL = transformer.Transformer(
    VOCAB, 32, stack.stacks([parts.Block(
        attention.Attention(8, 4, 4, TURN, bias=True, scores=attention.AttentionScores(dropout=0.3)),
        parts.FeedForward(16, bias=True), parts.RMSNorm(), parts.LayerNorm(), dropout=0.2)] * 2),
    parts.LayerNorm(), TIME, positions=True, tied=False, dropout=0.2, layer_dropout=stack.stochastic_depth(2, 0.4))
# These programs are run once or twice: optimising them takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})


def random_params(model):
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree.map(lambda x: (0.3 * rng.normal(size=x.shape)).astype('f4'), shapes)


def place(model, params, batch):
  """Returns arrays as a run lays them out: weights by the table, rows over `data`."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return params, batch
  layouts = jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, x.sharding.spec),
                         jax.eval_shape(model.init, jax.random.key(0)))
  return jax.device_put(params, layouts), sharding.shard_rows(batch, mesh)


def packed_batch():
  rng = np.random.default_rng(1)
  tokens, targets = rng.integers(0, VOCAB, (2, ROWS, TIME)).astype('i4')
  segments = np.sort(rng.integers(1, 4, (ROWS, TIME))).astype('i4')
  positions = np.stack([np.arange(TIME) - np.searchsorted(row, row) for row in segments]).astype('i4')
  return Batch(tokens, targets, rng.uniform(0, 2, (ROWS, TIME)).astype('f4'), positions, segments,
               rng.uniform(size=(ROWS, TIME)) < 0.2)


def loss_and_grads(model, params, batch, key):
  def mean_loss(params):
    loss, weight, _ = next_token().loss(model.apply, params, batch, key)
    return loss / weight

  return jax.value_and_grad(mean_loss)(params)


def on_mesh(model, shape, params, batch, *keys):
  """Returns the loss and the gradients for each of the keys."""
  with on(shape):
    inputs, run = place(model, params, batch), jit(functools.partial(loss_and_grads, model))
    return jax.tree.map(np.asarray, [run(*inputs, key) for key in keys])


def assert_same(actual, expected):
  """Asserts equality up to the rounding of float32 sums in another order."""
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * (np.abs(b).max() + 0.01)),
               actual, expected)


@pytest.fixture(scope='module')
def without_mesh():
  first, second = on_mesh(MODEL, None, random_params(MODEL), packed_batch(), jax.random.key(2), jax.random.key(3))
  assert abs(first[0] - second[0]) > 1e-3   # checks that dropout is on, so that the test below covers it
  return first


@pytest.mark.parametrize('shape', ['fsdp:4,tensor:2', *slow('fsdp:1', 'fsdp:8', 'fsdp:2,tensor:4')])
def test_loss_dropout_and_gradients_are_the_same_on_every_mesh(shape, without_mesh):
  result, = on_mesh(MODEL, shape, random_params(MODEL), packed_batch(), jax.random.key(2))
  assert_same(result, without_mesh)


class FeedForwardBlock(nn.Module):

  @nn.compact
  def __call__(self, x, context, cache=None):
    y, aux = parts.FeedForward(8, out_std=0.01, name='feed_forward')(x, context)
    return y, None, aux


def test_initial_parameters_are_the_same_bytes_on_every_mesh():
  model = transformer.Transformer(VOCAB, 16, stack.stacks([FeedForwardBlock()] * 2), parts.RMSNorm(), TIME)
  values = []
  for shape in MESHES:
    with on(shape):
      init = jax.jit(model.init, compiler_options=as_shipped.OPTIONS)
      values.append(jax.tree.map(np.asarray, init(jax.random.key(0))))
  for other in values[1:]:
    jax.tree.map(np.testing.assert_array_equal, other, values[0])
  feed_forward = values[0]['blocks']['0']['feed_forward']
  assert np.std(values[0]['embedding']) == pytest.approx(0.02, rel=0.15)
  assert np.std(feed_forward['down']) == pytest.approx(0.01, rel=0.2)
  layers = feed_forward['up'].reshape(2, -1)
  assert abs(np.corrcoef(layers)[0, 1]) < 0.5   # each layer draws its own
  assert abs(np.corrcoef(layers[0], feed_forward['gate'][0].ravel())[0, 1]) < 0.5


def test_weights_are_split_as_the_table_says():
  with on('fsdp:2,tensor:4'):
    shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
    placed, _ = place(MODEL, random_params(MODEL), packed_batch())
  expected = {
      'embedding': P('tensor', 'fsdp'), 'head': P('tensor', 'fsdp'), 'positions': P(None, 'fsdp'),
      'norm': {'scale': P(None), 'bias': P(None)},
      'blocks': {'0': {
          'attention_norm': {'scale': P(None, None)},
          'feed_forward_norm': {'scale': P(None, None), 'bias': P(None, None)},
          'attention': {
              'query': P(None, 'fsdp', 'tensor', None), 'query_bias': P(None, 'tensor', None),
              'key': P(None, 'fsdp', 'tensor', None), 'key_bias': P(None, 'tensor', None),
              'value': P(None, 'fsdp', 'tensor', None), 'value_bias': P(None, 'tensor', None),
              'out': P(None, 'tensor', None, 'fsdp'), 'out_bias': P(None, None)},
          'feed_forward': {
              'gate': P(None, 'fsdp', 'tensor'), 'gate_bias': P(None, 'tensor'),
              'up': P(None, 'fsdp', 'tensor'), 'up_bias': P(None, 'tensor'),
              'down': P(None, 'tensor', 'fsdp'), 'down_bias': P(None, None)}}}}
  full = lambda spec, x: P(*spec, *[None] * (x.ndim - len(spec)))
  assert jax.tree.map(lambda x: full(x.sharding.spec, x), shapes) == expected
  assert placed['embedding'].addressable_shards[0].data.shape == (32 // 4, 32 // 2)
  assert placed['blocks']['0']['attention']['out'].addressable_shards[0].data.shape == (2, 8 // 4, 4, 32 // 2)


class FlaxBlock(nn.Module):
  """Stock layers of Flax, which know nothing of a mesh with explicit axes."""

  @nn.compact
  def __call__(self, x):
    y = nn.Dense(2 * x.shape[-1])(nn.LayerNorm()(x))
    return x + nn.Dense(x.shape[-1])(nn.gelu(y))


class OwnFeedForward(nn.Module):
  """Shows how a module of stock layers joins in: its parameters are one weight, and the compiler lays out what it
  computes.
  """

  @nn.compact
  def __call__(self, x, context):
    block = FlaxBlock(parent=None)
    params = self.param('flax', lambda key: block.init(key, jnp.zeros((1, 1, x.shape[-1])))['params'])
    apply = lambda params, x: block.apply({'params': params}, x)
    if sharding.spec('') is not None:
      apply = jax.sharding.auto_axes(apply, out_sharding=sharding.spec('BTD'))
    return apply(params, x), Aux()


class OwnBlock(OwnFeedForward):
  """The same as a whole block, without a cache."""

  def __call__(self, x, context, cache=None):
    y, aux = super().__call__(x, context)
    return y, cache, aux


def test_a_block_of_stock_flax_layers_runs_under_data_parallelism():
  model = transformer.Transformer(VOCAB, 16, stack.stacks([OwnBlock()] * 2), parts.RMSNorm(), TIME)
  params, batch = random_params(model), packed_batch()
  expected = on_mesh(model, None, params, batch, None)
  assert all(np.any(g != 0) for g in jax.tree.leaves(expected))
  assert_same(on_mesh(model, 'fsdp:8', params, batch, None), expected)
  inside = MODEL.clone(blocks=stack.stacks([block.clone(feed_forward=OwnFeedForward()) for block in MODEL.layers]))
  with on('fsdp:8'):
    loss, grads = jax.eval_shape(functools.partial(loss_and_grads, inside),
                                 *place(inside, random_params(inside), batch), jax.random.key(0))
  assert loss.shape == ()
  assert grads['blocks']['0']['feed_forward']['flax']['Dense_1']['kernel'].shape == (2, 64, 32)


def abstract_inputs(model, mesh, rows, time):
  def row(dtype):
    return jax.ShapeDtypeStruct((rows, time), dtype, sharding=jax.sharding.NamedSharding(mesh, P('fsdp', None)))

  return (jax.eval_shape(lambda: model.init(jax.random.key(0))),
          Batch(row(jnp.int32), row(jnp.int32), row(jnp.float32), row(jnp.int32), row(jnp.int32)))


def test_gpt2_is_lowered_for_256_abstract_devices():
  mesh = sharding.abstract_mesh('fsdp:64,tensor:4')
  model = transformer.gpt2(dtype=jnp.bfloat16)
  with jax.sharding.use_abstract_mesh(mesh):
    inputs = abstract_inputs(model, mesh, 128, 1024)
    step = jax.jit(functools.partial(loss_and_grads, model, key=None)).trace(*inputs)
    text = step.lower(lowering_platforms=('cpu',)).as_text()
  assert 'num_partitions = 256' in text
  grads = step.out_info[1]
  assert jax.tree.map(lambda g: (g.shape, g.dtype), grads) == jax.tree.map(lambda p: (p.shape, p.dtype), inputs[0])
  assert jax.tree.map(lambda g: g.sharding.spec, grads) == jax.tree.map(lambda p: p.sharding.spec, inputs[0])


@pytest.mark.parametrize('shape', MESHES)
def test_logits_of_one_position_have_the_gradients_of_the_formula(shape):
  """There, the head reads its weights in another order, which must not change the layout of gradients."""
  rng = np.random.default_rng(0)
  hidden, weight = rng.normal(size=(8, 1, 32)).astype('f4'), rng.normal(size=(VOCAB, 32)).astype('f4')
  loss = lambda hidden, weight: jnp.sum(jnp.sin(jnp.einsum('BTD,VD->BTV', hidden, weight)))
  expected = jax.grad(loss, argnums=(0, 1))(hidden, weight)
  with on(shape):
    laid_out = sharding.constrain(hidden, 'BTD'), sharding.constrain(jnp.asarray(weight), 'VD')
    loss = lambda hidden, weight: jnp.sum(jnp.sin(transformer.Head(sharding.gather(weight, 'VD'))(hidden)))
    actual = jit(jax.grad(loss, argnums=(0, 1)))(*laid_out)
  for a, b in zip(actual, expected):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)
