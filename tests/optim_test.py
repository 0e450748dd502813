"""Optimizers against their papers' formulas, in NumPy; schedules at points worked out by hand."""
import contextlib
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import groups, optim, schedules, sharding
from lm.models import transformer

PARAMS = {'w': np.array([[1., -2.], [3., 0.5]], 'f4'), 'w_bias': np.array([0.3, -0.7], 'f4')}
GRADS = [{'w': np.array([[0.1, -0.2], [0.3, 0.4]], 'f4'), 'w_bias': np.array([-0.5, 0.2], 'f4')},
         {'w': np.array([[-0.3, 0.1], [0.2, -0.6]], 'f4'), 'w_bias': np.array([0.4, 0.1], 'f4')},
         {'w': np.array([[0.2, 0.2], [-0.1, 0.3]], 'f4'), 'w_bias': np.array([0.1, -0.9], 'f4')}]
RATES = [0.5, 0.25, 0.125]


def schedule(step):
  return 0.5 / 2. ** step


def run(optimizer, grads=GRADS):
  """The parameters after each step."""
  @jax.jit
  def step(params, state, grad):
    updates, state = optimizer.update(grad, state, params)
    return optax.apply_updates(params, updates), state

  params, state, path = PARAMS, optimizer.init(PARAMS), []
  for grad in grads:
    params, state = step(params, state, grad)
    path.append(params)
  return path


def by_hand(rule):
  """`rule(name, p, grads so far, rate) -> p`, over the three steps."""
  params, path = {k: p.astype('f8') for k, p in PARAMS.items()}, []
  for i, rate in enumerate(RATES):
    params = {k: rule(k, p, [g[k].astype('f8') for g in GRADS[:i + 1]], rate) for k, p in params.items()}
    path.append(params)
  return path


def average(decay, values):
  """(1 - decay) sum_i decay^(n - i) x_i: a running mean that starts at zero."""
  return sum((1 - decay) * decay ** (len(values) - 1 - i) * x for i, x in enumerate(values))


def adam(grads, b1, b2, eps):
  n = len(grads)
  mean, square = average(b1, grads) / (1 - b1 ** n), average(b2, [g ** 2 for g in grads]) / (1 - b2 ** n)
  return mean / (np.sqrt(square) + eps)


def velocity(decay, values):
  return sum(decay ** (len(values) - 1 - i) * x for i, x in enumerate(values))


def root_mean_square(decay, grads):
  return [g / np.sqrt(average(decay, [x ** 2 for x in grads[:i + 1]]) + 1e-8) for i, g in enumerate(grads)]


@pytest.mark.parametrize('optimizer,rule', [
    (optim.sgd(schedule, momentum=0.), lambda k, p, g, rate: p - rate * g[-1]),
    (optim.sgd(schedule), lambda k, p, g, rate: p - rate * velocity(0.9, g)),
    (optim.adam(schedule, clip=None), lambda k, p, g, rate: p - rate * adam(g, 0.9, 0.999, 1e-8)),
    (optim.adam(schedule, 0.5, 0.7, 0.1, clip=None), lambda k, p, g, rate: p - rate * adam(g, 0.5, 0.7, 0.1)),
    (optim.adamw(schedule, clip=None),
     lambda k, p, g, rate: p - rate * (adam(g, 0.9, 0.95, 1e-8) + 0.1 * p * (k == 'w'))),
    (optim.rmsprop(schedule, clip=None), lambda k, p, g, rate: p - rate * root_mean_square(0.99, g)[-1]),
    (optim.rmsprop(schedule, 0.9, momentum=0.8, clip=None),
     lambda k, p, g, rate: p - rate * velocity(0.8, root_mean_square(0.9, g))),
], ids=['sgd', 'momentum', 'adam', 'adam_options', 'adamw', 'rmsprop', 'rmsprop_momentum'])
def test_three_steps_are_those_of_the_paper(optimizer, rule):
  for actual, expected in zip(run(optimizer), by_hand(rule), strict=True):
    # 1 - 0.999 in float32 is off by 6e-5 of itself, the root of it by half of that.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5), actual, expected)


