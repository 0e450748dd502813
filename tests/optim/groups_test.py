"""Patterns of paths choose which parameters decay, are matrices of a block, or have a rate of their own."""
import jax
import numpy as np
import optax
import pytest
from helpers.declared import bound, weights_of
from helpers.slow import slow

from lm import declarations, lora, optim, train
from lm.declarations import Role, declare
from lm.models import reward, transformer
from lm.optim import groups

PARAMS = {'embedding': np.ones((3, 2), 'f4'), 'blocks': {'0': {'up': np.ones((1, 2, 2), 'f4')}},
          'norm': {'scale': np.ones(2, 'f4')}}
DECLARED = {'embedding': declare('VD', Role.EMBEDDING), 'blocks': {'0': {'up': declare('DF')}},
            'norm': {'scale': declare('-')}}


def test_weight_decay_is_for_matrices_and_tables():
  def names(model, decays):
    mask = groups.decay_mask(declarations.of(model))
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


def flat(tree):
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def test_masks_of_patterns():
  mask = flat(groups.matching('blocks/*', '*bed*')(DECLARED))
  assert mask == {'embedding': True, 'blocks/0/up': True, 'norm/scale': False}
  assert flat(groups.hidden_mask(DECLARED)) == {'embedding': False, 'blocks/0/up': True, 'norm/scale': False}


@pytest.mark.parametrize('make', [
    lambda: optim.adamw(lambda step: 0.1, decays=groups.matching('embedding', 'blocks/1/*')),
    lambda: optim.muon(lambda step: 0.1, decays=groups.matching('blocks/1/*')),
    lambda: optim.sgd(groups.Rates(lambda step: 0.1, (('embedding', 2.), ('blocks/1/*', 3.)))),
    lambda: optim.schedule_free(groups.Rates(lambda step: 0.1, (('blocks/1/*', 3.),))),
    lambda: optim.with_penalty(optim.sgd(lambda step: 0.1), l1=1., decays=groups.matching('blocks/1/*')),
])
def test_a_pattern_that_matches_nothing_is_refused_before_anything_is_compiled(make):
  model = transformer.llama(8, 4, 1, heads=2)
  run = train.Run(model, None, None, make(), steps=1, batch=1)
  with pytest.raises(ValueError, match="'blocks/1/[*]' matches no parameter; there are .*blocks/0/attention/key, "):
    jax.eval_shape(lambda: train.init(run))


def step_of(optimizer, grads):
  optimizer = bound(optimizer, PARAMS, DECLARED)
  state = optimizer.init(PARAMS)
  for _ in range(3):
    updates, state = jax.jit(optimizer.update)(grads, state, PARAMS)
  return flat(updates)


@pytest.mark.parametrize('make', [optim.sgd, optim.adamw, optim.adafactor, optim.muon, optim.soap])
def test_a_factor_multiplies_the_whole_step_of_a_parameter(make):
  key = jax.random.key(0)
  grads = jax.tree.map(lambda p: np.array(jax.random.normal(key, p.shape)), PARAMS)
  rates = groups.Rates(lambda step: 0.1, (('embedding', 3.), ('*e*', 2.), ('norm/scale', 0.)))
  arguments = {'weight_decay': 0.5, 'decays': groups.matching('*')}
  plain, with_factors = (step_of(make(rate, **arguments), grads) for rate in (lambda step: 0.1, rates))
  for name, factor in {'embedding': 6., 'blocks/0/up': 1., 'norm/scale': 0.}.items():
    np.testing.assert_allclose(with_factors[name], factor * plain[name], rtol=1e-5)
    assert np.abs(plain[name]).min() > 0


def test_a_factor_of_updates_leaves_weight_decay_as_it_is():
  grads = jax.tree.map(lambda p: 2 * p, PARAMS)
  rates = groups.Rates(lambda step: 0.1, updates=(('embedding', 3.),))
  sgd = optim.sgd(rates, momentum=0., weight_decay=0.5)
  np.testing.assert_allclose(step_of(sgd, grads)['embedding'], -0.1 * (3 * 2 + 0.5), rtol=1e-6)


