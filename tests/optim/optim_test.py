"""Optimizers equal the formulas of their papers in NumPy, or PyTorch."""
import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.declared import bound
from helpers.slow import slow

from lm import declarations, optim, sharding
from lm.models import transformer
from lm.optim import averaging, groups

PARAMS = {'w': np.array([[1., -2.], [3., 0.5]], 'f4'), 'w_bias': np.array([0.3, -0.7], 'f4')}
GRADS = [{'w': np.array([[0.1, -0.2], [0.3, 0.4]], 'f4'), 'w_bias': np.array([-0.5, 0.2], 'f4')},
         {'w': np.array([[-0.3, 0.1], [0.2, -0.6]], 'f4'), 'w_bias': np.array([0.4, 0.1], 'f4')},
         {'w': np.array([[0.2, 0.2], [-0.1, 0.3]], 'f4'), 'w_bias': np.array([0.1, -0.9], 'f4')}]
RATES = [0.5, 0.25, 0.125]


def schedule(step):
  return 0.5 / 2. ** step


def run(optimizer, grads=GRADS, params=PARAMS, declared=None):
  """Returns the parameters after each step."""
  optimizer = bound(optimizer, params, declared)

  @jax.jit
  def step(params, state, grad):
    updates, state = optimizer.update(grad, state, params)
    return optax.apply_updates(params, updates), state

  state, path = optimizer.init(params), []
  for grad in grads:
    params, state = step(params, state, grad)
    path.append(params)
  return path


def by_hand(rule):
  """Applies `rule(name, p, grads so far, rate) -> p` over the three steps."""
  params, path = {k: p.astype('f8') for k, p in PARAMS.items()}, []
  for i, rate in enumerate(RATES):
    params = {k: rule(k, p, [g[k].astype('f8') for g in GRADS[:i + 1]], rate) for k, p in params.items()}
    path.append(params)
  return path


def average(decay, values):
  """Returns (1 - decay) sum_i decay^(n - i) x_i, a running mean that starts at zero."""
  return sum((1 - decay) * decay ** (len(values) - 1 - i) * x for i, x in enumerate(values))


def adam(grads, b1, b2, eps):
  n = len(grads)
  mean, square = average(b1, grads) / (1 - b1 ** n), average(b2, [g ** 2 for g in grads]) / (1 - b2 ** n)
  return mean / (np.sqrt(square) + eps)


def adan(grads, b1, b2, b3, eps):
  """The paper's betas are 1 - b here; m, v and n are corrected for their start at zero, as in the authors' code."""
  n = len(grads)
  changes = [np.zeros_like(grads[0]), *(g - last for last, g in zip(grads, grads[1:]))]
  squares = [(g + b2 * d) ** 2 for g, d in zip(grads, changes)]
  m, v, s = (average(b, x) / (1 - b ** n) for b, x in ((b1, grads), (b2, changes), (b3, squares)))
  return (m + b2 * v) / (np.sqrt(s) + eps)


def nesterov(grads, b1, b2):
  """Returns b1 m + (1 - b1) g in place of Adam's mean; m is corrected as at the next step (Dozat 2016)."""
  n = len(grads)
  mean = b1 * average(b1, grads) / (1 - b1 ** (n + 1)) + (1 - b1) * grads[-1] / (1 - b1 ** n)
  return mean / (np.sqrt(average(b2, [g ** 2 for g in grads]) / (1 - b2 ** n)) + 1e-8)


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
    (optim.nadamw(schedule, clip=None),
     lambda k, p, g, rate: p - rate * (nesterov(g, 0.9, 0.95) + 0.1 * p * (k == 'w'))),
    (optim.lion(schedule, clip=None), lambda k, p, g, rate: p - rate * (
        np.sign(0.9 * average(0.99, [0 * p, *g[:-1]]) + 0.1 * g[-1]) + p * (k == 'w'))),
    (optim.adan(schedule, clip=None),
     lambda k, p, g, rate: p - rate * (adan(g, 0.98, 0.92, 0.99, 1e-8) + 0.02 * p * (k == 'w'))),
    (optim.sgd(schedule, weight_decay=0.1, decays=groups.matching('*bias')),
     lambda k, p, g, rate: p - rate * (velocity(0.9, g) + 0.1 * p * (k != 'w'))),
], ids=['sgd', 'momentum', 'adam', 'adam_options', 'adamw', 'rmsprop', 'rmsprop_momentum', 'nadamw', 'lion', 'adan',
        'sgd_decay'])
