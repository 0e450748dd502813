"""SOAP equals its paper in NumPy and is invariant to rotations; Sophia equals finite differences of gradients."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.declared import bound
from jax.sharding import PartitionSpec as P

from lm import optim, sharding, train
from lm.data import dataset
from lm.data.batch import Batch
from lm.declarations import Role, declare
from lm.models import transformer
from lm.objectives.next_token import next_token


def walk(optimizer, params, gradient, steps, declared=None):
  optimizer = bound(optimizer, params, declared)
  update, state, path = jax.jit(optimizer.update), optimizer.init(params), []
  for i in range(steps):
    updates, state = update(gradient(params, i), state, params)
    params = jax.tree.map(np.asarray, optax.apply_updates(params, updates))
    path.append(params)
  return path


def block(w):
  return {'blocks': {'0': {'up': np.float32(w)}}}


def of(params):
  return params['blocks']['0']['up']


def orthogonal(n, seed):
  return np.linalg.qr(np.random.default_rng(seed).normal(size=(n, n)))[0]


def soap_by_hand(w, grads, rate, b1, b2, every, eps, sides):
  """Algorithm 3 of Vyas et al. 2024 for one matrix. The first gradient sets the bases, as in the authors' code."""
  moments, bases = [0., 0.], [np.eye(n) for n in w.shape]
  mean = square = 0.
  for t, g in enumerate(grads):
    if t > 0:
      rotated = bases[0].T @ g @ bases[1]
      mean, square = b1 * mean + (1 - b1) * g, b2 * square + (1 - b2) * rotated ** 2
      m = bases[0].T @ (mean / (1 - b1 ** t)) @ bases[1]
      w = w - rate * bases[0] @ (m / (np.sqrt(square / (1 - b2 ** t)) + eps)) @ bases[1].T
    moments = [b2 * moments[0] + (1 - b2) * g @ g.T, b2 * moments[1] + (1 - b2) * g.T @ g]
    for side in sides:
      if t == 0:
        bases[side] = np.linalg.eigh(moments[side])[1][:, ::-1]
      elif t % every == 0:
        bases[side] = np.linalg.qr(moments[side] @ bases[side])[0]
  return w


@pytest.mark.parametrize('max_dim,sides', [(10_000, (0, 1)), (4, (0,))])
def test_soap_is_the_paper_s(max_dim, sides):
  random = np.random.default_rng(0)
  w, grads = random.normal(size=(2, 4, 5)), random.normal(size=(7, 2, 4, 5))
  soap = optim.soap(lambda step: 0.1, 0., 0.9, 0.8, 1e-8, precondition_every=2, max_dim=max_dim, clip=None)
  with jax.default_matmul_precision('highest'):
    updated = of(walk(soap, block(w), lambda _, i: block(grads[i]), 7)[-1])
  for layer in range(2):   # each layer alone
    expected = soap_by_hand(w[layer], grads[:, layer], 0.1, 0.9, 0.8, 2, 1e-8, sides)
    np.testing.assert_allclose(updated[layer], expected, atol=2e-3)
  assert np.abs(updated - w).max() > 0.2


