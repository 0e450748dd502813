"""Multi-token prediction equals its equations in NumPy, sees only the tokens of its depth, and equals the trunk without
depths.
"""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.slow import slow

from lm import evaluate, sharding
from lm.data import tokenizers
from lm.data.batch import Batch
from lm.hf import pretrained
from lm.models import layers as parts
from lm.models import prediction_heads, transformer
from lm.objectives import losses, objective
from lm.objectives.diffusion import masked_diffusion
from lm.objectives.distillation import distil
from lm.objectives.multi_token import multi_token as multi_token_loss
from lm.objectives.next_token import next_token
from lm.objectives.unlikelihood import unlikelihood

VOCAB, WIDTH, TIME = 25, 16, 8
TRUNK = transformer.llama(VOCAB, WIDTH, 1, heads=4, kv_heads=2, hidden=12, max_length=TIME, tied=False, dropout=0.1)
SEQUENTIAL = prediction_heads.sequential(TRUNK, 2)
KINDS = pytest.mark.parametrize('kind', [prediction_heads.parallel, *slow(prediction_heads.sequential)],
                                ids=['parallel', 'sequential'])


def random_params(model):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype('f4'),
                      jax.eval_shape(model.init, jax.random.key(0)))


def packed_batch():
  """Returns a whole row, one of two documents and padding, and empty rows."""
  rng = np.random.default_rng(1)
  tokens, targets = rng.integers(0, VOCAB, (2, 4, TIME)).astype('i4')
  segments = np.int32([[1] * 8, [1, 1, 1, 1, 2, 2, 2, 0], [0] * 8, [0] * 8])
  positions = np.int32([[*range(8)], [0, 1, 2, 3, 0, 1, 2, 0], [0] * 8, [0] * 8])
  return Batch(tokens, targets, rng.uniform(0.5, 2, (4, TIME)).astype('f4') * (segments > 0), positions, segments)


def sums_of(model, params, batch, key=None, weight=0.3, goal=None):
  return multi_token_loss(goal or next_token(), weight).loss(model.apply, params, batch, key)


@functools.partial(jax.jit, static_argnums=0)
def loss_and_grads(model, params, batch, key=None):
  return jax.value_and_grad(lambda params: sums_of(model, params, batch, key)[0])(params)


def rms(x, scale):
  return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * scale


def block(p, x, theta=10_000.):
  """Returns the output of one row of a pre-norm block: grouped-query causal attention with rotary positions, then a
  gated feed-forward layer.
  """
  def rotate(x):
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * np.arange(len(x))[:, None, None]
                                                      * theta ** (-np.arange(half) / half))
    return np.concatenate([z.real, z.imag], -1)

  y, a = rms(x, p['attention_norm']['scale']), p['attention']
  q, k, v = (np.einsum('td,dnh->tnh', y, a[name]) for name in ('query', 'key', 'value'))
  q, k, v = rotate(q), np.repeat(rotate(k), 2, axis=1), np.repeat(v, 2, axis=1)
  scores = np.exp(np.einsum('tnh,snh->nts', q, k) / np.sqrt(q.shape[-1])) * np.tri(len(x))
  x = x + np.einsum('nts,snh,nhd->td', scores / scores.sum(-1, keepdims=True), v, a['out'])
  y, f = rms(x, p['feed_forward_norm']['scale']), p['feed_forward']
  gate = y @ f['gate']
  return x + (gate / (1 + np.exp(-gate)) * (y @ f['up'])) @ f['down']


@KINDS
def test_depths_are_those_of_the_equations(kind):
  """One row, by depth, at the positions where the tokens ahead are known."""
  model = kind(TRUNK, 2)
  params = random_params(model)
  tokens = np.random.default_rng(2).integers(0, VOCAB, (1, TIME)).astype('i4')
  out = jax.jit(model.apply)(params, Batch(tokens))
  alone = jax.jit(TRUNK.apply)(params, Batch(tokens))
  np.testing.assert_array_equal(out.hidden, alone.hidden)   # the trunk reads its parameters from the same tree
  previous = hidden = np.asarray(out.hidden[0], 'f8')
  for k in (1, 2):
    p = jax.tree.map(lambda x, k=k: np.asarray(x[k - 1], 'f8'), params['depths']['0'])
    if kind is prediction_heads.parallel:
      previous = block(p['block'], hidden)
    else:
      embedded = params['embedding'][tokens[0, k:]]
      embedded = np.concatenate([embedded, np.zeros((k, WIDTH))])   # no token is known there
      both = np.concatenate([rms(previous, p['hidden_norm']['scale']), rms(embedded, p['token_norm']['scale'])], -1)
      previous = block(p['block'], both @ p['merge'])
    np.testing.assert_allclose(out.ahead[k - 1][0], rms(previous, params['norm']['scale']), rtol=1e-3, atol=1e-4)


