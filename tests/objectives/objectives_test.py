"""Losses equal closed forms in NumPy, whole or in chunks, on meshes, and never hold all logits."""
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.losses import ROWS, TIME, VOCAB, WIDTH, assert_close, jit, make_inputs
from helpers.meshes import on

from lm import sharding
from lm.data.batch import Batch, Special
from lm.models import transformer
from lm.objectives import objective
from lm.objectives.next_token import next_token


def closed_form(hidden, head, targets, weights):
  """Returns the loss, its sums, and its gradients: w (softmax - one hot), through the product with the head."""
  hidden, head, weights = (x.astype('f8') for x in (hidden, head, weights))
  logits = hidden @ head.T
  probability = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  one_hot = np.eye(VOCAB)[targets]
  nll = -np.log((probability * one_hot).sum(-1))
  sums = {'nll': nll[weights > 0].sum(), 'tokens': (weights > 0).sum(),
          'correct': (logits.argmax(-1) == targets)[weights > 0].sum()}
  slope = weights[..., None] * (probability - one_hot)
  return (nll * weights).sum(), sums, slope @ head, np.einsum('btv,btd->vd', slope, hidden)


def over_vocabulary(hidden, head, targets, weights):
  loss, sums = objective.over_vocabulary(objective.cross_entropy, hidden, transformer.Head(head), (targets, weights))
  return 3 * loss, sums   # the factor checks that gradients include what follows the loss


@pytest.mark.parametrize('shape,chunk', [
    (None, 8), (None, 1), (None, 3), ('fsdp:8', 5), ('fsdp:2,tensor:4', 4)], ids=str)
def test_the_loss_over_chunks_is_the_whole_loss(shape, chunk, monkeypatch):
  monkeypatch.setattr(objective, 'chunk_length', lambda *sizes: chunk)
  inputs = make_inputs()
  loss, sums, hidden_grad, head_grad = closed_form(*inputs)
  assert 0 < sums['correct'] < sums['tokens'] < ROWS * TIME
  with on(shape):
    inputs = tuple(sharding.constrain(jnp.asarray(x), axes) for x, axes in zip(inputs, ['BTD', 'V-', 'BT', 'BT']))
    both = jit(lambda *args: (over_vocabulary(*args), jax.value_and_grad(over_vocabulary, (0, 1), has_aux=True)(*args)))
    (value, value_sums), ((same, same_sums), grads) = jax.tree.map(np.asarray, both(*inputs))
  assert value == pytest.approx(3 * loss, rel=1e-5)
  assert same == pytest.approx(3 * loss, rel=1e-5)
  for got in (value_sums, same_sums):
    assert {k: float(v) for k, v in got.items()} == pytest.approx(sums, rel=1e-5)
  assert_close(grads[0], 3 * hidden_grad)
  assert_close(grads[1], 3 * head_grad)


def test_gradients_of_many_chunks_add_up_in_float32(monkeypatch):
  """Small gradients added to a large one in bfloat16 would be lost."""
  monkeypatch.setattr(objective, 'chunk_length', lambda *sizes: 1)
  time = 512
  hidden, head = np.ones((1, time, WIDTH)), np.zeros((VOCAB, WIDTH))
  hidden, head = jnp.asarray(hidden, jnp.bfloat16), jnp.asarray(head, jnp.bfloat16)
  targets, weights = np.zeros((1, time), 'i4'), np.ones((1, time), 'f4')
  grad = jit(jax.grad(lambda *args: over_vocabulary(*args)[0], argnums=1))(hidden, head, targets, weights)
  assert grad.dtype == jnp.bfloat16
  expected = 3 * time * (np.full((VOCAB, WIDTH), 1 / VOCAB) - np.eye(VOCAB)[:, :1])
  np.testing.assert_allclose(grad.astype('f4'), expected, rtol=2 ** -7)


def sizes(jaxpr):
  """Yields the number of elements of all that a program computes, including programs inside it."""
  for equation in jaxpr.eqns:
    yield from (math.prod(v.aval.shape) for v in equation.outvars)
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from sizes(inner)


def test_training_never_holds_all_logits(monkeypatch):
  rows, time, vocab = 4, 16, 512
  model = transformer.llama(vocab, 8, 2, heads=2, hidden=8, max_length=time)
  batch = Batch(*np.zeros((2, rows, time), 'i4'), np.ones((rows, time), 'f4'))

  def mean_loss(params):
    loss, weight, _ = next_token().loss(model.apply, params, batch, None)
    return loss / weight

  chunk_length, shapes = objective.chunk_length, jax.eval_shape(model.init, jax.random.key(0))
  largest = {}
  for limit in (rows * time * vocab, rows * 4 * vocab):
    monkeypatch.setattr(objective, 'chunk_length', functools.partial(chunk_length, limit=limit))
    # A new function each time: traces are kept by function.
    largest[limit] = max(sizes(jax.make_jaxpr(jax.value_and_grad(lambda p: mean_loss(p)))(shapes).jaxpr))
  assert largest == {limit: limit for limit in largest}


