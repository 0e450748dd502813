"""Adapters start as nothing, follow the chain rule of the full gradient, take little memory and disk, and merge
exactly.
"""
import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from helpers.meshes import on
from jax.sharding import PartitionSpec as P

from lm import lora, optim, sharding, train
from lm.data import dataset
from lm.data.batch import Batch
from lm.data.text.source import Source
from lm.data.tokenizers.folder import Bytes
from lm.hf import pretrained
from lm.models import attention as attend
from lm.models import latent, moe, stack, transformer
from lm.models import layers as parts
from lm.objectives.next_token import next_token
from lm.optim import schedules

TOKENIZER = Bytes(('<|bos|>', '<|eos|>'))
VOCAB, ROWS, TIME = TOKENIZER.vocab_size + 5, 4, 8
MODEL = transformer.llama(VOCAB, 16, 3, heads=4, kv_heads=2, hidden=24, max_length=32)
ADAPTED = lora.Adapted(MODEL, 2, 6.)
# Other uses of matrices: experts with a router, latent attention, biases.
OTHER = MODEL.clone(blocks=stack.stacks([
    parts.Block(attend.Attention(4, 4, 4, bias=True), parts.FeedForward(8, bias=True), parts.RMSNorm(),
                parts.RMSNorm()),
    parts.Block(latent.LatentAttention(4, 8, 8, 4, 4, 4), moe.Experts(moe.SoftmaxRouter(2), 4, 8), parts.RMSNorm(),
                parts.RMSNorm())]))
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})


def load(model, seed=7):
  return jit(lambda: model.init(jax.random.key(seed)))()


def random_adapters(adapted):
  """Returns random adapters, B included, which are the same on every mesh."""
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: jax.device_put((0.3 * rng.normal(size=x.shape)).astype('f4'), x.sharding),
                      load(adapted))


def batch_of():
  rng = np.random.default_rng(1)
  tokens, targets = rng.integers(0, VOCAB, (2, ROWS, TIME)).astype('i4')
  batch = Batch(tokens, targets, rng.uniform(size=(ROWS, TIME)).astype('f4'))
  mesh = jax.sharding.get_mesh()
  return batch if mesh.empty else sharding.shard_rows(batch, mesh)


@functools.partial(jit, static_argnums=0)
def loss_and_grads(model, params, constants, batch):
  loss = lambda params: next_token().loss(model.apply, {**params, **constants}, batch, None)[0]
  return jax.value_and_grad(loss)(params)


@functools.partial(jit, static_argnums=0)
def logits(model, params, batch):
  outputs = model.apply(params, batch)
  return outputs.head(outputs.hidden)