def test_three_steps_are_those_of_the_paper(optimizer, rule):
  for actual, expected in zip(run(optimizer), by_hand(rule), strict=True):
    # 1 - 0.999 in float32 has a relative error of 6e-5, and its root half of that.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-5), actual, expected)


def test_penalties_are_part_of_the_gradient():
  penalised = run(optim.with_penalty(optim.adam(schedule, clip=0.5), l1=0.3, l2=0.7))
  sums = [{k: g + (0.3 * np.sign(p[k]) + 0.7 * p[k]) * (k == 'w') for k, g in grad.items()}
          for grad, p in zip(GRADS, [PARAMS, *penalised])]
  for actual, expected in zip(penalised, run(optim.adam(schedule, clip=0.5), sums), strict=True):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), actual, expected)


def of_torch(make, params, grads):
  """Returns the parameters after each step of PyTorch's optimizer."""
  torch = pytest.importorskip('torch')
  tensors, path = {k: torch.tensor(p, requires_grad=True) for k, p in params.items()}, []
  optimizer = make(torch.optim)(tensors.values(), lr=0.1)
  for grad in grads:
    for k, g in grad.items():
      tensors[k].grad = torch.tensor(g)
    optimizer.step()
    path.append({k: t.detach().numpy().copy() for k, t in tensors.items()})
  return path


def test_adafactor_and_nadam_are_those_of_pytorch():
  random = np.random.default_rng(0)
  shapes = {'w': (130, 150), 'u': (140, 128), 'scale': (7,)}   # large enough to be factored
  draw = lambda size: {k: size * random.normal(size=shape).astype('f4') for k, shape in shapes.items()}
  params, grads = draw(0.5), [draw(1.), draw(1e-3), draw(3.)]
  params['scale'][:] = 0   # at the smallest relative size
  for ours, theirs in (
      (optim.adafactor(lambda step: 0.1), lambda o: functools.partial(o.Adafactor, eps=(1e-30, 1e-3))),
      # Ours has a constant b1, which theirs reaches at the end of its schedule.
      (optim.nadamw(lambda step: 0.1, decays=groups.matching('*'), clip=None), lambda o: functools.partial(
          o.NAdam, betas=(0.9, 0.95), momentum_decay=1e9, weight_decay=0.1, decoupled_weight_decay=True))):
    for actual, expected in zip(run(ours, grads, params), of_torch(theirs, params, grads), strict=True):
      jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6), actual, expected)


def test_adafactor_bounds_and_scales_the_update_of_each_layer_by_itself():
  """Two layers in a stack move as each of them does alone."""
  random = np.random.default_rng(0)
  draw = lambda: {'blocks': {'0': {'up': np.float32(random.normal(size=(2, 4, 3)) * [[[1.]], [[9.]]])}}}
  params, grad = draw(), draw()

  def last(params, grad):
    declared = {'blocks': {'0': {'up': declarations.declare('DF')}}}
    return run(optim.adafactor(lambda step: 0.1), [grad, grad], params, declared)[-1]['blocks']['0']['up']

  both = last(params, grad)
  for layer in range(2):
    one = jax.tree.map(lambda x, layer=layer: x[layer:layer + 1], (params, grad))
    alone = last(*one)
    np.testing.assert_allclose(both[layer], alone[0], rtol=1e-6)


@pytest.mark.parametrize('clip', [0.1, 100.])
def test_clipping_bounds_the_norm_of_the_whole_gradient(clip):
  norm = np.sqrt(sum((g ** 2).sum() for g in GRADS[0].values()))
  moved = run(optim.sgd(schedule, 0., clip=clip), GRADS[:1])[0]
  for name, grad in GRADS[0].items():
    np.testing.assert_allclose(PARAMS[name] - moved[name], 0.5 * grad * min(1, clip / norm), rtol=1e-5)


@pytest.mark.parametrize('make', [optim.adam, optim.adamw, optim.rmsprop])
def test_gradients_are_clipped_to_norm_one_by_default(make):
  large = {k: 100 * g for k, g in GRADS[0].items()}
  unit = {k: g / np.sqrt(sum((x ** 2).sum() for x in GRADS[0].values())) for k, g in GRADS[0].items()}
  # A large eps shows the size of the gradient, which these optimizers would divide away.
  clipped, plain = run(make(schedule, eps=10.), [large])[0], run(make(schedule, eps=10., clip=None), [unit])[0]
  jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), clipped, plain)