@pytest.mark.parametrize('shape,devices', [(None, 1), ('fsdp:8', 8), ('fsdp:2,tensor:4', 8)])
def test_chunks_are_the_fewest_that_fit_a_device_and_nearly_equal(shape, devices):
  with on(shape):
    for batch, time, vocab, limit in [(8, 12, 10, 500), (8, 12, 10, 79), (8, 7, 10, 400), (16, 64, 100, 3200),
                                      (8, 12, 10, 10 ** 9), (8, 60, 7, 11 * 7)]:
      chunk = objective.chunk_length(batch, time, vocab, limit)
      fewest = min(math.ceil(time / c) for c in range(1, time + 1) if c == 1 or batch * c * vocab <= limit * devices)
      assert math.ceil(time / chunk) == fewest and chunk == math.ceil(time / fewest)
  assert objective.chunk_length(8, 1024, 50304) * 8 * 50304 <= 2 ** 24


def test_large_logits_do_not_overflow():
  logits = jnp.array([[[1e4, -1e4, 0.], [3e38, 0., -3e38]]])
  loss, sums = objective.cross_entropy(logits, jnp.array([[1, 0]]), jnp.ones((1, 2)))
  assert float(loss) == 2e4
  assert float(sums['correct']) == 1


def test_a_target_is_correct_where_no_logit_is_above_it():
  logits = jnp.array([[[1., 2., 2.], [3., 1., 1.], [0., 1., 2.], [5., 1., 1.]]])
  _, sums = objective.cross_entropy(logits, jnp.array([[2, 1, 2, 0]]), jnp.array([[1., 1., 0.5, 0.]]))
  assert float(sums['correct']) == 2   # a tie, a miss, a hit, and one that does not count
  assert float(sums['tokens']) == 3


def uniform(params, batch, key=None):
  """A model with equal logits, so that each target costs log V."""
  hidden = jnp.zeros((*batch.tokens.shape, 1)) * params
  return transformer.Output(hidden, transformer.Head(jnp.ones((VOCAB, 1))), None)


def packed_batch():
  """Returns rows of two documents and padding, one document, three documents, and none. All weights are 1/2 but one,
  which is 0.
  """
  segments = np.array([[1, 1, 1, 2, 2, 0], [1] * 6, [1, 2, 2, 3, 3, 3], [0] * 6], np.int32)
  weights = 0.5 * (segments > 0).astype('f4')
  weights[2, 0] = 0
  return Batch(np.zeros((4, 6), 'i4'), np.zeros((4, 6), 'i4'), weights, segments=segments)


@pytest.mark.parametrize('denominator,expected', [(objective.token_mean, 1.), (objective.sequence_mean, 8 / 6)])
def test_packed_means_by_hand(denominator, expected):
  """There are 16 targets of weight 1/2 in 6 documents."""
  batch = packed_batch()
  loss, weight, sums = next_token(denominator).loss(uniform, jnp.float32(0), batch, None)
  assert float(loss / weight) == pytest.approx(expected * np.log(VOCAB), rel=1e-6)
  assert float(sums['nll'] / sums['tokens']) == pytest.approx(np.log(VOCAB), rel=1e-6)
  assert float(sums['tokens']) == 16


def test_unpacked_means_by_hand():
  batch = packed_batch()._replace(segments=None)
  assert float(objective.token_mean(batch)) == 8
  assert float(objective.sequence_mean(batch)) == 4


def test_each_token_is_the_target_of_those_before_it():
  tokens = np.array([1, 7, 3, 9, 2], np.int32)
  form, = next_token().forms
  example = form.example(tokens, np.random.default_rng(0), Special(1, 2, 10, ()))
  assert form.ahead
  assert example.tokens.tolist() == [1, 7, 3, 9]
  assert example.targets.tolist() == [7, 3, 9, 2]
  assert example.weights.tolist() == [1, 1, 1, 1]
  assert example.weights.dtype == np.float32
  assert example.bidirectional is None


def test_dropout_reaches_the_model_through_the_objective():
  keys = []

  def apply(params, batch, key=None):
    keys.append(key)
    return uniform(params, batch)

  key = jax.random.key(3)
  next_token().loss(apply, jnp.float32(0), packed_batch(), key)
  next_token().loss(apply, jnp.float32(0), packed_batch(), None)
  assert keys == [key, None]
