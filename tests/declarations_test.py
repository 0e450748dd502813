"""Optimizers, adapters and muP read what a weight declares, and nothing from its name."""
import dataclasses
import types

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from helpers.slow import slow

from lm import declarations, lora, optim, train
from lm.declarations import Role
from lm.models import encoder, encoder_decoder, latent, layers, moe, mup, prediction_heads, reward, stack
from lm.models.context import Aux
from lm.models.transformer import Transformer, llama
from lm.optim import groups

LLAMA = llama(16, 8, 2, heads=2, kv_heads=1, hidden=12)
EXPERTS = LLAMA.clone(tied=False, blocks=stack.stacks([
    layers.Block(latent.LatentAttention(2, 4, 4, 4, 4, 4), moe.Experts(moe.SigmoidGroupRouter(2), 4, 8, bias=True),
                 layers.RMSNorm(), layers.RMSNorm()), *LLAMA.layers]))
MODELS = {
    'llama': LLAMA, 'experts': EXPERTS, 'reward': reward.Reward(LLAMA), 'depths': prediction_heads.sequential(LLAMA, 2),
    'bert': encoder.bert(16, 8, 2, 2, 8), 't5': encoder_decoder.t5(16, 8, 1, 2, 4, 12, tied=False),
    'adapters': lora.Adapted(EXPERTS, 3, 6.), 'adapters_of_reward': lora.Adapted(reward.Reward(LLAMA), 3, 6.)}


def flat(tree):
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def params_of(weights, seed=0):
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda weight: rng.normal(size=weight.array.shape).astype('f4'), weights)


def first_step(optimizer, weights):
  """Returns what the first update subtracts from the parameters, with random gradients."""
  params, optimizer = params_of(weights), optim.bind(optimizer, weights)
  updates, _ = jax.jit(lambda grads, params: optimizer.update(grads, optimizer.init(params), params))(
      params_of(weights, 1), params)
  return jax.tree.map(lambda x: -np.asarray(x), updates)


def assert_orthogonal(matrices):
  """Asserts that matrices [..., m, n] are orthogonal with Muon's root mean square, up to the error of its iteration."""
  for matrix in matrices.reshape(-1, *matrices.shape[-2:]):
    singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
    assert np.all((singular > 0.6) & (singular < 1.3)), singular


# NAdam's first step: (b1 m + (1 - b1) g) / bias corrections, over |g|.
NADAM = 0.9 * 0.1 / (1 - 0.9 ** 2) + 0.1 / (1 - 0.9)


@pytest.mark.parametrize('name', MODELS)
def test_declarations_are_a_tree_like_the_parameters(name):
  weights = declarations.of(MODELS[name])
  # Evaluated after the declarations, which must leave nothing in the caches of JAX.
  params = jax.eval_shape(MODELS[name].init, jax.random.key(0))
  assert jax.tree.map(lambda weight: (weight.array.shape, weight.array.dtype), weights) == jax.tree.map(
      lambda x: (x.shape, x.dtype), params)
  stacked = {path: weight.stacked for path, weight in flat(weights).items()}
  assert all(count == ('blocks/' in path or 'depths/' in path) for path, count in stacked.items()), stacked


# By hand: [inputs, outputs] in one layer or of one expert, for each matrix.
SIZES = {'query': (8, 8), 'key': (8, 4), 'value': (8, 4), 'out': (8, 8), 'gate': (8, 12), 'up': (8, 12),
         'down': (12, 8)}


@pytest.mark.parametrize('adapted', [False, True])
@pytest.mark.parametrize('model', [LLAMA, reward.Reward(LLAMA)], ids=['llama', 'reward'])
def test_muon_orthogonalises_matrices_and_adapters_and_decays_them_alone(model, adapted):
  weights = declarations.of(lora.Adapted(model, 3, 6.) if adapted else model)
  before, grads, matrices = flat(params_of(weights)), flat(params_of(weights, 1)), 0
  for path, step in flat(first_step(optim.muon(1., 0.25, clip=None), weights)).items():
    *_, name = path.removesuffix('/A').removesuffix('/B').split('/')
    if name in SIZES:
      rows, columns = SIZES[name]
      shape = {'A': (rows, 3), 'B': (3, columns)}.get(path[-1], (rows, columns))
      assert_orthogonal((step - 0.25 * before[path]).reshape(2, *shape))
      matrices += 1
    else:
      np.testing.assert_allclose(step, NADAM * np.sign(grads[path]), rtol=1e-4)
  assert matrices == 7 * (2 if adapted else 1)