def test_a_factor_is_a_rate_of_its_own_for_schedule_free_too():
  """A parameter with a factor of two moves as it does if all rates are doubled."""
  def path(rate):
    optimizer, params, trajectory = bound(optim.schedule_free(rate, clip=None), PARAMS, DECLARED), PARAMS, []
    state = optimizer.init(params)
    for i in range(4):
      grads = jax.tree.map(lambda p, i=i: np.array(jax.random.normal(jax.random.key(i), p.shape)), PARAMS)
      updates, state = optimizer.update(grads, state, params)
      params = optax.apply_updates(params, updates)
      trajectory.append(params)
    return trajectory

  slow, fast = path(lambda step: 0.1), path(lambda step: 0.2)
  both = path(groups.Rates(lambda step: 0.1, (('embedding', 2.),)))
  for a, b, trajectory in zip(slow, fast, both):
    np.testing.assert_allclose(trajectory['embedding'], b['embedding'], rtol=1e-5)
    np.testing.assert_allclose(trajectory['norm']['scale'], a['norm']['scale'], rtol=1e-5)


def test_rates_are_refused_as_a_schedule_and_have_to_be_numbers():
  with pytest.raises(TypeError):   # otherwise all would learn at one rate without notice
    optax.adam(groups.Rates(lambda step: 0.1, ()))
  for factor in (-1., float('inf'), float('nan')):
    with pytest.raises(ValueError, match=f"factor {factor} of the learning rate of 'a'"):
      groups.Rates(lambda step: 0.1, (('a', factor),))
  assert groups.parse_factors(('embedding=4', ' a=b = 1e-1 ')) == (('embedding', 4.), ('a=b', 0.1))
  for text in ('embedding', '=2', 'a=b', 'a='):
    with pytest.raises(ValueError, match=f'{text!r} is not of the form pattern=factor'):
      groups.parse_factors((text,))


LLAMA = transformer.llama(16, 8, 2, heads=2, kv_heads=1, hidden=12)


def two_steps(make, params, weights):
  """Returns the parameters after a second step, with gradients that depend only on an array's shape, size and order."""
  optimizer = optim.bind(make(lambda step: 0.1, weight_decay=0.5, clip=None), weights)
  state = optimizer.init(params)
  for i in range(2):
    grads = jax.tree.map(lambda p, i=i: np.random.default_rng(i).normal(size=p.size).astype('f4').reshape(p.shape),
                         params)
    updates, state = jax.jit(optimizer.update)(grads, state, params)
  return flat(updates)


@pytest.mark.parametrize('make', [optim.muon, *slow(optim.soap, optim.adafactor)])
def test_adapters_are_updated_as_the_matrices_that_they_are(make):
  weights = declarations.of(lora.Adapted(LLAMA, 3, 6.))
  params = jax.tree.map(lambda weight: np.ones(weight.array.shape, 'f4'), weights)
  assert all(jax.tree.leaves(groups.decay_mask(weights))) and all(jax.tree.leaves(groups.hidden_mask(weights)))
  for path, updated in two_steps(make, params, weights).items():
    # A is [layers, inputs, rank], B is [layers, rank, outputs], once heads and their size are one axis.
    matrix = (2, -1, 3) if path.endswith('/A') else (2, 3, -1)
    alone = {'up': np.ones(updated.shape, 'f4').reshape(matrix)}
    expected = two_steps(make, alone, weights_of(alone, {'up': declare('DF')}))
    np.testing.assert_allclose(updated.reshape(matrix), expected['up'], atol=1e-5, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize('make', [optim.muon, *slow(optim.soap, optim.adafactor)])
def test_a_decoder_inside_a_reward_model_is_updated_as_it_is_alone(make):
  weights = declarations.of(reward.Reward(LLAMA))
  params = jax.tree.map(lambda weight: np.ones(weight.array.shape, 'f4'), weights)
  inside, alone = two_steps(make, params, weights), two_steps(make, params['decoder'], weights['decoder'])
  assert inside.keys() == {'score', *(f'decoder/{path}' for path in alone)}
  for path, expected in alone.items():
    np.testing.assert_allclose(inside[f'decoder/{path}'], expected, atol=1e-6, err_msg=path)
