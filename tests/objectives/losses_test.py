"""Token losses and unlikelihood equal optax, plain formulas and finite differences, on meshes too."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.losses import ROWS, TIME, VOCAB, assert_close, jit, make_inputs
from helpers.meshes import on
from helpers.slow import slow
from jax.test_util import check_grads

from lm import sharding
from lm.data.batch import Batch
from lm.models import transformer
from lm.objectives import losses, objective
from lm.objectives.next_token import next_token
from lm.objectives.unlikelihood import unlikelihood

LOSSES = {
    'nll': ((losses.nll,), lambda z, hot: optax.softmax_cross_entropy(z, hot)),
    'smoothed': ((losses.nll, losses.smoothing(0.1)),
                 lambda z, hot: optax.softmax_cross_entropy(z, optax.smooth_labels(hot, 0.1))),
    'z': ((losses.nll, losses.z_loss(0.3)),
          lambda z, hot: optax.softmax_cross_entropy(z, hot) + 0.3 * jax.nn.logsumexp(z, axis=-1) ** 2),
    'all': ((losses.nll, losses.smoothing(0.2), losses.z_loss(1e-2)),
            lambda z, hot: (optax.softmax_cross_entropy(z, optax.smooth_labels(hot, 0.2))
                            + 1e-2 * jax.nn.logsumexp(z, axis=-1) ** 2))}


@pytest.mark.parametrize('name', ['all', *slow('nll', 'smoothed', 'z')])
@pytest.mark.parametrize('shape', [None, 'fsdp:2,tensor:4'])
def test_losses_and_gradients_are_those_of_optax(name, shape, monkeypatch):
  monkeypatch.setattr(objective, 'chunk_length', lambda *sizes: 3)
  parts, reference = LOSSES[name]
  hidden, head, targets, weights = make_inputs()

  def plain(hidden, head):
    logits = jnp.einsum('btd,vd->btv', hidden, head)
    return jnp.sum(reference(logits, jax.nn.one_hot(targets, VOCAB)) * weights)

  expected = jit(jax.value_and_grad(plain, (0, 1)))(hidden, head)
  with on(shape):
    ours = losses.token_loss(*parts)
    inputs = [sharding.constrain(jnp.asarray(x), axes)
              for x, axes in zip((hidden, head, targets, weights), ('BTD', 'V-', 'BT', 'BT'))]

    def loss(token_loss, hidden, head):
      return objective.over_vocabulary(token_loss, hidden, transformer.Head(head), tuple(inputs[2:]))

    (value, sums), grads = jit(jax.value_and_grad(functools.partial(loss, ours), (0, 1), has_aux=True))(*inputs[:2])
    _, metrics = jit(functools.partial(loss, objective.cross_entropy))(*inputs[:2])
  assert_close(value, expected[0])
  for grad, expected_grad in zip(grads, expected[1]):
    assert_close(grad, expected_grad)
  # The metrics do not depend on the parts of the loss.
  assert jax.tree.map(float, sums) == pytest.approx(jax.tree.map(float, metrics))


def test_gradients_are_finite_differences():
  rng = np.random.default_rng(0)
  logits, targets = rng.normal(size=(2, 3, 5)).astype('f4'), rng.integers(0, 5, (2, 3))
  loss = losses.token_loss(*LOSSES['all'][0])
  check_grads(lambda z: loss(z, targets, jnp.ones((2, 3)))[0], (logits,), 1, modes='rev', atol=1e-2, rtol=1e-2)


def test_large_logits_do_not_overflow():
  smoothed, logits = losses.token_loss(losses.nll, losses.smoothing(0.1)), jnp.array([[[1e4, 0.]]])
  loss, _ = smoothed(logits, jnp.array([[1]]), jnp.ones((1, 1)))
  assert float(loss) == pytest.approx(0.95e4)   # 0.9 of the loss, and half of 0.1


@pytest.mark.parametrize('make', [lambda: losses.smoothing(1.), lambda: losses.smoothing(-0.1),
                                  lambda: losses.z_loss(-1.)])
def test_bad_settings_are_refused(make):
  with pytest.raises(ValueError, match='must be at least 0'):
    make()


def packed():
  """Returns a batch of few different tokens, which recur, in segments with padding and positions of weight zero."""
  rng = np.random.default_rng(3)
  tokens, targets = rng.integers(0, 6, (2, ROWS, TIME)).astype('i4')
  segments = np.sort(rng.integers(0, 3, (ROWS, TIME))).astype('i4')[:, ::-1].copy()
  segments = np.where(segments > 0, 3 - segments, 0).astype('i4')
  weights = rng.uniform(0.5, 2, (ROWS, TIME)) * (segments > 0) * (rng.uniform(size=(ROWS, TIME)) < 0.8)
  return Batch(tokens, targets, weights.astype('f4'), segments=segments)


def repetition(logits, batch):
  """Returns the unlikelihood loss by the paper, one position and one candidate at a time."""
  log_complement = jnp.log(jnp.maximum(1 - jax.nn.softmax(logits), 1e-5))
  total = metric = 0.
  for b in range(ROWS):
    for t in range(TIME):
      before = {int(batch.tokens[b, s]) for s in range(t + 1) if batch.segments[b, s] == batch.segments[b, t]}
      cost = -sum(log_complement[b, t, c] for c in before - {int(batch.targets[b, t])})
      total += batch.weights[b, t] * cost
      metric += (batch.weights[b, t] > 0) * cost
  return total, metric


@pytest.mark.parametrize('shape, chunk', [
    (None, 3), ('fsdp:2,tensor:4', 3), *slow((None, TIME), ('fsdp:8', 5))], ids=str)
def test_unlikelihood_is_the_formula(shape, chunk, monkeypatch):
  monkeypatch.setattr(objective, 'chunk_length', lambda *sizes: chunk)
  hidden, head, _, _ = make_inputs()
  batch = packed()

  def plain(hidden, head):
    logits = jnp.einsum('btd,vd->btv', hidden, head)
    nll = optax.softmax_cross_entropy_with_integer_labels(logits, batch.targets)
    total, metric = repetition(logits, batch)
    return jnp.sum(nll * batch.weights) + 0.7 * total, metric

  (expected, metric), slopes = jax.jit(jax.value_and_grad(plain, (0, 1), has_aux=True))(hidden, head)
  with on(shape):
    placed = jax.tree.map(lambda x: sharding.constrain(jnp.asarray(x), 'BT'), batch)
    inputs = [sharding.constrain(jnp.asarray(x), axes) for x, axes in ((hidden, 'BTD'), (head, 'V-'))]

    def loss(hidden, head):
      outputs = transformer.Output(hidden, transformer.Head(head), None)
      value, weight, sums = unlikelihood(next_token(), 0.7).loss(lambda *args, key: outputs, None, placed, None)
      return value, (weight, sums)

    (value, (weight, sums)), grads = jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(*inputs)
  assert_close(value, expected)
  for grad, slope in zip(grads, slopes):
    assert_close(grad, slope)
  assert float(sums['unlikelihood'][0]) == pytest.approx(float(metric), rel=1e-5)
  assert float(weight) == pytest.approx(batch.weights.sum()) and float(sums['tokens']) == (batch.weights > 0).sum()