def test_soap_is_adam_in_any_rotation():
  """For a quadratic that is diagonal up to rotations of rows and columns, SOAP moves as Adam does without the
  rotations.
  """
  rows, columns = orthogonal(4, 1), orthogonal(4, 2)
  scales, start = np.array([1., 2., 0.5, 1.5]), np.diag([3., -2., 4., 1.])
  arguments = {'b1': 0.9, 'b2': 0.95, 'eps': 0.1, 'clip': None}   # far above the rounding of entries off the diagonal
  adam = walk(optim.adam(lambda step: 0.1, **arguments), block(start[None]),
              lambda p, i: jax.tree.map(lambda x: x * np.float32(scales[None, :, None]), p), 20)
  gradient = lambda p, i: block((rows @ (scales[:, None] * (rows.T @ of(p)[0] @ columns)) @ columns.T)[None])
  soap = walk(optim.soap(lambda step: 0.1, 0., precondition_every=3, **arguments),
              block((rows @ start @ columns.T)[None]), gradient, 21)
  np.testing.assert_allclose(of(soap[0])[0], rows @ start @ columns.T, atol=1e-6)   # the first step only sets the basis
  for a, b in zip(adam, soap[1:], strict=True):
    np.testing.assert_allclose(rows.T @ of(b)[0] @ columns, of(a)[0], atol=2e-3)
  rotated = walk(optim.adam(lambda step: 0.1, **arguments), block((rows @ start @ columns.T)[None]), gradient, 20)
  assert np.abs(rows.T @ of(rotated[-1])[0] @ columns - of(adam[-1])[0]).max() > 0.2   # Adam is not invariant


def test_soap_is_adam_for_all_that_is_no_matrix_of_a_block():
  params = {'embedding': np.ones((4, 3), 'f4'), 'blocks': {'0': {'norm': {'scale': np.ones((2, 3), 'f4')}}}}
  declared = {'embedding': declare('VD', Role.EMBEDDING), 'blocks': {'0': {'norm': {'scale': declare('-')}}}}
  grads = [jax.tree.map(lambda p, i=i: np.float32(np.random.default_rng(i).normal(size=p.shape)), params)
           for i in range(4)]
  soap = walk(optim.soap(lambda step: 0.1, 0., clip=None), params, lambda _, i: grads[i], 4, declared)
  adam = walk(optim.adam(lambda step: 0.1, 0.95, 0.95, clip=None), params, lambda _, i: grads[i + 1], 3, declared)
  for a, b in zip(adam, soap[1:], strict=True):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), a, b)


@pytest.mark.slow
def test_sophia_s_curvature_is_that_of_finite_differences():
  """This covers each function of ours that defines its own gradient: products, attention, the loss."""
  model, objective = transformer.llama(16, 16, 2, heads=2, kv_heads=1, tied=False), next_token()
  tokens = np.random.default_rng(0).integers(0, 16, (8, 9))
  batch = Batch(jnp.array(tokens[:, :-1]), targets=jnp.array(tokens[:, 1:]), weights=jnp.ones((8, 8)))
  with jax.default_matmul_precision('highest'), jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    params = jax.jit(model.init)(jax.random.key(0))
    params['embedding'] = 50 * params['embedding']   # otherwise the first norm is too curved for finite differences

    def loss(params):
      total, weight, _ = objective.loss(model.apply, params, batch, None)
      return total / weight

    estimate = jax.jit(lambda p: optim.hutchinson().update(None, jnp.int32(0), p, obj_fn=loss)[0])(params)
    gradient, step = jax.jit(jax.grad(loss)), 1e-3
    signs = optim.random_signs(params, jnp.int32(0))
    ahead, behind = (gradient(jax.tree.map(lambda p, z, s=s: p + s * step * z, params, signs)) for s in (1, -1))
    for z, curvature, a, b in zip(*map(jax.tree.leaves, (signs, estimate, ahead, behind))):
      expected = z * (a - b) / (2 * step)
      np.testing.assert_allclose(curvature, expected, atol=0.02 * float(jnp.abs(expected).max()) + 1e-5)


