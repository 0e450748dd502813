"""Weights of int8 and int4: their rounding, their products, and answers of a model that has them."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm import generate
from lm.data.batch import Batch
from lm.models import gpt2, llama, moe, rounded_weights, stack, t5
from lm.models.quantized_decoder import check_weights, float_weights, with_rounded_weights


def initialised(model):
  return jax.jit(model.init)(jax.random.key(0))


def test_rounding_is_within_half_a_step_of_each_output():
  weight = jax.random.normal(jax.random.key(0), (3, 4, 5, 7)) * jnp.exp2(jnp.arange(7.))[None, None, None]
  weight = weight.at[:, :, :, 3].set(0)
  rounded = rounded_weights.rounded_weight(weight, (1, 2))   # stacked layers, two axes of inputs, outputs
  step = abs(np.float64(weight)).max((1, 2), keepdims=True) / 127
  error = abs(np.float64(rounded.floats()) - np.float64(weight))
  assert rounded.values.dtype == jnp.int8 and (error <= step * 0.5001).all() and error.max() > 0.4 * step.max()


def test_groups_of_int4_are_those_of_qwix_and_are_held_in_half_a_byte():
  qwix = pytest.importorskip('qwix')
  weight = jax.random.normal(jax.random.key(0), (2, 3, 64, 10)).at[0, 0, :32, 4].set(0)
  rounded = rounded_weights.grouped_weight(weight, 2)   # stacked layers, two axes of inputs, outputs
  exact = qwix.quantize(weight, jnp.int4, channelwise_axes=(0, 1, 3), tiled_axes={2: 32})
  assert rounded.values.dtype == jnp.int4 and rounded.scale.shape == exact.scale.shape == (2, 3, 2, 10)
  np.testing.assert_array_equal(rounded.floats(), qwix.dequantize(exact))
  program = jax.jit(lambda x: x.astype(jnp.int8)).lower(rounded.values).compile()
  assert program.memory_analysis().argument_size_in_bytes == weight.size // 2   # `nbytes` counts a byte for each


@pytest.mark.parametrize('block', [1, 40, 2 ** 16])   # of one row, of some rows and a shorter one at the end, of all
def test_products_are_those_of_the_float_weight(block, monkeypatch):
  monkeypatch.setattr(rounded_weights, '_BLOCK', block)
  keys = jax.random.split(jax.random.key(0), 3)
  x, w, table = (jax.random.normal(key, shape) for key, shape in zip(keys, ((2, 3, 13), (13, 2, 4), (29, 13))))
  w, table = rounded_weights.rounded_weight(w, (0,)), rounded_weights.rounded_weight(table, (1,))
  exact_w, exact_table, exact_x = (np.float64(a) for a in (w.values * w.scale, table.values * table.scale, x))
  np.testing.assert_allclose(w.product(x), np.einsum('btd,dnh->btnh', exact_x, exact_w), atol=1e-5)
  np.testing.assert_allclose(table.logits(x), exact_x @ exact_table.T, atol=1e-5)
  ids = jnp.array([[0, 28, 5]])
  np.testing.assert_allclose(table.rows(ids), exact_table[ids], atol=1e-6)


@pytest.mark.parametrize('inputs', [(96,), (3, 32), (3, 16)])   # one axis, two axes, and groups of 16
def test_products_of_groups_are_those_of_the_float_weight(inputs):
  rng = np.random.default_rng(0)
  weight = jnp.float32(rng.normal(size=(*inputs, 2, 5)) * 2. ** np.arange(5))
  rounded = rounded_weights.grouped_weight(weight, len(inputs) - 1)
  matrix = np.float64(rounded.floats()).reshape(-1, 2, 5)
  merged = rounded if len(inputs) == 1 else rounded.merge_inputs()
  x = np.float32(rng.normal(size=(2, 3, len(matrix))))
  np.testing.assert_allclose(merged.product(x), np.einsum('bti,inh->btnh', np.float64(x), matrix), atol=3e-4)


@pytest.mark.parametrize('dtype', ['int8', 'int4'])
@pytest.mark.parametrize('model', [gpt2(97, 32, 2, 2, max_length=64),
                                   llama(97, 32, 2, 2, kv_heads=1, max_length=64, tied=False)], ids=['gpt2', 'llama'])
def test_a_model_computes_as_with_the_float_weights(model, dtype):
  params = initialised(model)
  ours, floats = (function(model, params, dtype) for function in (with_rounded_weights, float_weights))
  matrices = sum(x.size for x in jax.tree.leaves(ours) if x.dtype in (jnp.int8, jnp.int4))
  assert matrices > 0.85 * sum(x.size for x in jax.tree.leaves(params))
  assert (dtype == 'int4') == any(x.dtype == jnp.int4 for x in jax.tree.leaves(ours))
  batch = Batch(jax.random.randint(jax.random.key(1), (2, 16), 0, 97))
  logits = [jax.jit(lambda p: (out := model.apply(p, batch)).head(out.hidden))(p) for p in (ours, floats, params)]
  np.testing.assert_allclose(logits[0], logits[1], atol=2e-6)
  error = np.linalg.norm(logits[1] - logits[2]) / np.linalg.norm(logits[2])
  assert 0 < error < (0.05 if dtype == 'int8' else 0.5)   # a step of int4 is 17 times as large


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['int8', 'int4'])
def test_answers_are_bit_identical_in_any_company_and_compile_nothing(dtype):
  model = llama(97, 32, 1, 2, kv_heads=1, max_length=48, tied=False)
  params = model.unstack(with_rounded_weights(model, initialised(model), dtype))

  def answers(requests):
    scheduler = generate.Scheduler(generate.Engine(model, params, 48, 97, (96,)), 3, (2, 1), pages=0)
    scheduler.warm_up()
    for request in requests:
      scheduler.submit(request)
    numbers = {request: ([], []) for request in requests}
    while scheduler.is_busy:
      for event in scheduler.step():
        numbers[event.request][0].extend(event.ids)
        numbers[event.request][1].extend(event.log_probabilities)
    assert scheduler.compilations == 0
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
      with_rounded_weights(model, {}, 'int8')
    check_weights(model, 'float32')
  with pytest.raises(ValueError, match='a matrix with 8 inputs and 32 outputs cannot have weights of int4'):
    check_weights(gpt2(97, 32, 1, 4, max_length=16), 'int4')