def same(a, b):
  return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def paths(tree):
  return {jax.tree_util.keystr(path, simple=True, separator='/'): leaf
          for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


# Which axes are the input's, by hand.
SHAPES = {'attention/query': ('DNH', 1), 'attention/key': ('DKH', 1), 'attention/value': ('DKH', 1),
          'attention/out': ('NHD', 2), 'feed_forward/gate': ('DF', 1), 'feed_forward/up': ('DF', 1),
          'feed_forward/down': ('FD', 1)}


@pytest.mark.slow
@pytest.mark.parametrize('shape', [None, pytest.param('fsdp:2,tensor:2', marks=pytest.mark.slow)])
def test_gradients_are_those_of_the_merged_matrices_by_the_chain_rule(shape):
  """dA = scale dW B^T, dB = scale A^T dW, on every mesh."""
  with on(shape):
    base, adapters, batch = load(MODEL), random_adapters(ADAPTED), batch_of()
    value, grads = loss_and_grads(ADAPTED, adapters, {'base': base}, batch)
    plain, merged = ADAPTED.merge({**adapters, 'base': base})
    assert plain is MODEL
    full_value, full = loss_and_grads(MODEL, merged, {}, batch)
    assert jax.tree.all(jax.tree.map(lambda x, g: x.sharding == g.sharding, adapters, grads))
    if shape:   # adapters are split as their matrices are
      layouts = {path: x.sharding.spec for path, x in paths(adapters['adapters']['blocks']['0']).items()}
      assert layouts['attention/query/A'] == P(None, 'fsdp', None)
      assert layouts['attention/query/B'] == P(None, None, 'tensor', None)
      assert layouts['attention/out/A'] == P(None, 'tensor', None, None)
      assert layouts['feed_forward/down/B'] == P(None, None, 'fsdp')
    base, merged, adapters, grads, full = jax.tree.map(np.asarray, (base, merged, adapters, grads, full))
  assert value == pytest.approx(float(full_value), rel=1e-6)
  adapter_grads, block = grads['adapters']['blocks']['0'], full['blocks']['0']
  assert {path[:-2] for path in paths(adapter_grads)} == set(SHAPES)
  for path, (axes, inputs) in SHAPES.items():
    group, name = path.split('/')
    assert block[group][name].ndim == 1 + len(axes)
    for layer in range(3):
      dw, w, w0 = (tree['blocks']['0'][group][name][layer] for tree in (full, merged, base))
      into, (a, b), (da, db) = math.prod(dw.shape[:inputs]), *(
          [tree['adapters']['blocks']['0'][group][name][c][layer] for c in 'AB'] for tree in (adapters, grads))
      a, da, b, db, dw, w, w0 = (np.asarray(x, 'f8').reshape(*s) for x, s in (
          (a, (into, 2)), (da, (into, 2)), (b, (2, -1)), (db, (2, -1)), *((x, (into, -1)) for x in (dw, w, w0))))
      np.testing.assert_allclose(w, w0 + 3 * a @ b, atol=1e-6)
      np.testing.assert_allclose(da, 3 * dw @ b.T, atol=3e-5 * np.abs(da).max())
      np.testing.assert_allclose(db, 3 * a.T @ dw, atol=3e-5 * np.abs(db).max())


@pytest.mark.parametrize('model', [
    pytest.param(MODEL, id='llama'), pytest.param(OTHER, id='other', marks=pytest.mark.slow)])
def test_adapters_change_nothing_at_first_and_merged_they_are_the_same_model(model):
  adapted, base, batch = lora.Adapted(model, 2, 6.), load(model), batch_of()
  first, plain = {**load(adapted), 'base': base}, logits(model, base, batch)
  assert np.array_equal(logits(adapted, first, batch), plain)
  assert all(np.any(x) == path.endswith('A') for path, x in paths(first['adapters']).items())
  params = {**random_adapters(adapted), 'base': base}
  same_model, merged = lora.merge(adapted, {**params, 'teacher': 'kept'})
  assert merged.pop('teacher') == 'kept' and paths(merged).keys() == paths(base).keys() and same_model is model
  actual = logits(model, merged, batch)
  assert np.array_equal(actual, logits(adapted, params, batch)) and np.abs(actual - plain).max() > 0.1
  assert lora.merge(model, merged) == (model, merged)


def sizes(jaxpr):
  for equation in jaxpr.eqns:
    yield from (math.prod(v.aval.shape) for v in equation.outvars)
    for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, 'eqns')):
      inner = getattr(inner, 'jaxpr', inner)
      if hasattr(inner, 'eqns'):
        yield from sizes(inner)


def test_no_gradient_copy_or_optimizer_state_has_the_size_of_all_layers():
  model = transformer.llama(8, 64, 32, heads=2, hidden=64, max_length=4)
  run = lora.adapt(train.Run(model, next_token(), None, optim.adamw(lambda step: 1e-3), steps=1, batch=1), 2)
  batch = Batch(*np.zeros((2, 1, 4), 'i4'), np.ones((1, 4), 'f4'))
  base, state = jax.eval_shape(model.init, jax.random.key(0)), jax.eval_shape(lambda: train.init(run))
  stacked = min(x.size for path, x in paths(base).items() if path.endswith(tuple(SHAPES)))
  step = jax.make_jaxpr(train.make_step(run))(state, batch, {'base': base})
  assert stacked == 32 * 64 * 64 and max(sizes(step.jaxpr)) < stacked / 2
  trained_size, state_size = (sum(x.size for x in jax.tree.leaves(tree)) for tree in (state.params, state.opt_state))
  assert trained_size == 32 * 2 * 7 * (64 + 64) and state_size <= 2 * trained_size + 8   # two moments and counters


