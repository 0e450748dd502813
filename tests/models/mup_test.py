"""The coordinate check (Yang et al. 2022): how the changes of activations in a few steps depend on width and depth."""
import dataclasses
import importlib
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm import declarations, optim, sharding, train
from lm.data.batch import Batch
from lm.models import mup, stack, transformer
from lm.models.kernel_choice import attend
from lm.models.kernels import Visible
from lm.objectives.next_token import next_token
from lm.optim import groups

VOCAB, STEPS, RATE = 64, 4, 2e-3
TOKENS = np.random.default_rng(0).integers(0, VOCAB, (1, 9))


class Same(nn.Module):
  def __call__(self, x):
    return x


def activations(model, params, batch):
  """Returns the embedding, the outputs of the first and the last block, and the logits."""
  bare = model.clone(norm=Same())
  first = bare.clone(blocks=stack.stacks(model.layers[:1]))
  outputs = [first.apply({**params, 'blocks': jax.tree.map(lambda x: x[:1], params['blocks'])}, batch).hidden,
             bare.apply(params, batch).hidden]
  last = model.apply(params, batch)
  return [params['embedding'][batch.tokens], *outputs, last.head(last.hidden)]


def changes(model, updates):
  """Returns log mean |x_t - x_0| of each activation for t = 1, ..., STEPS, [STEPS, activations]."""
  batch = Batch(jnp.array(TOKENS[:, :-1]), targets=jnp.array(TOKENS[:, 1:]), weights=jnp.ones((1, 8)))
  optimizer = optim.bind(optim.adam(groups.Rates(lambda step: RATE, updates=updates), eps=1e-15, clip=None),
                          declarations.of(model))
  objective = next_token()

  def step(carry, _):
    params, state = carry
    grads = jax.grad(lambda p: objective.loss(model.apply, p, batch, None)[0] / 8)(params)
    steps, state = optimizer.update(grads, state, params)
    params = optax.apply_updates(params, steps)
    return (params, state), activations(model, params, batch)

  @jax.jit
  def run(params):
    before = activations(model, params, batch)
    after = jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)[1]
    return [jnp.mean(jnp.abs(b - a[None]), axis=(1, 2, 3)) for a, b in zip(before, after)]
  outputs = np.stack(run(jax.jit(model.init)(jax.random.key(0))), axis=1)
  return np.log(outputs[1:])   # the head starts at zero, so the first change of the logits is not informative


def slopes(sizes, model, updates):
  """Returns the exponent of the size by which each activation changes, for each step."""
  logs = np.stack([changes(model(size), updates(size)) for size in sizes])
  return np.polyfit(np.log(sizes), logs.reshape(len(sizes), -1), 1)[0].reshape(logs.shape[1:])


