"""Dropout has one mask a layer, and bfloat16 computes near float32."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.transformers import GPT2, LLAMA, make_batch, random_params

from lm.data.batch import Batch
from lm.models import layers as parts
from lm.models import stack, transformer
from lm.models.context import Aux

# These programs are run once or twice: optimising them takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})
forward = jit(lambda model, params, batch: model.apply(params, batch).hidden, static_argnums=0)


def assert_close(actual, expected, tolerance=2e-5):
  """Asserts that arrays agree within `tolerance` of the largest absolute expected value."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def random_key(seed):
  """Returns a key of the generator that compiles fastest."""
  return jax.random.key(seed, impl='rbg')


def test_dropout_scales_what_it_keeps():
  x, keys = np.ones((100, 1000), 'f4'), [random_key(0), random_key(1)]
  dropout = jit(lambda key: parts.dropout(x, 0.3, key))
  y = dropout(keys[0])
  assert np.mean(np.asarray(y)) == pytest.approx(1, abs=5 * np.sqrt(0.3 / 0.7 / x.size))
  np.testing.assert_allclose(np.unique(y), [0, 1 / 0.7], rtol=1e-6)
  np.testing.assert_array_equal(y, dropout(keys[0]))
  assert np.any(y != dropout(keys[1]))
  assert parts.dropout(x, 0.3, None) is x
  assert parts.dropout(x, 0., keys[0]) is x


def test_dropout_needs_a_key_and_reaches_both_branches_and_the_embedding():
  params, batch = random_params(GPT2), make_batch(False)
  nearly_all = GPT2.clone(dropout=1 - 1e-6,
                          blocks=stack.stacks([block.clone(dropout=1 - 1e-6) for block in GPT2.layers]))
  program = lambda model, key: jax.make_jaxpr(lambda p: model.apply(p, batch, key=key).hidden)(params)
  assert str(program(nearly_all, None)) == str(program(GPT2, None))
  # If all is dropped, the embedding, both branches of a block and their biases are zero.
  bare = jit(lambda key: nearly_all.apply(params, batch, key=key).hidden)(random_key(1))
  assert_close(bare, np.broadcast_to(params['norm']['bias'], bare.shape), 1e-6)


class Coin(nn.Module):
  """A block that adds ones with a dropout of one half, so zeros and twos."""

  @nn.compact
  def __call__(self, x, context, cache=None):
    scale = parts.weight(self, 'scale', '-', (1,), nn.initializers.ones)
    return x + parts.dropout(jnp.broadcast_to(scale[None, None], x.shape), 0.5, context.key), cache, Aux()


class Same(nn.Module):

  @nn.compact
  def __call__(self, x):
    return x + 0 * parts.weight(self, 'scale', '-', (1,), nn.initializers.ones)[None, None]


def test_each_layer_draws_its_own_dropout():
  model = transformer.Transformer(4, 16, stack.stacks([Coin()] * 2), Same(), 16)
  params = {'embedding': np.zeros((4, 16), 'f4'), 'blocks': {'0': {'scale': np.ones((2, 1), 'f4')}},
            'norm': {'scale': np.ones(1, 'f4')}}
  run = jit(lambda key: model.apply(params, Batch(np.zeros((2, 16), 'i4')), key=key).hidden)
  heads = np.asarray(run(random_key(0)))
  assert {0., 2., 4.} == set(heads.ravel().tolist())
  assert abs(np.mean(heads == 2) - 0.5) < 5 * np.sqrt(0.25 / heads.size)
  np.testing.assert_array_equal(heads, run(random_key(0)))
  assert np.any(heads != run(random_key(1)))


def test_bfloat16_computes_near_float32_and_leaves_parameters_alone():
  model, batch = LLAMA.clone(dtype=jnp.bfloat16), make_batch(True)
  params = random_params(model, 0.2)
  out = jax.eval_shape(model.apply, params, batch)
  assert out.hidden.dtype == jnp.bfloat16
  assert jax.eval_shape(lambda head, x: head(x), out.head, out.hidden).dtype == jnp.float32
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  assert {x.dtype for x in jax.tree.leaves(shapes)} == {jnp.dtype('float32')}
  low, high = forward(model, params, batch).astype('f4'), forward(LLAMA, params, batch)
  error = np.abs(low - high).max() / np.abs(high).max()
  assert 1e-4 < error < 0.05
