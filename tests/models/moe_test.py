"""Mixtures of experts equal NumPy in float64, on every mesh."""
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.declared import bound
from helpers.experts import EXPERTS, HIDDEN, KINDS, ROWS, TIME, WIDTH
from helpers.meshes import on
from helpers.slow import slow

from lm import declarations, optim, sharding
from lm.data.batch import Batch
from lm.models import attention, expert_exchange, layers, moe, stack, transformer
from lm.models.context import Context
from lm.train import communication

# These programs are run once or twice: optimising them takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})
CONTEXT = Context(None, attention.Visible())
EACH = pytest.mark.parametrize('kind', KINDS)


def shapes(module):
  x = jnp.zeros((ROWS, 1, WIDTH))
  return jax.eval_shape(lambda: module.init(jax.random.key(0), sharding.constrain(x, 'BTD'), CONTEXT)['params'])


def random_params(module, scale=0.5):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype('f4'), shapes(module))


def declared(module):
  init = lambda key: module.init(key, jnp.zeros((ROWS, 1, WIDTH)), CONTEXT)['params']
  return declarations.of(types.SimpleNamespace(init=init))


def inputs(seed=1):
  return np.random.default_rng(seed).normal(size=(2, ROWS, TIME, WIDTH)).astype('f4')


def run(module, params, x, dy):
  """Returns the output, and the gradients of <output, dy> by the parameters and x."""
  def apply(params, x):
    y = module.apply({'params': params}, sharding.constrain(x, 'BTD'), CONTEXT)[0]
    return sharding.constrain(y, 'BTD')

  y, back = jax.vjp(apply, params, x)
  return y, *back(sharding.constrain(dy, 'BTD'))


def sigmoid(x):
  return 1 / (1 + np.exp(-x))


def feed_forward(p, x, activation=lambda gate, up: gate * sigmoid(gate) * up):
  gate, up = (x @ p[n] + p.get(n + '_bias', 0) for n in ('gate', 'up'))
  return activation(gate, up) @ p['down'] + p.get('down_bias', 0)


def clamped(gate, up):
  gate, up = np.minimum(gate, 2), np.clip(up, -2, 2)
  return gate * sigmoid(1.5 * gate) * (up + 1)


