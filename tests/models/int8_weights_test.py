"""Weights of int8: their rounding, their products, and answers of a model that has them."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import generate
from lm.data.batch import Batch
from lm.models import gpt2, int8_weights, llama, moe, stack, t5
from lm.models.quantized_decoder import float_weights, with_int8_weights


def initialised(model):
  return jax.jit(model.init)(jax.random.key(0))


def test_rounding_is_within_half_a_step_of_each_output():
  weight = jax.random.normal(jax.random.key(0), (3, 4, 5, 7)) * jnp.exp2(jnp.arange(7.))[None, None, None]
  weight = weight.at[:, :, :, 3].set(0)
  rounded = int8_weights.rounded_weight(weight, (1, 2))   # stacked layers, two axes of inputs, outputs
  step = abs(np.float64(weight)).max((1, 2), keepdims=True) / 127
  error = abs(np.float64(rounded.floats()) - np.float64(weight))
  assert rounded.values.dtype == jnp.int8 and (error <= step * 0.5001).all() and error.max() > 0.4 * step.max()


@pytest.mark.parametrize('block', [1, 40, 2 ** 16])   # of one row, of some rows and a shorter one at the end, of all
def test_products_are_those_of_the_float_weight(block, monkeypatch):
  monkeypatch.setattr(int8_weights, '_BLOCK', block)
  keys = jax.random.split(jax.random.key(0), 3)
  x, w, table = (jax.random.normal(key, shape) for key, shape in zip(keys, ((2, 3, 13), (13, 2, 4), (29, 13))))
  w, table = int8_weights.rounded_weight(w, (0,)), int8_weights.rounded_weight(table, (1,))
  exact_w, exact_table, exact_x = (np.float64(a) for a in (w.values * w.scale, table.values * table.scale, x))
  np.testing.assert_allclose(w.product(x), np.einsum('btd,dnh->btnh', exact_x, exact_w), atol=1e-5)
  np.testing.assert_allclose(table.logits(x), exact_x @ exact_table.T, atol=1e-5)
  ids = jnp.array([[0, 28, 5]])
  np.testing.assert_allclose(table.rows(ids), exact_table[ids], atol=1e-6)


@pytest.mark.parametrize('model', [gpt2(97, 32, 2, 4, max_length=64),
                                   llama(97, 32, 2, 4, kv_heads=2, max_length=64, tied=False)], ids=['gpt2', 'llama'])
def test_a_model_computes_as_with_the_float_weights(model):
  params = initialised(model)
  ours, floats = with_int8_weights(model, params), float_weights(model, params)
  matrices = sum(x.size for x in jax.tree.leaves(ours) if x.dtype == jnp.int8)
  assert matrices > 0.85 * sum(x.size for x in jax.tree.leaves(params))
  batch = Batch(jax.random.randint(jax.random.key(1), (2, 16), 0, 97))
  logits = [jax.jit(lambda p: (out := model.apply(p, batch)).head(out.hidden))(p) for p in (ours, floats, params)]
  np.testing.assert_allclose(logits[0], logits[1], atol=2e-6)
  assert 0 < abs(logits[1] - logits[2]).max() < 0.1 * abs(logits[2]).max()


@pytest.mark.slow
def test_answers_are_bit_identical_in_any_company():
  model = llama(97, 32, 1, 4, kv_heads=2, max_length=48, tied=False)
  params = model.unstack(with_int8_weights(model, initialised(model)))

  def answers(requests):
    scheduler = generate.Scheduler(generate.Engine(model, params, 48, 97, (96,)), 3, (2, 1), pages=0)
    for request in requests:
      scheduler.submit(request)
    numbers = {request: ([], []) for request in requests}
    while scheduler.is_busy:
      for event in scheduler.step():
        numbers[event.request][0].extend(event.ids)
        numbers[event.request][1].extend(event.log_probabilities)
    return numbers

  requests = [generate.Request(np.arange(i, 2 * i + 1), generate.Sampling(0.7), 6, seed=i) for i in (4, 11, 7, 2)]
  together = answers(requests)
  for request in requests:
    assert answers([request])[request] == together[request] != ([], [])


def test_models_that_cannot_have_them_are_refused():
  experts = llama(32, 16, 1, 2, max_length=16)
  block = experts.layers[0].clone(feed_forward=moe.Experts(moe.SoftmaxRouter(2), 2, 8))
  experts = experts.clone(blocks=stack.stacks([block]))
  for model, name in ((experts, 'Experts'), (t5(32, 16, 1, 2), 'EncoderDecoder')):
    with pytest.raises(ValueError, match=f'a model with {name} cannot have weights of int8'):
      with_int8_weights(model, {})