@KINDS
def test_the_loss_is_that_of_the_equations(kind):
  model, batch = kind(TRUNK, 2), packed_batch()
  params = random_params(model)
  out = jax.jit(model.apply)(params, batch)
  loss, weight, sums = jax.jit(sums_of, static_argnums=0)(model, params, batch)
  expected = 0.
  for k, hidden in enumerate([out.hidden, *out.ahead]):
    scores = np.asarray(jax.nn.log_softmax(out.head(hidden)), 'f8')
    total = count = 0
    for b in range(4):
      for i in range(TIME - k):
        if batch.segments[b, i] == batch.segments[b, i + k] > 0:
          total -= batch.weights[b, i + k] * scores[b, i, batch.targets[b, i + k]]
          count += 1
    expected += total * (0.3 / 2 if k else 1)
    if k:
      assert float(sums[f'depth_{k}/accuracy'][1]) == count == float(sums[f'depth_{k}/nll'][1])
  assert float(loss) == pytest.approx(expected, rel=1e-5)
  assert float(weight) == pytest.approx(batch.weights.sum(), rel=1e-6)
  plain = next_token().loss(TRUNK.apply, params, batch, None)[2]
  assert {name: float(sums[name]) for name in plain} == pytest.approx({n: float(x) for n, x in plain.items()}, rel=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize('make', [lambda token_loss: next_token(token_loss=token_loss),
                                  lambda token_loss: unlikelihood(next_token(token_loss=token_loss), 0.)])
def test_label_smoothing_and_z_loss_are_of_further_tokens_too(make):
  model, batch = prediction_heads.parallel(TRUNK, 2), packed_batch()
  params = random_params(model)
  goal = make(losses.token_loss(losses.nll, losses.smoothing(0.2), losses.z_loss(0.1)))
  out = jax.jit(model.apply)(params, batch)
  loss = jax.jit(functools.partial(sums_of, model, goal=goal))(params, batch)[0]
  expected = 0.
  for k, hidden in enumerate([out.hidden, *out.ahead]):
    logits = np.asarray(out.head(hidden), 'f8')
    log_z = np.log(np.exp(logits).sum(-1))
    for b in range(4):
      for i in range(TIME - k):
        if batch.segments[b, i] == batch.segments[b, i + k] > 0:
          shares = 0.8 * np.eye(VOCAB)[batch.targets[b, i + k]] + 0.2 / VOCAB
          cost = shares @ (log_z[b, i] - logits[b, i]) + 0.1 * log_z[b, i] ** 2
          expected += batch.weights[b, i + k] * cost * (0.3 / 2 if k else 1)
  assert float(loss) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize('outer', [unlikelihood, lambda goal: distil(goal, TRUNK.apply)],
                         ids=['unlikelihood', 'distil'])
def test_a_loss_is_replaced_only_where_nothing_of_it_is_lost(outer):
  for goal in (multi_token_loss(next_token()), unlikelihood(next_token()), distil(next_token(), TRUNK.apply),
               masked_diffusion()):
    with pytest.raises(ValueError, match='terms other than the loss of its targets, such as further tokens'):
      outer(goal)
  batch, params = packed_batch(), random_params(prediction_heads.parallel(TRUNK, 0))
  weight = outer(next_token(objective.sequence_mean)).loss(TRUNK.apply, {**params, 'teacher': params}, batch, None)[1]
  assert float(weight) == float(objective.sequence_mean(batch)) != float(batch.weights.sum())


def test_without_depths_it_is_next_token_prediction():
  model, batch, key = prediction_heads.sequential(TRUNK, 0), packed_batch(), jax.random.key(5)
  params = random_params(model)
  plain = jax.jit(jax.value_and_grad(lambda p: next_token().loss(TRUNK.apply, p, batch, key)[0]))
  # Two compilations may add in another order, so they agree up to rounding.
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()),
               loss_and_grads(model, params, batch, key), plain(params))


@KINDS
def test_depth_k_sees_k_tokens_further_and_no_other_segment(kind):
  """By gradient: token j changes what depth k gives at i only if j <= i + k, in the same segment."""
  model, batch = kind(TRUNK, 2), packed_batch()
  params, places = random_params(model), np.arange(2 * TIME, dtype=np.int32).reshape(2, TIME)

  @jax.jit
  def jacobian(params):   # each place has an embedding of its own
    rows = Batch(places, positions=batch.positions[:2], segments=batch.segments[:2])
    def hidden(table):
      out = model.apply({**params, 'embedding': table}, rows)
      return jnp.stack([out.hidden, *out.ahead]) @ jnp.arange(1., 1 + WIDTH)
    gradients = jax.jacrev(hidden)(params['embedding'][:])
    return jnp.abs(gradients).sum(-1) > 0

  depends = np.asarray(jacobian(params))[..., :2 * TIME].reshape(3, 2, TIME, 2, TIME)
  for k in range(3):
    reach = k if kind is prediction_heads.sequential else 0
    for b in range(2):
      assert not depends[k, b, :, 1 - b].any()
      for i in range(TIME):
        same = batch.segments[b] == batch.segments[b, i]
        if batch.segments[b, i]:
          np.testing.assert_array_equal(depends[k, b, i, b], same & (np.arange(TIME) <= i + reach))


