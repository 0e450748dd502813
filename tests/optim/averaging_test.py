"""Averages of parameters equal their closed forms, and validation uses them."""
import dataclasses
import functools

import jax
import numpy as np
import optax
import pytest
from helpers.declared import bound
from helpers.runs import RUN, Data, go, same, saved
from helpers.slow import slow

from lm import load, optim
from lm.optim import averaging, schedules
from lm.train import validation

PARAMS = {'w': np.array([[1., -2.], [3., 0.5]], 'f4'), 'b_bias': np.array([0.3, -0.7], 'f4')}
GRADS = [{k: np.random.default_rng(i).normal(size=p.shape).astype('f4') for k, p in PARAMS.items()} for i in range(5)]


def run(optimizer):
  """Returns after each step the trained parameters, the evaluated ones, and the state."""
  optimizer = bound(optimizer, PARAMS)
  update, state, params, path = jax.jit(optimizer.update), optimizer.init(PARAMS), PARAMS, []
  for grad in GRADS:
    updates, state = update(grad, state, params)
    params = optax.apply_updates(params, updates)
    path.append((params, averaging.evaluation_params(state, params), state))
  return path


@pytest.mark.parametrize('decay', [0.5, 0.9999])
def test_the_average_is_that_of_the_closed_form(decay):
  path, plain = run(averaging.with_average(optim.sgd(lambda step: 0.1), decay)), run(optim.sgd(lambda step: 0.1))
  for n, (params, average, state) in enumerate(path, 1):
    assert averaging.has_average(state)
    for name in PARAMS:
      # Averaging does not change the trained parameters.
      np.testing.assert_array_equal(params[name], plain[n - 1][0][name])
      weights = decay ** np.arange(n - 1, -1, -1.)
      expected = sum(w * np.float64(p[name]) for w, (p, *_) in zip(weights, path)) / weights.sum()
      np.testing.assert_allclose(average[name], expected, rtol=1e-5, atol=1e-6)
  assert float(optim.learning_rate(state)) == np.float32(0.1)


def test_schedule_free_is_the_paper_s():
  """Defazio et al. 2024, Algorithm 1: y_t = (1 - b1) z_t + b1 x_t, an Adam step of z at y, and x the weighted mean."""
  rate = lambda step: 0.1 - 0.03 * abs(step - 2)   # the rate rises and falls; the largest so far is the weight
  b1, b2, decay = 0.9, 0.999, 0.1
  z = {k: p.astype('f8') for k, p in PARAMS.items()}
  x, square, total = dict(z), dict.fromkeys(z, 0.), 0.
  for t, (y, evaluated, state) in enumerate(run(optim.schedule_free(rate, decay, b1, b2, clip=None)), 1):
    lr = rate(t - 1)
    weight = max(map(rate, range(t))) ** 2
    total += weight
    for k in z:
      point = (1 - b1) * z[k] + b1 * x[k]
      grad = GRADS[t - 1][k].astype('f8')
      square[k] = b2 * square[k] + (1 - b2) * grad ** 2
      step = grad / (np.sqrt(square[k] / (1 - b2 ** t)) + 1e-8) + decay * point * (k == 'w')
      z[k] = z[k] - lr * step
      x[k] = (1 - weight / total) * x[k] + weight / total * z[k]
      np.testing.assert_allclose(evaluated[k], x[k], rtol=1e-4, atol=1e-5)
      np.testing.assert_allclose(y[k], (1 - b1) * z[k] + b1 * x[k], rtol=1e-4, atol=1e-5)
    assert averaging.has_average(state) and float(optim.learning_rate(state)) == pytest.approx(lr)


def test_steps_left_out_are_no_part_of_a_schedule_free_average():
  """The next step uses the rate of its own number, for the step and as its weight. Skipped steps have no weight."""
  optimizer = bound(optim.schedule_free(lambda step: 0.1 * (step + 1.), 0., 0.9, clip=None), PARAMS)
  _, state = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
  _, state = optimizer.update(PARAMS, optim.advance(state, 5), PARAMS)
  assert float(optim.learning_rate(state)) == pytest.approx(0.7)   # the rate of step 6
  get = functools.partial(optax.tree_utils.tree_get, state)
  assert float(get('max_lr')) == pytest.approx(0.7) and float(get('weight_sum')) == pytest.approx(0.1**2 + 0.7**2)


def test_without_an_average_the_parameters_are_evaluated():
  optimizer = bound(optim.with_penalty(optim.adamw(lambda step: 0.1), l1=1.), PARAMS)
  state = optimizer.init(PARAMS)
  assert averaging.evaluation_params(state, PARAMS) is PARAMS and not averaging.has_average(state)


@pytest.mark.parametrize('inner', [optim.schedule_free(lambda step: 0.1),
                                   averaging.with_average(optim.sgd(lambda step: 0.1), 0.9)])
def test_states_tell_of_their_averages_without_values(inner):
  around = optim.with_penalty(inner, l2=0.1)
  assert averaging.has_average(jax.eval_shape(bound(around, PARAMS).init, PARAMS))
  with pytest.raises(ValueError, match='has an average of its own already'):   # an average cannot be averaged again
    jax.eval_shape(bound(averaging.with_average(around, 0.9), PARAMS).init, PARAMS)


@pytest.mark.parametrize('decay', [0., 1., -1., float('nan')])
def test_a_decay_that_does_not_average_is_refused(decay):
  with pytest.raises(ValueError, match=f'the decay {decay} of a moving average'):
    averaging.with_average(optim.sgd(lambda step: 0.1), decay)


class Loadable(Data):
  def load_tokenizer(self, workdir):
    return self.tokenizer


@pytest.mark.parametrize('optimizer', [
    averaging.with_average(optim.adamw(schedules.warmup_constant(0.05, 100, 2)), 0.9),
    *slow(optim.schedule_free(schedules.warmup_constant(0.05, 100, 2)))], ids=['moving', 'schedule_free'])
def test_the_average_is_what_a_run_validates_returns_and_is_opened_with(optimizer, tmp_path, monkeypatch):
  run = dataclasses.replace(RUN, optimizer=optimizer, data=Loadable())
  result = go(tmp_path, run)
  state = saved(tmp_path, run)[1]
  average = jax.tree.map(np.asarray, averaging.evaluation_params(state.opt_state, state.params))
  assert not same(average, state.params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), average, result.params)
  step = validation.make_step(run.model.apply, run.objective, run.data.tokenizer)
  held_out = run.data.batches('validation', run.objective, run.batch, repeat=False)
  with jax.set_mesh(result.mesh):
    losses = [validation.evaluate(step, params, held_out, result.mesh, 20)['loss'] for params in (average,
                                                                                                  state.params)]
    monkeypatch.setattr(load, 'open_run', lambda workdir: run)
    opened = load.open_trained(tmp_path)
  assert result.metrics['validation/loss'] == pytest.approx(losses[0], rel=1e-6)
  assert result.metrics['validation/loss'] != pytest.approx(losses[1], rel=1e-4)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), average, opened.params)