OPTIMIZERS = [optim.sgd, optim.adam, optim.adamw, optim.nadamw, optim.rmsprop, optim.adafactor, optim.lion, optim.adan,
              optim.muon, optim.soap, optim.sophia, optim.schedule_free]


def loss(params):
  return sum(jnp.sum(jnp.square(p)) for p in jax.tree.leaves(params))


@pytest.mark.parametrize('make', OPTIMIZERS)
def test_steps_and_states_keep_their_layout_on_a_mesh(make):
  """Updates have the sharding of the parameters, and the state keeps its own."""
  optimizer = averaging.with_average(make(schedule), 0.9) if make is not optim.schedule_free else make(schedule)
  optimizer = optim.with_penalty(optimizer, l1=0.1)
  with jax.set_mesh(sharding.make_mesh('fsdp:4,tensor:2')):
    model = transformer.llama(16, 256, 2, heads=4, max_length=4, tied=False)
    optimizer = optim.bind(optimizer, declarations.of(model))
    params = jax.eval_shape(model.init, jax.random.key(0))
    state = jax.eval_shape(optimizer.init, params)
    step, after = jax.eval_shape(functools.partial(optimizer.update, obj_fn=loss) if make is optim.sophia
                                 else optimizer.update, params, state, params)
  layout = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype, x.ndim and x.sharding), tree)
  assert layout(step) == layout(params) and layout(after) == layout(state)
  # Muon keeps whole momenta; Adafactor keeps rows and columns as vectors.
  if make not in (optim.muon, optim.adafactor):
    split = {x.shape: x.sharding for x in jax.tree.leaves(params)}
    assert all(x.sharding == split[x.shape] for x in jax.tree.leaves(state) if x.shape in split)


@pytest.mark.parametrize('make', OPTIMIZERS)
def test_the_state_tells_the_rate_of_the_last_update(make):
  optimizer = bound(make(schedule), PARAMS)
  state = optimizer.init(PARAMS)
  assert float(optim.learning_rate(state)) == 0.5
  for rate, grad in zip(RATES, GRADS):
    _, state = optimizer.update(grad, state, PARAMS, obj_fn=loss)
    assert float(optim.learning_rate(state)) == rate


@pytest.mark.slow
@pytest.mark.parametrize('make', OPTIMIZERS)
def test_a_number_is_a_constant_rate(make):
  def steps(rate):
    optimizer = bound(make(rate), PARAMS)
    params, state = PARAMS, optimizer.init(PARAMS)
    for grad in GRADS:
      updates, state = optimizer.update(grad, state, params, obj_fn=loss)
      params = optax.apply_updates(params, updates)
      assert float(optim.learning_rate(state)) == np.float32(0.1)
    return params

  expected = steps(lambda step: jnp.float32(0.1))
  for rate in (0.1, groups.Rates(0.1)):
    jax.tree.map(np.testing.assert_array_equal, steps(rate), expected)
  for rate in (0., -1., float('nan')):
    with pytest.raises(ValueError, match=f'the learning rate {rate} is not positive'):
      make(rate)


def test_an_optimizer_that_keeps_no_rate_has_none():
  assert optim.learning_rate(optax.adam(1e-3).init(PARAMS)) is None


@pytest.mark.parametrize('mesh', [None, *slow('fsdp:4,tensor:2')])
def test_muon_orthogonalises_the_matrices_of_blocks_and_is_adam_for_the_rest(mesh):
  with jax.set_mesh(sharding.make_mesh(mesh)) if mesh else contextlib.nullcontext():
    model = transformer.llama(16, 32, 2, heads=4, max_length=4)
    params = jax.jit(model.init)(jax.random.key(0))
    grads = jax.jit(lambda: jax.tree.map(
        lambda p: sharding.constrain(jax.random.normal(jax.random.key(p.size), p.shape), '-' * p.ndim), params))()
    grads = jax.tree.map(lambda g, p: jax.device_put(g, p.sharding), grads, params)
    muon = optim.bind(optim.muon(schedule, weight_decay=0.25, other_rate=3., clip=None), declarations.of(model))
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