@pytest.mark.parametrize('clip', [0.1, 100.])
def test_clipping_bounds_the_norm_of_the_whole_gradient(clip):
  norm = np.sqrt(sum((g ** 2).sum() for g in GRADS[0].values()))
  moved = run(optim.sgd(schedule, 0., clip=clip), GRADS[:1])[0]
  for name, grad in GRADS[0].items():
    np.testing.assert_allclose(PARAMS[name] - moved[name], 0.5 * grad * min(1, clip / norm), rtol=1e-5)


@pytest.mark.parametrize('make', [optim.adam, optim.adamw, optim.rmsprop])
def test_gradients_are_clipped_to_one_unless_asked_otherwise(make):
  large = {k: 100 * g for k, g in GRADS[0].items()}
  unit = {k: g / np.sqrt(sum((x ** 2).sum() for x in GRADS[0].values())) for k, g in GRADS[0].items()}
  # A large eps shows the size of the gradient, which these optimizers would divide away.
  clipped, plain = run(make(schedule, eps=10.), [large])[0], run(make(schedule, eps=10., clip=None), [unit])[0]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), clipped, plain)


@pytest.mark.parametrize('make', [optim.sgd, optim.adam, optim.adamw, optim.rmsprop, optim.muon])
def test_the_state_tells_the_rate_of_the_last_update(make):
  optimizer = make(schedule)
  state = optimizer.init(PARAMS)
  assert float(optim.learning_rate(state)) == 0.5
  for rate, grad in zip(RATES, GRADS):
    _, state = optimizer.update(grad, state, PARAMS)
    assert float(optim.learning_rate(state)) == rate


def test_an_optimizer_that_keeps_no_rate_has_none():
  assert optim.learning_rate(optax.adam(1e-3).init(PARAMS)) is None


def test_weight_decay_is_for_matrices_and_tables():
  def names(model, decays):
    mask = groups.decayed(jax.eval_shape(model.init, jax.random.key(0)))
    return {'/'.join(key.key for key in path) for path, x in jax.tree_util.tree_leaves_with_path(mask) if x is decays}

  gpt2 = transformer.gpt2(8, 4, 1, heads=2, max_length=4)
  attention = {f'blocks/0/attention/{name}' for name in ('query', 'key', 'value', 'out')}
  feed_forward = {f'blocks/0/feed_forward/{name}' for name in ('up', 'down')}
  norms = {'norm', 'blocks/0/attention_norm', 'blocks/0/feed_forward_norm'}
  assert names(gpt2, True) == attention | feed_forward | {'embedding', 'positions'}
  assert names(gpt2, False) == ({name + '_bias' for name in attention | feed_forward}
                                | {f'{norm}/{part}' for norm in norms for part in ('scale', 'bias')})
  llama = transformer.llama(8, 4, 1, heads=2, tied=False)
  assert names(llama, True) == attention | feed_forward | {'blocks/0/feed_forward/gate', 'embedding', 'head'}
  assert names(llama, False) == {f'{norm}/scale' for norm in norms}


POINTS = {
    'cosine': (schedules.warmup_cosine(1., 14, 4), {9: 0.1 + 0.9 / 2, 14: 0.1, 99: 0.1, 4 + 10 / 3: 0.1 + 0.9 * 0.75}),
    'cosine_to_zero': (schedules.warmup_cosine(1., 14, 4, final=0.), {9: 0.5, 14: 0.}),
    'linear': (schedules.warmup_linear(1., 14, 4), {5: 0.9, 9: 0.5, 14: 0., 99: 0.}),
    'linear_to_half': (schedules.warmup_linear(1., 14, 4, final=0.5), {9: 0.75, 14: 0.5}),
    'constant': (schedules.warmup_constant(1., 14, 4), {5: 1., 99: 1.}),
    'inverse_sqrt': (schedules.warmup_inverse_sqrt(1., 14, 4), {9: 2 / 3, 16: 0.5, 64: 0.25}),
}