def test_patterns_choose_matrices_and_errors_list_them():
  def adapted(*match, model=MODEL, all=False):
    tree = jax.eval_shape(lora.Adapted(model, 2, 1., None if all else match).init, jax.random.key(0))['adapters']
    return sorted({path[:-2] for path in paths(tree)})
  assert adapted('*/query', '*/value') == ['blocks/0/attention/query', 'blocks/0/attention/value']
  assert adapted('embedding') == ['embedding']
  names = {path.split('/')[-1] for path in adapted(model=OTHER, all=True)}
  assert names == {'query', 'key', 'value', 'out', 'gate', 'up', 'down', 'query_down', 'query_up', 'key_value_down',
                   'key_rope', 'key_up', 'value_up'}
  for match in (('*/querry',), ('*/query', '*/norm'), ()):
    with pytest.raises(ValueError, match='no matrix of the model matches; it has blocks/0/attention/key, .*embedding'):
      adapted(*match)
  with pytest.raises(ValueError, match='a rank of 0'):
    lora.Adapted(MODEL, 0, 1.)
  with pytest.raises(ValueError, match='alpha=-1'):
    lora.Adapted(MODEL, 1, -1.)


TEXTS = [f'text {i} of some ' + 'words ' * (i % 9 + 5) for i in range(40)]
SOURCE = Source('tiny', {'train': TEXTS, 'validation': ['not in the other']}, 'fingerprint')


def configured(**changes):
  return train.Run(MODEL, next_token(), dataset.Text(SOURCE, TOKENIZER, 16, rules=()),
                   optim.adam(schedules.warmup_constant(1e-2, 4, 1)), steps=2, batch=4, evaluate_batches=1, **changes)


def test_a_run_trains_adapters_alone_and_exports_the_sum(tmp_path):
  with on('fsdp:1'):
    mesh, base = jax.sharding.get_mesh(), load(MODEL)
    run = lora.adapt(configured(start=load), 2)
    assert run.start is None and lora.adapt(run, 0) is run
    result = train.train(run, tmp_path / 'run', mesh)
    saved = sum(x.size for x in jax.tree.leaves(train.abstract_state(run, mesh)))
    assert saved < sum(x.size for x in jax.tree.leaves(base))
    assert same(result.params['base'], base)
    assert all(np.any(x) for x in jax.tree.leaves(result.params['adapters']))
    other = dataclasses.replace(run.constants[0], load=functools.partial(load, seed=8))
    with pytest.raises(ValueError, match='constants.base.load'):   # adapters belong to the base of their training
      train.train(dataclasses.replace(run, steps=3, constants=(other,)), tmp_path / 'run', mesh)
    model, params = lora.merge(run.model, result.params)
    pretrained.write(tmp_path / 'out', model, params, TOKENIZER)
    assert same(pretrained.load(str(tmp_path / 'out')).params, params)


def test_parameters_given_to_a_run_are_the_base_of_its_adapters():
  plain, adapted = lora.start_from(configured(), load), lora.start_from(lora.adapt(configured(), 2), load)
  assert plain.start is adapted.constants[0].load is load and adapted.start is None
  assert lora.start_from(configured(), None).start is None
  with pytest.raises(ValueError, match='give them with --init'):
    lora.start_from(lora.adapt(configured(), 2), None)


def test_adapters_start_in_the_range_of_a_linear_layer_of_their_inputs():
  """For three layers and any number of heads: layers are no inputs; heads and head size both are."""
  inputs = {'query': 16, 'key': 16, 'value': 16, 'out': 4 * 4, 'gate': 16, 'up': 16, 'down': 24}
  for path, x in paths(load(lora.Adapted(MODEL, 8, 6.))).items():
    *_, name, part = path.split('/')
    if part == 'A':
      bound = inputs[name] ** -0.5
      assert x.shape[0] == 3 and 0.95 * bound < np.abs(x).max() <= bound, path


def test_alpha_is_twice_the_rank_unless_it_is_given():
  run = train.Run(MODEL, next_token(), None, optim.adamw(1e-3), steps=1, batch=1)
  assert [lora.adapt(run, rank, alpha).model.alpha for rank, alpha in ((4, None), (8, None), (4, 3.))] == [8, 16, 3]