def route(kind, p, x):
  """Returns the (expert, weight) pairs of one token, by hand."""
  logits = x @ p['router'] + p.get('router_bias', 0)
  softmax = np.exp(logits - logits.max())
  softmax = softmax / softmax.sum()
  best = lambda scores, k: np.argsort(-scores)[:k]
  if kind in ('mixtral', 'gpt_oss'):
    chosen = best(logits, 2 if kind == 'mixtral' else 3)
    return chosen, softmax[chosen] / softmax[chosen].sum()
  if kind == 'qwen2':
    return best(logits, 4), softmax[best(logits, 4)]
  if kind == 'llama4':
    return best(logits, 1), sigmoid(logits[best(logits, 1)])
  corrected = sigmoid(logits) + p['correction']
  groups = best(np.sort(corrected.reshape(4, 2)).sum(-1), 2)
  chosen = best(np.where(np.isin(np.arange(EXPERTS) // 2, groups), corrected, -np.inf), 3)
  return chosen, 2.5 * sigmoid(logits)[chosen] / sigmoid(logits)[chosen].sum()


def reference(kind, p, x):
  """Returns the output, one token and one expert at a time."""
  y = np.zeros_like(x)
  own = [{n: p[n][e] for n in p if n.startswith(('gate', 'up', 'down'))} for e in range(EXPERTS)]
  for place in np.ndindex(x.shape[:-1]):
    for expert, w in zip(*route(kind, p['router'], x[place])):
      if kind == 'llama4':
        y[place] += feed_forward(own[expert], w * x[place])
      else:
        y[place] += w * feed_forward(own[expert], x[place], *([clamped] if kind == 'gpt_oss' else []))
    if 'shared' in p:
      gate = sigmoid(x[place] @ p['shared_gate']) if 'shared_gate' in p else 1
      y[place] += gate * feed_forward(p['shared'], x[place])
  return y


def assert_close(actual, expected, tolerance=2e-5):
  """Asserts that arrays agree within `tolerance` of the largest absolute expected value."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * (np.abs(expected).max() + 1e-3))


@functools.cache
def without_mesh(kind):
  return jax.tree.map(np.asarray, jit(functools.partial(run, KINDS[kind]))(random_params(KINDS[kind]), *inputs()))


@EACH
def test_output_and_gradients_are_those_of_numpy(kind):
  params, (x, dy) = random_params(KINDS[kind]), inputs()
  y, dparams, dx = without_mesh(kind)
  leaves, tree = jax.tree.flatten(jax.tree.map(np.float64, (params, x)))
  assert_close(y, reference(kind, *tree.unflatten(leaves)))
  rng = np.random.default_rng(2)
  for i, (path, grad) in enumerate(jax.tree_util.tree_leaves_with_path((dparams, dx))):
    grad, size = np.asarray(grad), np.linalg.norm(grad)
    assert (size == 0) == (getattr(path[-1], 'key', None) == 'correction'), path
    if size == 0:
      continue
    for _ in range(2):
      direction = rng.normal(size=grad.shape)

      def moved(by, i=i, direction=direction):
        near = [*leaves[:i], leaves[i] + by * direction, *leaves[i + 1:]]
        return np.sum(reference(kind, *tree.unflatten(near)) * dy)

      slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
      assert abs(np.sum(grad * direction) - slope) < 2e-5 * size * np.sqrt(grad.size), path


def test_the_correction_changes_the_choice_but_not_the_weights():
  module = KINDS['deepseek'].router
  x, params = inputs()[0], random_params(module_with_experts(module))['router']
  route = jit(lambda params: module.apply({'params': params}, x, EXPERTS, CONTEXT)[:2])
  plain, _ = route({**params, 'correction': np.zeros(EXPERTS, 'f4')})
  same, _ = route({**params, 'correction': np.full(EXPERTS, 7, 'f4')})
  np.testing.assert_array_equal(same, plain)
  weights, chosen = route({**params, 'correction': np.eye(EXPERTS, dtype='f4')[5] * 50})
  assert np.all(np.any(np.asarray(chosen) == 5, axis=-1))
  np.testing.assert_allclose(np.sum(weights, axis=-1), 2.5, rtol=1e-5)


def module_with_experts(router):
  return moe.Experts(router, EXPERTS, HIDDEN)


@pytest.fixture
def several_rounds(monkeypatch):
  """Lets devices send few rows in a round, so that the rows need several."""
  monkeypatch.setattr(expert_exchange, 'LEAST', 1)


@pytest.mark.parametrize('kind,shape', [
    ('deepseek', 'fsdp:2,expert:2,tensor:2'),
    *slow(('gpt_oss', 'fsdp:1'), ('gpt_oss', 'fsdp:2,tensor:4'), ('gpt_oss', 'expert:4,tensor:2'),
          ('mixtral', 'fsdp:2,expert:2'), ('deepseek', 'fsdp:4,tensor:2'))])
def test_output_and_gradients_are_the_same_on_every_mesh(kind, shape, several_rounds):
  expected = without_mesh(kind)
  with on(shape):
    layouts = jax.tree.map(lambda x: jax.sharding.NamedSharding(jax.sharding.get_mesh(), x.sharding.spec),
                           shapes(KINDS[kind]))
    params = jax.device_put(random_params(KINDS[kind]), layouts)
    actual = jit(functools.partial(run, KINDS[kind]))(params, *inputs())
    jax.tree.map(functools.partial(assert_close, tolerance=5e-6), actual, expected)


def test_experts_are_split_over_tensor_and_their_matrices_over_fsdp():
  P = jax.sharding.PartitionSpec
  with on('fsdp:2,tensor:4'):
    specs = {k: x.sharding.spec for k, x in shapes(KINDS['gpt_oss']).items() if k != 'router'}
  assert specs == {'gate': P('tensor', 'fsdp', None), 'up': P('tensor', 'fsdp', None),
                   'down': P('tensor', None, 'fsdp'),
                   'gate_bias': P('tensor', None), 'up_bias': P('tensor', None), 'down_bias': P('tensor', None)}
  with on('tensor:8'), pytest.raises(ValueError, match='gate: its axis E has size 4, .* 8, .* mesh axes tensor:8;'):
    shapes(KINDS['mixtral'].clone(experts=4))


@pytest.mark.parametrize('shape', [None, 'fsdp:2,tensor:4'])
def test_an_expert_may_have_all_tokens_and_others_none(shape, several_rounds):
  module, (x, _) = KINDS['gpt_oss'].clone(router=moe.SoftmaxRouter(1, bias=True)), inputs()
  params = random_params(module)
  params['router']['router_bias'] += 100 * np.eye(EXPERTS, dtype='f4')[3]
  only = {k: np.float64(v[3]) for k, v in params.items() if k != 'router'}
  with on(shape):
    y, grads, _ = jit(functools.partial(run, module))(params, x, np.ones_like(x))
    assert_close(y, feed_forward(only, np.float64(x), clamped))
    for name in ('gate', 'up', 'down', 'up_bias'):
      assert [e for e in range(EXPERTS) if np.any(np.asarray(grads[name])[e])] == [3]


def test_a_mesh_that_does_not_divide_the_experts_is_refused_with_the_sizes_that_would_do():
  refusal = 'gate: its axis E has size 8, .* multiple of 16, .* expert:4, tensor:4; .* 1 or 2 or 4 or 8, or'
  with jax.sharding.use_abstract_mesh(sharding.abstract_mesh('expert:4,tensor:4')):
    x_BTD = jax.ShapeDtypeStruct((ROWS, 1, WIDTH), jnp.float32, sharding=jax.sharding.NamedSharding(
        jax.sharding.get_abstract_mesh(), sharding.spec('BTD')))
    with pytest.raises(ValueError, match=refusal):
      jax.eval_shape(lambda x: KINDS['mixtral'].init(jax.random.key(0), x, CONTEXT), x_BTD)


@pytest.mark.parametrize('router', [moe.SoftmaxRouter(EXPERTS + 1), moe.SigmoidRouter(0)])
def test_more_experts_than_there_are_cannot_be_chosen(router):
  with pytest.raises(ValueError, match=f'top_k={router.top_k} experts .* chosen from experts={EXPERTS}; give more'):
    jax.eval_shape(lambda x: KINDS['mixtral'].clone(router=router).init(jax.random.key(0), x, CONTEXT), inputs()[0])


def test_rows_go_to_experts_by_all_to_all_and_no_activation_is_gathered():
  module, x = KINDS['mixtral'], inputs()[0]
  with on('expert:4'):
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, out_sharding=s.sharding), shapes(module))
    apply = lambda params, x: module.apply({'params': params}, sharding.constrain(x, 'BTD'), CONTEXT)[0]
    program = jit(apply).lower(params, sharding.constrain(x, 'BTD')).compile().as_text()
  totals = communication.totals(program)
  # In a round, 8 rows to each of four devices: inputs, results, and the number and the weight of an expert.
  assert totals['all-to-all'][1] == 4 * expert_exchange.LEAST * (2 * WIDTH + 2) * 4
  assert totals['all-gather'] == (1, WIDTH * EXPERTS * 4)   # the weight of the router
  assert totals['all-reduce'] == (1, 4) and len(totals) == 3   # the number of rounds


def model(kind, **changes):
  block = layers.Block(attention.Attention(2, 2, 4), KINDS[kind], layers.RMSNorm(), layers.RMSNorm())
  lm = transformer.Transformer(16, WIDTH, stack.stacks([block] * 2), layers.RMSNorm(), TIME, **changes)
  rng = np.random.default_rng(0)
  return lm, jax.tree.map(lambda x: jnp.asarray(0.4 * rng.normal(size=x.shape), jnp.float32),
                          jax.eval_shape(lm.init, jax.random.key(0)))


def test_a_model_decodes_as_it_reads_and_packed_documents_do_not_leak():
  lm, params = model('deepseek')
  tokens = np.random.default_rng(1).integers(0, 16, (2, TIME)).astype('i4')
  read = jit(lambda batch: lm.apply(params, batch).hidden)
  packed = Batch(tokens, segments=np.array([[1] * TIME, [1, 1, 1, 2, 2, 2]], 'i4'))
  changed = packed._replace(tokens=np.where([[False], [True]] & (packed.segments == 1), (tokens + 5) % 16, tokens))
  whole, other, cache = read(packed), read(changed), lm.init_cache(2, TIME)
  np.testing.assert_allclose(other[1, 3:], whole[1, 3:], rtol=0, atol=1e-6)
  assert np.all(np.any(np.abs(other[1, :3] - whole[1, :3]) > 0.05, axis=-1))
  step = jit(lambda batch, cache: lm.apply(params, batch, cache=cache)[:3:2])
  for t in range(TIME):
    hidden, cache = step(jax.tree.map(lambda a, t=t: a[:, t:t + 1], packed), cache)
    assert_close(hidden[:, 0], whole[:, t], 1e-5)


@pytest.mark.slow
def test_remat_changes_nothing_and_keeps_the_products_that_it_names():
  batch = Batch(np.arange(2 * TIME).reshape(2, TIME).astype('i4') % 16)
  lean, params = model('mixtral')

  def count_residuals(policy):
    lm = lean.clone(remat=policy)
    backward = jax.eval_shape(lambda p: jax.vjp(lambda p: lm.apply(p, batch).hidden, p)[1], params)
    return sum(x.size for x in jax.tree.leaves(backward))

  assert count_residuals(jax.checkpoint_policies.nothing_saveable) < count_residuals(lean.remat) < count_residuals(None)
  grads = [jit(jax.grad(lambda p, lm=lm: jnp.sum(jnp.sin(lm.apply(p, batch).hidden))))(params)
           for lm in (lean, lean.clone(remat=None))]
  jax.tree.map(functools.partial(assert_close, tolerance=1e-5), *grads)


@pytest.mark.slow
def test_bfloat16_computes_near_float32():
  params, (x, dy) = random_params(KINDS['mixtral']), inputs()
  low = jit(functools.partial(run, KINDS['mixtral']))(params, x.astype(jnp.bfloat16), dy.astype(jnp.bfloat16))
  exact = jit(functools.partial(run, KINDS['mixtral']))(params, np.float32(x.astype(jnp.bfloat16)), dy)
  assert low[0].dtype == low[2].dtype == jnp.bfloat16
  assert {g.dtype for g in jax.tree.leaves(low[1])} == {jnp.dtype('float32')}
  jax.tree.map(functools.partial(assert_close, tolerance=0.03), jax.tree.map(lambda a: a.astype('f4'), low), exact)


def test_muon_orthogonalises_each_experts_matrices_and_no_vector_decays():
  params, weights = (
      {'blocks': {'0': {'feed_forward': of(KINDS['gpt_oss']) | {'router': of(KINDS['deepseek'])['router']}}}}
      for of in (random_params, declared))
  params = jax.tree.map(lambda x: np.stack([x, -2 * x]), params)
  grads = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype('f4'), params)
  grads['blocks']['0']['feed_forward']['router']['correction'] *= 0
  muon = bound(optim.muon(lambda step: 1., weight_decay=0.25, clip=None), params, weights)
  updates = jit(lambda: muon.update(grads, muon.init(params), params)[0])()['blocks']['0']['feed_forward']
  own = params['blocks']['0']['feed_forward']
  for name in ('gate', 'up', 'down'):
    for matrix in (-updates[name] - 0.25 * own[name]).reshape(-1, *own[name].shape[2:]):
      singular = np.linalg.svd(matrix, compute_uv=False) / (0.2 * max(matrix.shape) ** 0.5)
      assert np.all((singular > 0.6) & (singular < 1.3)), singular
  np.testing.assert_array_equal(updates['router']['correction'], 0)