@pytest.mark.parametrize('name', POINTS)
def test_schedules_at_known_points(name):
  rate, points = POINTS[name]
  # The first step moves already, by a fifth of the peak; the fifth is at the peak.
  for step, expected in ({0: 0.2, 1: 0.4, 3: 0.8, 4: 1.} | points).items():
    assert float(rate(jnp.float32(step))) == pytest.approx(expected, abs=1e-6), step


SCHEDULES = [schedules.warmup_cosine, schedules.warmup_linear, schedules.warmup_constant, schedules.warmup_inverse_sqrt]


@pytest.mark.parametrize('make', SCHEDULES)
def test_schedules_scale_with_their_peak_and_may_start_there(make):
  steps = np.arange(20)
  unit, small = jax.vmap(make(1., 14, 4))(steps), jax.vmap(make(3e-4, 14, 4))(steps)
  np.testing.assert_allclose(small, 3e-4 * unit, rtol=1e-5, atol=1e-12)
  assert float(make(0.5, 10, 0)(jnp.int32(0))) == 0.5
  assert np.isfinite(float(make(0.5, 1, 0)(jnp.int32(1))))


@pytest.mark.parametrize('make', SCHEDULES)
@pytest.mark.parametrize('arguments,message', [
    ((1., 10, 10), 'a warm-up of 10 steps does not fit a run of 10'), ((1., 10, -1), 'a warm-up of -1 steps'),
    ((0., 10, 1), 'learning rate 0.0 is not positive'), ((-1e-3, 10, 1), 'learning rate -0.001'),
    ((math.inf, 10, 1), 'learning rate inf'),
])
def test_bad_schedules_say_so(make, arguments, message):
  with pytest.raises(ValueError, match=message):
    make(*arguments)


@pytest.mark.parametrize('mesh', [None, '4x2'])
def test_muon_orthogonalises_the_matrices_of_blocks_and_is_adam_for_the_rest(mesh):
  with jax.set_mesh(sharding.make_mesh(mesh)) if mesh else contextlib.nullcontext():
    params = jax.jit(transformer.llama(16, 32, 2, heads=4, max_length=4).init)(jax.random.key(0))
    grads = jax.jit(lambda: jax.tree.map(
        lambda p: sharding.constrain(jax.random.normal(jax.random.key(p.size), p.shape), '-' * p.ndim), params))()
    grads = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, params)
    muon = optim.muon(schedule, weight_decay=0.25, rest=3., clip=None)
    updates, _ = jax.jit(muon.update)(grads, jax.jit(muon.init)(params), params)
    assert jax.tree.map(lambda u: u.sharding, updates) == jax.tree.map(lambda p: p.sharding, params)
  blocks = {k: np.asarray(v) for k, v in updates['blocks']['0']['attention'].items()}
  for name, inputs in (('query', 1), ('out', 2)):
    grad, param = (np.asarray(tree['blocks']['0']['attention'][name], 'f8') for tree in (grads, params))
    for layer in range(2):
      rows = int(np.prod(grad.shape[1:1 + inputs]))
      u, s, vt = np.linalg.svd(grad[layer].reshape(rows, -1), full_matrices=False)
      step = -blocks[name][layer].reshape(rows, -1) / 0.5 - 0.25 * param[layer].reshape(rows, -1)
      singular = u.T @ step @ vt.T / (0.2 * max(step.shape) ** 0.5)   # u @ vt has the root mean square max ** -0.5
      s = s / np.linalg.norm(s)
      for _ in range(5):                                              # Newton-Schulz, as published: towards 1
        s = 3.4445 * s - 4.7750 * s ** 3 + 2.0315 * s ** 5
      np.testing.assert_allclose(singular, np.diag(s), atol=1e-4)
  for got, grad in ((updates['embedding'], grads['embedding']), (updates['norm']['scale'], grads['norm']['scale'])):
    # Adam's first step with Nesterov: (b1 m + (1 - b1) g) / bias corrections, over |g|; no weight decay.
    expected = (0.9 * 0.1 / (1 - 0.9 ** 2) + 0.1 / (1 - 0.9)) * np.sign(np.asarray(grad))
    np.testing.assert_allclose(np.asarray(got), -0.5 * 3 * expected, rtol=1e-4)