def test_sophia_estimates_at_its_interval_and_bounds_its_steps():
  """For a quadratic with a diagonal Hessian H, z * (H z) is the diagonal itself."""
  curvature, calls = np.float32([1., 100.]), []

  def loss(params):
    jax.debug.callback(lambda: calls.append(1))
    return jnp.sum(curvature * jnp.square(params['w'])) / 2

  params, state, h = {'w': jnp.float32([0.3, -0.02])}, None, np.zeros(2)
  sophia = bound(optim.sophia(lambda step: 1., 0., b1=0., b2=0.5, gamma=0.5, curvature_every=3, clip=None), params)
  state, update = sophia.init(params), jax.jit(lambda g, s, p: sophia.update(g, s, p, obj_fn=loss))
  for i in range(5):
    grad = {'w': curvature * params['w']}
    updates, state = update(grad, state, params)
    jax.effects_barrier()
    np.testing.assert_allclose(updates['w'], -np.clip(grad['w'] / np.maximum(0.5 * h, 1e-8), -1, 1), rtol=1e-5)
    if i % 3 == 0:
      h = 0.5 * h + 0.5 * curvature
    assert len(calls) == 1 + i // 3
  with pytest.raises(ValueError, match='sophia needs the loss'):
    sophia.update(grad, state, params)


@pytest.mark.slow
def test_sophia_reads_a_batch_in_the_parts_that_gradients_are_computed_in():
  tokens = np.random.default_rng(0).integers(0, 64, (16, 33))
  batch = Batch(jnp.array(tokens[:, :-1]), targets=jnp.array(tokens[:, 1:]), weights=jnp.ones((16, 32)))
  states, memory = [], []
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    for parts in (1, 8):
      run = train.Run(transformer.llama(64, 32, 2, heads=1), next_token(), dataset.Text(None, None, 32),
                      optim.sophia(lambda step: 1e-3), steps=1, batch=16, accumulate=parts)
      state = jax.jit(lambda run=run: train.init(run))()
      step = jax.jit(train.step_function(run)).lower(state, batch).compile()
      states.append(step(state, batch)[0].opt_state)
      memory.append(step.memory_analysis().temp_size_in_bytes)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(b, a, atol=1e-4 * float(jnp.abs(a).max())), *states)
  assert memory[1] < memory[0] / 3


def test_soap_goes_the_same_way_on_a_mesh():
  random = np.random.default_rng(0)
  w, grads = random.normal(size=(2, 8, 8)), random.normal(size=(4, 2, 8, 8))
  soap = bound(optim.soap(lambda step: 0.1, precondition_every=2), block(w))
  plain = walk(soap, block(w), lambda _, i: block(grads[i]), 4)
  mesh = sharding.make_mesh('fsdp:4,tensor:2')
  with jax.set_mesh(mesh):
    split = functools.partial(jax.tree.map, lambda x: jax.device_put(
        x, jax.sharding.NamedSharding(mesh, P(None, 'fsdp', 'tensor'))))
    params, update = split(block(w)), jax.jit(soap.update)
    state = jax.jit(soap.init)(params)
    for i, expected in enumerate(plain):
      updates, state = update(split(block(grads[i])), state, params)
      params = jax.block_until_ready(jax.tree.map(jnp.add, params, updates))
      np.testing.assert_allclose(of(params), of(expected), atol=1e-4)


def test_signs_differ_by_estimate_and_by_parameter():
  """For a Hessian that is not diagonal, one estimate is wrong, and the mean of many is right."""
  hessian = np.float32([[2., 1.], [1., 3.]])
  loss = lambda params: sum(p @ hessian @ p / 2 for p in params.values())
  params, estimate, estimates = {'a': jnp.zeros(2), 'b': jnp.zeros(2)}, optim.hutchinson(), []
  state, update = estimate.init(params), jax.jit(lambda state: estimate.update(None, state, params, obj_fn=loss))
  for _ in range(200):
    values, state = update(state)
    estimates.append([values['a'], values['b']])
  estimates = np.array(estimates)   # estimates are 2 + 1 and 3 + 1, or 2 - 1 and 3 - 1
  assert set(estimates[:, 0, 0].tolist()) == {1., 3.} and set(estimates[:, 1, 1].tolist()) == {2., 4.}
  np.testing.assert_allclose(estimates.mean(0), [[2, 3], [2, 3]], atol=5 / np.sqrt(200))
  assert abs(np.corrcoef(estimates[:, 0, 0], estimates[:, 1, 0])[0, 1]) < 5 / np.sqrt(200)