@pytest.mark.parametrize('adapted', [True, *slow(False)])
def test_the_first_step_of_soap_makes_matrices_and_adapters_orthogonal(adapted):
  """In the eigenbasis of a gradient, that gradient is diagonal, and Adam's first step makes its entries 1 (Vyas et
  al.).
  """
  model = reward.Reward(LLAMA)
  weights = declarations.of(lora.Adapted(model, 3, 6.) if adapted else model)
  grads, params = params_of(weights, 1), params_of(weights)
  soap = optim.bind(optim.soap(1., 0., clip=None), weights)
  state = soap.init(params)
  with jax.default_matmul_precision('highest'):
    for _ in range(2):   # the first update only sets the bases
      updates, state = jax.jit(soap.update)(grads, state, params)
  matrices = 0
  for path, step in flat(updates).items():
    *_, name = path.removesuffix('/A').removesuffix('/B').split('/')
    if name in SIZES:
      rows, columns = SIZES[name]
      shape = {'A': (rows, 3), 'B': (3, columns)}.get(path[-1], (rows, columns))
      for matrix, grad in zip(np.asarray(step).reshape(-1, *shape), flat(grads)[path].reshape(-1, *shape)):
        u, _, vt = np.linalg.svd(grad, full_matrices=False)
        # Off the diagonal, entries are rounding over rounding: what is on it is 1.
        np.testing.assert_allclose(np.diag(u.T @ -matrix @ vt.T), 1, atol=0.05, err_msg=path)
        matrices += 1
  assert matrices == 2 * 7 * (2 if adapted else 1)


class Odd(nn.Module):
  """A block whose weights have names that contradict what they declare."""

  @nn.compact
  def __call__(self, x_BTD, context, cache=None):
    normal = nn.initializers.normal(0.3)
    w = layers.weight(self, 'xylophone_scale', 'DF', (8, 12), normal)
    out = layers.weight(self, 'embedding', 'NHD', (2, 6, 8), normal, inputs='NH')
    b = layers.weight(self, 'query', 'FD', (12, 8), normal, role=Role.VECTOR)
    y = layers.einsum('BTD,DF->BTF', x_BTD, w + b.T)
    return x_BTD + layers.einsum('BTF,FD->BTD', y, out.reshape(12, 8)), cache, Aux()


def test_a_weight_of_a_users_block_is_what_it_declares():
  weights = declarations.of(Transformer(16, 8, stack.stacks([Odd()] * 3), layers.RMSNorm(), 8))
  block, before, grads = (tree['blocks']['0'] for tree in (weights, params_of(weights), params_of(weights, 1)))
  assert groups.decay_mask(block) == groups.hidden_mask(block)
  assert groups.hidden_mask(block) == {'xylophone_scale': True, 'embedding': True, 'query': False}
  step = first_step(optim.muon(1., 0.25, clip=None), weights)['blocks']['0']
  for name, shape in (('xylophone_scale', (8, 12)), ('embedding', (12, 8))):
    assert_orthogonal((step[name] - 0.25 * before[name]).reshape(3, *shape))
  np.testing.assert_allclose(step['query'], NADAM * np.sign(grads['query']), rtol=1e-4)
  adapters = declarations.of(lora.Adapted(Transformer(16, 8, stack.stacks([Odd()] * 3), layers.RMSNorm(), 8), 2, 4.))
  assert {path: weight.array.shape for path, weight in flat(adapters).items()} == {
      'adapters/blocks/0/xylophone_scale/A': (3, 8, 2), 'adapters/blocks/0/xylophone_scale/B': (3, 2, 12),
      'adapters/blocks/0/embedding/A': (3, 2, 6, 2), 'adapters/blocks/0/embedding/B': (3, 2, 8)}


def renamed(tree):
  """Returns the tree with meaningless names in the same order."""
  if not isinstance(tree, dict):
    return tree
  return {f'x{i:03d}': renamed(tree[name]) for i, name in enumerate(sorted(tree))}


RATES = mup.rates(32, 8, 8, 2)
OPTIMIZERS = {
    'adamw': optim.adamw(0.1), 'muon': optim.muon(0.1), 'soap': optim.soap(0.1), 'adafactor': optim.adafactor(0.1, 0.1),
    'mup': optim.adamw(groups.Rates(0.1, updates=RATES)), 'balanced': optim.with_router_balance(optim.lion(0.1)),
    'penalised': optim.with_penalty(optim.with_average(optim.adan(0.1), 0.9), l1=0.1)}


