"""What is kept of a layer for the backward pass changes memory alone; names that a model lacks are refused."""
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.data.batch import Batch
from lm.models import encoder, transformer
from lm.models.layers import keep_products
from lm.models.rematerialisation import SavePolicy, activation_names
from lm.options import Computation

MODEL = transformer.llama(32, 16, 2, 4, kv_heads=2, max_length=16)
ACTIVATIONS = ['attended', 'gate', 'key', 'query', 'residual', 'up', 'value']


def gradient(model):
  """Returns a function of parameters: the gradient of a loss."""
  batch = Batch(np.random.default_rng(0).integers(0, 32, (2, 16)))
  return jax.jit(jax.grad(lambda params: jnp.sum(model.apply(params, batch).hidden ** 3)))


def test_gradients_are_equal_whatever_is_kept():
  params = jax.jit(MODEL.init)(jax.random.key(0))
  every = gradient(Computation(keep_activations=('all',)).apply(MODEL))(params)
  for names, offload in ((('none',), ()), (('residual', 'up'), ()), (('products',), ('gate', 'up'))):
    grads = gradient(Computation(keep_activations=names, offload=offload).apply(MODEL))(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=2e-6 * abs(b).max()), grads, every)


def test_what_is_named_is_kept_and_on_the_host_where_that_is_wanted():
  params = jax.eval_shape(MODEL.init, jax.random.key(0))

  def stored(**flags):
    return str(gradient(Computation(**flags).apply(MODEL)).trace(params).jaxpr)

  # The scan hands on its carry, and of each layer what is kept: up and gate are [layers, B, T, F].
  shape = 'f32[2,2,16,64]'
  assert shape not in stored(keep_activations=('none',)) and shape not in stored(keep_activations=('residual',))
  assert shape in stored(keep_activations=('up',))
  on_host = stored(keep_activations=('none',), offload=('up',))
  assert 'f32<host>[2,2,16,64]' in on_host and shape not in on_host


def test_names_and_memories_that_do_not_exist_are_refused(monkeypatch):
  assert activation_names(MODEL) == ACTIVATIONS
  with pytest.raises(ValueError, match=f'no activation quarry to keep; it has {", ".join(ACTIVATIONS)}'):
    Computation(keep_activations=('query', 'quarry')).apply(MODEL)
  with pytest.raises(ValueError, match='keep_activations=all,query has all, which stands alone'):
    Computation(keep_activations=('all', 'query')).apply(MODEL)
  with pytest.raises(ValueError, match='no activation router'):
    Computation(offload=('router',)).apply(MODEL)
  with pytest.raises(ValueError, match='--offload=up needs'):
    Computation(keep_activations=('all',), offload=('up',)).apply(MODEL)
  device = types.SimpleNamespace(platform='toy', addressable_memories=lambda: [types.SimpleNamespace(kind='hbm')])
  monkeypatch.setattr(jax, 'local_devices', lambda: [device])
  with pytest.raises(ValueError, match='devices of toy have the memories hbm, and no pinned_host'):
    Computation(offload=('up',)).apply(MODEL)


def test_all_that_is_kept_by_default_exists():
  assert set(activation_names(MODEL)) == set(keep_products.names) - {
      'cross_query', 'cross_key', 'cross_value', 'cross_residual'}
  assert Computation().apply(MODEL).remat is keep_products
  assert Computation(keep_activations=('none',)).apply(encoder.bert(32, 32, 1, 2)).remat == SavePolicy()