@pytest.mark.slow
def test_packed_equals_unpacked():
  batch, params = packed_batch(), random_params(SEQUENTIAL)
  packed = loss_and_grads(SEQUENTIAL, params, batch)
  pieces = [(0, slice(0, 8)), (1, slice(0, 4)), (1, slice(4, 7))]
  rows = jax.tree.map(lambda x: np.zeros((4, TIME), x.dtype), batch)
  for n, (b, span) in enumerate(pieces):
    for new, old in zip(rows[:5], batch[:5]):
      new[n, :span.stop - span.start] = old[b, span]
    rows.segments[n] = rows.segments[n] > 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), packed,
               loss_and_grads(SEQUENTIAL, params, rows))


@pytest.mark.slow
def test_gradients_are_finite_differences_with_dropout_too():
  model, batch, key = SEQUENTIAL, packed_batch(), jax.random.key(4)
  params = random_params(model)
  direction = jax.tree.map(lambda x: np.random.default_rng(2).normal(size=x.shape).astype('f4'), params)

  def moved(h):
    shifted = jax.tree.map(lambda x, d: x + np.float32(h) * d, params, direction)
    return loss_and_grads(model, shifted, batch, key)

  loss, grads = moved(0)
  slope = (float(moved(1e-3)[0]) - float(moved(-1e-3)[0])) / 2e-3
  expected = sum(np.vdot(np.asarray(g), d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
  assert slope == pytest.approx(expected, rel=2e-2)
  assert abs(float(loss) - float(loss_and_grads(model, params, batch, jax.random.key(6))[0])) > 1e-3
  assert min(float(jnp.abs(x).max()) for x in jax.tree.leaves(grads['depths'])) > 0   # each parameter is trained


def test_remat_changes_nothing():
  saving, recomputing = prediction_heads.sequential(TRUNK.clone(remat=None), 2), SEQUENTIAL
  params, batch = random_params(saving), packed_batch()
  assert TRUNK.remat is parts.keep_products
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
               loss_and_grads(saving, params, batch), loss_and_grads(recomputing, params, batch))


@pytest.mark.slow
def test_loss_and_gradients_are_the_same_on_a_mesh():
  model, batch, key = SEQUENTIAL, packed_batch(), jax.random.key(4)
  params = random_params(model)
  expected = loss_and_grads(model, params, batch, key)
  with jax.set_mesh(sharding.make_mesh('fsdp:2,tensor:2', jax.devices()[:4])):
    mesh = jax.sharding.get_mesh()
    placed = jax.tree.map(lambda x, like: jax.device_put(x, jax.sharding.NamedSharding(mesh, like.sharding.spec)),
                          params, jax.eval_shape(model.init, jax.random.key(0)))
    actual = loss_and_grads(model, placed, sharding.shard_rows(batch, mesh), key)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * (np.abs(b).max() + 1)), actual, expected)


@pytest.mark.slow
def test_the_trunk_starts_with_its_own_parameters():
  model = SEQUENTIAL
  params, trunk = jax.jit(model.init)(jax.random.key(0)), jax.jit(TRUNK.init)(jax.random.key(0))
  jax.tree.map(np.testing.assert_array_equal, {name: params[name] for name in trunk}, trunk)
  first, second = (jax.tree.leaves(jax.tree.map(lambda x, k=k: x[k], params['depths'])) for k in range(2))
  assert all((a != b).any() or (a == 1).all() for a, b in zip(first, second))
  with pytest.raises(ValueError, match='depths=-1'):
    prediction_heads.parallel(TRUNK, -1)


def test_training_never_holds_all_logits(monkeypatch):
  monkeypatch.setattr(objective, 'chunk_length', lambda *sizes: 2)
  model, batch = prediction_heads.sequential(transformer.llama(512, 8, 1, 2, hidden=8, max_length=TIME),
                                             2), packed_batch()
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  text = str(jax.make_jaxpr(jax.grad(lambda p: sums_of(model, p, batch)[0]))(shapes))
  assert '[4,2,512]' in text and '[4,8,512]' not in text


def test_its_trunk_is_exported(tmp_path):
  model = prediction_heads.sequential(TRUNK.clone(dropout=0.), 1)
  words = tokenizers.Bytes(())
  model = dataclasses.replace(model, trunk=model.trunk.clone(vocab=264))
  params = random_params(model)
  for name, written in (('all', model), ('trunk', model.trunk)):
    pretrained.write(tmp_path / name, written, params, words)
  files = [{path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ('all', 'trunk')]
  assert files[0] == files[1] and 'model.safetensors' in files[0]


def test_texts_are_scored_by_the_trunk():
  model = SEQUENTIAL
  params, texts = random_params(model), [np.arange(6, dtype=np.int32)]
  np.testing.assert_array_equal(evaluate.log_probabilities(model, params, texts)[0],
                                evaluate.log_probabilities(TRUNK, params, texts)[0])