@pytest.mark.parametrize('name', ['muon', 'penalised', *slow('adamw', 'soap', 'adafactor', 'mup', 'balanced')])
def test_an_optimizer_does_not_change_with_the_names_of_weights(name):
  def programs(weights):   # of the state and of the update
    optimizer, params = optim.bind(OPTIMIZERS[name], weights), jax.tree.map(lambda weight: weight.array, weights)
    state = jax.eval_shape(optimizer.init, params)
    return str(jax.make_jaxpr(optimizer.init)(params)), str(jax.make_jaxpr(optimizer.update)(params, state, params))

  weights = declarations.of(EXPERTS)
  changed = jax.tree.map(lambda weight: declarations.Weight(weight.axes, Role.VECTOR, array=weight.array), weights)
  assert programs(renamed(weights)) == programs(weights)
  if name not in ('balanced', 'mup'):   # these two refuse a model with vectors alone
    assert programs(changed) != programs(weights)   # checks that other declarations give other programs


@pytest.mark.slow
def test_adapters_do_not_change_with_the_names_of_weights():
  model = types.SimpleNamespace(init=lambda key: renamed(EXPERTS.init(key)))
  adapters, other = (jax.jit(lora.Adapted(each, 2, 4.).init)(jax.random.key(0))['adapters']
                     for each in (EXPERTS, model))

  def named(tree, like):   # as `renamed`, of the names that the model has
    numbers = {name: f'x{i:03d}' for i, name in enumerate(sorted(like))} if isinstance(like, dict) else {}
    return {numbers.get(name, name): named(x, like[name]) if numbers else x for name, x in tree.items()}

  jax.tree.map(np.testing.assert_array_equal, named(adapters, declarations.of(EXPERTS)), other)


def test_undeclared_parameters_count_by_their_axes_in_one_layer():
  class Stock(nn.Module):
    @nn.compact
    def __call__(self, x_BTD, context, cache=None):
      return x_BTD + nn.Dense(8, name='dense')(nn.LayerNorm(name='norm')(x_BTD)), cache, Aux()

  weights = flat(declarations.of(Transformer(16, 8, stack.stacks([Stock()] * 3), layers.RMSNorm(), 8)))
  roles = {path.removeprefix('blocks/0/'): (weight.role, weight.stacked) for path, weight in weights.items()
           if path.startswith('blocks')}
  assert roles == {'dense/kernel': (Role.MATRIX, 1), 'dense/bias': (Role.VECTOR, 1), 'norm/scale': (Role.VECTOR, 1),
                   'norm/bias': (Role.VECTOR, 1)}


def test_declarations_that_do_not_fit_are_refused():
  for arguments, message in (((('D',), {'role': Role.MATRIX}), "axes 'D' is declared as a MATRIX"),
                             ((('DNH',), {'inputs': 'X'}), "inputs='X' are not axes of 'DNH'"),
                             ((('DNH',), {'inputs': 'NH'}), 'that outputs follow'),
                             ((('DF',), {'inputs': ''}), 'that outputs follow')):
    with pytest.raises(ValueError, match=message):
      declarations.declare(*arguments[0], **arguments[1])


def test_a_transformation_of_optax_is_an_optimizer_too():
  run = train.Run(LLAMA, None, None, optax.sgd(0.1), steps=1, batch=1)
  other = dataclasses.replace(run, optimizer=optim.with_average(optax.sgd(0.1), 0.9))
  assert jax.eval_shape(lambda: train.init(run)).opt_state == optax.sgd(0.1).init({})
  assert optim.has_average(jax.eval_shape(lambda: train.init(other)).opt_state)


def test_parameters_are_traced_once_for_a_model_and_once_for_its_declarations(monkeypatch):
  traced, init = [], stack.init
  monkeypatch.setattr(stack, 'init', lambda *args: traced.append(1) or init(*args))
  for _ in range(2):   # equal models, not the same object
    model, key = llama(16, 12, 2, heads=2, hidden=20), jax.random.key(0)
    shapes, params = jax.eval_shape(model.init, key), jax.jit(model.init)(key)
    of = declarations.of(model)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), params) == jax.tree.map(lambda x: (x.shape, x.dtype), shapes)
    assert jax.tree.structure(params) == jax.tree.structure(of)
  assert len(traced) == 2