def wide(width):
  return {'vocab': VOCAB, 'width': width, 'layers': 2, 'heads': width // 32, 'max_length': 16, 'remat': None}


def deep(layers):
  return {'vocab': VOCAB, 'width': 64, 'layers': layers, 'heads': 2, 'max_length': 16, 'remat': None}


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize('widths', [(64, 256), (64, 256, 1024)])
def test_changes_do_not_depend_on_width(widths):
  base = {'base_width': 64, 'base_layers': 2}
  exponents = slopes(widths, lambda width: mup.parametrised(transformer.llama(**wide(width)), **base),
                     lambda width: mup.rates(width, 2, **base))
  assert np.abs(exponents).max() < 0.1


@pytest.mark.long
@pytest.mark.slow
def test_changes_grow_with_width_in_the_standard_parametrisation():
  exponents = slopes((64, 256), lambda width: transformer.llama(**wide(width), tied=False), lambda width: ())
  assert exponents[:, 1:3].min() > 0.2 and exponents[:, 3].min() > 0.5   # blocks and logits


@pytest.mark.slow
def test_changes_do_not_depend_on_depth():
  """This is the residual stream. The contribution of one block falls as the number of blocks grows."""
  base = {'base_width': 64, 'base_layers': 2}
  exponents = slopes((8, 32), lambda layers: mup.parametrised(transformer.llama(**deep(layers)), **base),
                     lambda layers: mup.rates(64, layers, **base))
  assert np.abs(exponents[:, [0, 2, 3]]).max() < 0.1 and exponents[:, 1].max() < -0.8


@pytest.mark.slow
def test_changes_grow_with_depth_in_the_standard_parametrisation():
  exponents = slopes((8, 32), lambda layers: transformer.llama(**deep(layers), tied=False), lambda layers: ())
  assert exponents[:, 2].min() > 0.3


@pytest.mark.slow
def test_at_the_base_shape_it_is_llama_but_for_embedding_and_head():
  arguments = {'vocab': 16, 'width': 128, 'layers': 2, 'heads': 2}
  params, plain = (jax.jit(model.init)(jax.random.key(0)) for model in (
      mup.parametrised(transformer.llama(**arguments), 128, 2), transformer.llama(**arguments, tied=False)))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), params['blocks'], plain['blocks'])
  np.testing.assert_allclose(params['embedding'], plain['embedding'] / 0.02, rtol=1e-5)
  assert not np.any(params['head'])
  assert all(factor == 1 for _, factor in mup.rates(128, 2, 128, 2))
  with pytest.raises(ValueError, match='base_width=0 is not positive'):
    mup.rates(64, 2, 0, 2)


def test_each_matrix_has_its_factor():
  weights = declarations.of(mup.parametrised(transformer.llama(16, 128, 6, 2), 32, 2))
  factors = groups.factors_of(weights, mup.rates(128, 6, 32, 2))
  block = factors['blocks']['0']
  assert factors['head'] == 1 / 4 and factors['embedding'] == 1 and factors['norm']['scale'] == 1
  assert block['attention_norm']['scale'] == block['feed_forward_norm']['scale'] == 1
  assert {block['attention'][name] for name in ('query', 'key', 'value')} == {1 / 4}
  assert block['feed_forward']['up'] == block['feed_forward']['gate'] == 1 / 4
  assert block['attention']['out'] == block['feed_forward']['down'] == pytest.approx(1 / 12)


@pytest.mark.long
@pytest.mark.slow
def test_the_best_rate_of_a_small_width_is_that_of_four_times_the_width_on_real_text(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / 'experiments')
  experiment, rates = importlib.import_module('mup').experiment, (4e-3, 1.6e-2, 6.4e-2)
  mesh, best = sharding.make_mesh('fsdp:1', jax.devices()[:1]), {}
  jax.config.update('jax_disable_most_optimizations', False)
  try:
    with jax.set_mesh(mesh):
      for width in (32, 128):
        losses = {}
        for rate in rates:
          run = experiment(width=width, lr=rate)
          run = dataclasses.replace(run, data=dataclasses.replace(run.data, folder=tmp_path / 'data'))
          losses[rate] = train.train(run, tmp_path / f'{width}-{rate}', mesh).metrics['validation/bits_per_byte']
        best[width] = min(losses, key=losses.get)
  finally:
    jax.config.update('jax_disable_most_optimizations', True)
  assert best[32] == best[128] == 1.6e-2


@pytest.mark.parametrize('size', [8, 16, 64, 256])
def test_scores_of_aligned_queries_and_keys_do_not_grow_with_the_size_of_a_head(size):
  """They are 8 q k / H: entries of one eighth and one give 1 for any H."""
  model = mup.parametrised(transformer.llama(16, 2 * size, 1, heads=2), 128, 1)
  scores = model.layers[0].attention.scores
  key = jnp.stack([jnp.ones((1, 2, size)), jnp.zeros((1, 2, size))], axis=1)
  value = jnp.stack([jnp.ones((1, 2, size)), jnp.zeros((1, 2, size))], axis=1)
  share = attend(jnp.full((1, 2, 2, size), 1 / 8), key, value, Visible(), scores)[0, 1, 0, 0]
  assert float(share) == pytest.approx(1 / (1 + np.exp(-1)), rel=1e-5)
