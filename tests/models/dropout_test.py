"""Dropout of attention and of layers equals the formula with its own mask, is unbiased, and needs a key."""
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.slow import slow

from lm import sharding
from lm.data.batch import Batch
from lm.models import kernels, stack, transformer
from lm.models import layers as parts
from lm.models.context import Aux, Context
from lm.models.kernel_choice import attend
from lm.models.kernels import AttentionDropout, AttentionScores, Visible

TIME, RATE = 200, 0.3   # two blocks of queries
SEGMENTS = np.repeat([[1, 2, 3], [1, 2, 0]], [90, 60, 50], axis=1).astype(np.int32)
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})


def inputs(sinks):
  keys = jax.random.split(jax.random.key(0), 5)
  q, k = jax.random.normal(keys[0], (2, TIME, 4, 8)) * 2, jax.random.normal(keys[1], (2, TIME, 2, 8))
  v, dy = jax.random.normal(keys[2], (2, TIME, 2, 8)), jax.random.normal(keys[3], (2, TIME, 4, 8))
  return ((q, k, v, jax.random.normal(keys[4], (4,))) if sinks else (q, k, v)), dy


def probabilities(q, k, visible, scores, sinks=None):
  """Returns attention probabilities [B, N, T, S], all at once, by the plain formula."""
  s = jnp.einsum('BTNH,BSNH->BNTS', q, jnp.repeat(k, 2, axis=2)) * q.shape[-1] ** -0.5
  s = s if scores.softcap is None else scores.softcap * jnp.tanh(s / scores.softcap)
  mask = np.tril(np.ones((1, TIME, TIME), bool)) if scores.causal else np.ones((1, TIME, TIME), bool)
  if visible.segments_BT is not None:
    mask = mask & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
  s = jnp.where(mask[:, None], s, -jnp.inf)
  if sinks is not None:
    s = jnp.concatenate([s, jnp.broadcast_to(sinks[None, :, None, None], (*s.shape[:3], 1))], axis=-1)
  return jax.nn.softmax(s)[..., :TIME]


def scales(visible, scores, key):
  """Returns the factor of each probability, [B, N, T, S], put together from the blocks."""
  drop, whole = AttentionDropout(key, jnp.arange(2), jnp.arange(4)), np.zeros((2, 4, TIME, TIME), 'f4')
  for i, (queries, keys) in enumerate(kernels._blocks(TIME, TIME, visible, scores)):
    shape = 2, 2, 2, queries.stop - queries.start, keys.stop - keys.start
    whole[:, :, queries, keys] = drop.scale(scores.dropout, i, shape).reshape(2, 4, *shape[3:])
  return whole


@pytest.mark.parametrize('visible, scores, sinks', [
    *slow((Visible(), AttentionScores(dropout=RATE), False)),
    (Visible(SEGMENTS, SEGMENTS), AttentionScores(softcap=1.5, dropout=RATE), True),
    *slow((Visible(SEGMENTS, SEGMENTS), AttentionScores(causal=False, dropout=0.6), False))],
                         ids=['causal', 'softcap', 'both ways'])
def test_values_and_gradients_are_those_of_the_plain_formula_with_the_same_mask(visible, scores, sinks):
  arrays, dy = inputs(sinks)
  key, scale = jax.random.key(1), scales(visible, scores, jax.random.key(1))
  np.testing.assert_allclose(np.unique(scale), [0, 1 / (1 - scores.dropout)], rtol=2 ** -16)

  def plain(q, k, v, s=None):
    return jnp.einsum('BNTS,BSNH->BTNH', probabilities(q, k, visible, scores, s) * scale, jnp.repeat(v, 2, axis=2))

  def ours(q, k, v, s=None):
    return attend(q, k, v, visible, scores, s, key)

  def both(function):
    y, pull = jax.vjp(function, *arrays)
    return y, *pull(dy)

  for name, actual, expected in zip(('y', 'dq', 'dk', 'dv', 'dsinks'), jit(lambda: both(ours))(),
                                    jit(lambda: both(plain))()):
    np.testing.assert_allclose(actual, expected, atol=2e-5 * np.abs(expected).max(), err_msg=name)


def test_masks_of_rows_heads_blocks_and_keys_are_independent_and_have_the_rate():
  masks = np.stack([scales(Visible(), AttentionScores(causal=False, dropout=RATE), jax.random.key(i)) for i in (0,
                                                                                                                1)]) > 0
  assert np.mean(masks) == pytest.approx(1 - RATE, abs=5 * np.sqrt(RATE * (1 - RATE) / masks.size))
  both = masks[..., :TIME // 2], masks[..., TIME // 2:]   # two keys share one random number
  assert np.mean(both[0][..., 128:, :] & both[1][..., 128:, :]) == pytest.approx((1 - RATE) ** 2, abs=0.01)
  for axis, size in ((0, 2), (1, 2), (2, 4)):   # keys, rows, heads: the share of equal entries is (1 - r)^2 + r^2
    same = np.take(masks, range(size - 1), axis) == np.take(masks, range(1, size), axis)
    chance = (1 - RATE) ** 2 + RATE ** 2
    assert np.mean(same) == pytest.approx(chance, abs=5 * np.sqrt(chance * (1 - chance) / same.size))
  first, second = masks[..., :72, :], masks[..., 128:, :]   # equally many queries of both blocks
  assert np.mean(first == second) == pytest.approx((1 - RATE) ** 2 + RATE ** 2, abs=0.01)


@pytest.mark.slow
def test_attention_dropout_is_unbiased():
  (q, k, v), _ = inputs(False)
  visible, scores, draws = Visible(SEGMENTS, SEGMENTS), AttentionScores(dropout=RATE), 100
  whole = attend(q, k, v, visible, AttentionScores())
  dropped = jit(lambda: jax.lax.map(lambda key: attend(q, k, v, visible, scores, None, key),
                                    jax.random.split(jax.random.key(3), draws)))()
  # y = sum_s m_s p_s v_s, and Var(m) = rate / (1 - rate)
  p, values = np.float64(probabilities(q, k, visible, AttentionScores())), np.float64(np.repeat(v, 2, axis=2))
  variance = np.einsum('BNTS,BSNH->BTNH', p ** 2, values ** 2) * RATE / (1 - RATE)
  error = (np.mean(np.float64(dropped), axis=0) - whole) / np.sqrt(variance / draws)
  assert np.abs(error).max() < 6 and np.std(error) == pytest.approx(1, abs=0.1)


def test_attention_without_a_key_is_the_program_without_dropout():
  (q, k, v), _ = inputs(False)
  def program(scores, key=None):
    return str(jax.make_jaxpr(lambda q: attend(q, k, v, Visible(), scores, None, key))(q))
  assert program(AttentionScores(dropout=RATE)) == program(AttentionScores()) == program(AttentionScores(),
                                                                                         jax.random.key(0))
  assert program(AttentionScores(dropout=RATE), jax.random.key(0)) != program(AttentionScores())


@pytest.mark.slow
def test_the_fused_kernel_which_has_no_dropout_is_not_taken(monkeypatch):
  q, visible = jnp.ones((1, 8, 2, 8), jnp.bfloat16), Visible()
  monkeypatch.setattr(sharding, 'platform', lambda: 'cuda')
  fused = []
  monkeypatch.setattr(jax.nn, 'dot_product_attention', lambda q, *args, **options: fused.append(options) or q)
  attend(q, q, q, visible, AttentionScores(dropout=RATE))
  assert fused.pop()['implementation'] == 'cudnn'
  attend(q, q, q, visible, AttentionScores(dropout=RATE), None, jax.random.key(0))
  assert not fused


class Adds(nn.Module):
  """A block that adds its weight to the stream."""

  @nn.compact
  def __call__(self, x, context, cache=None):
    return x + parts.weight(self, 'step', '-', (1,), nn.initializers.ones)[None, None], cache, Aux()


class Other(Adds):
  """Another class of block, so that layers alternate."""


class Same(nn.Module):

  @nn.compact
  def __call__(self, x):
    return x


def added(dropout, key, rows=400):
  """Returns what layers of 1, 10, 100 and 1000 add to each row, [rows], for one key or for each of several."""
  model = transformer.Transformer(4, 8, stack.stacks([Adds(), Other()] * 2), Same(), 16, layer_dropout=dropout)
  params = {'embedding': np.zeros((4, 8), 'f4'), 'blocks': {
      '0': {'step': np.float32([[1], [100]])}, '1': {'step': np.float32([[10], [1000]])}}}
  run = jax.jit(lambda key: model.apply(params, Batch(np.zeros((rows, 3), 'i4')), key=key).hidden)
  hidden = np.asarray(run(key) if key is None or key.ndim == 0 else jax.lax.map(run, key))
  assert (hidden == hidden[..., :1, :1]).all()   # a layer is dropped as a whole
  return hidden[..., 0, 0]


def test_stochastic_depth_draws_for_each_row_at_rates_that_rise_and_is_unbiased():
  dropout, rows = stack.stochastic_depth(4, 0.8), 400
  np.testing.assert_allclose(dropout.rates, [0.2, 0.4, 0.6, 0.8])
  x = added(dropout, jax.random.key(0), rows)
  steps = np.float32([1, 10, 100, 1000]) / (1 - np.float32(dropout.rates))
  masks = []
  for bits in range(16):   # each value is a sum of some of the layers
    keep = np.array([bits >> i & 1 for i in range(4)])
    masks += [keep] * int(np.sum(np.isclose(x, keep @ steps, rtol=1e-5)))
  assert len(masks) == rows
  survival = 1 - np.float64(dropout.rates)
  assert (np.abs(np.mean(masks, axis=0) - survival) < 5 * np.sqrt(survival * (1 - survival) / rows)).all()
  assert np.abs(np.corrcoef(np.array(masks).T) - np.eye(4)).max() < 5 / np.sqrt(rows)
  np.testing.assert_array_equal(x, added(dropout, jax.random.key(0), rows))


def test_layer_drop_draws_once_for_the_batch():
  dropout = stack.layer_drop(4, 0.5)
  assert dropout.rates == (0.5,) * 4
  sums = added(dropout, jax.random.split(jax.random.key(0), 80), 4)
  assert all((x == x[0]).all() for x in sums)
  patterns = {f'{int(x[0]):04}' for x in sums}   # four digits, each 0 or 2
  assert len(patterns) > 12 and set(''.join(patterns)) == {'0', '2'}


@pytest.mark.parametrize('dropout', [stack.layer_drop(4, 0.5), stack.stochastic_depth(4, 0.9)], ids=['batch', 'row'])
def test_layers_are_left_out_alike_on_any_mesh(dropout):
  expected = added(dropout, jax.random.key(5), 8)
  for mesh in ('fsdp:8', 'fsdp:4,tensor:2'):
    with jax.set_mesh(sharding.make_mesh(mesh)):
      np.testing.assert_array_equal(added(dropout, jax.random.key(5), 8), expected)


def test_layers_that_are_not_left_out_change_no_program():
  llama = functools.partial(transformer.llama, 8, 8, 2, 2, max_length=8, hidden=8, dropout=0.1)
  params = jax.eval_shape(llama().init, jax.random.key(0))
  def program(model, key):
    return str(jax.make_jaxpr(lambda p: model.apply(p, Batch(np.zeros((2, 8), 'i4')), key=key).hidden)(params))
  for key in (None, jax.random.key(0)):
    assert program(llama(), key) == program(llama(layer_dropout=stack.layer_drop(2, 0.)), key)
  dropped = llama(layer_dropout=stack.layer_drop(2, 0.5), attention_dropout=0.5)
  assert program(llama(), None) == program(dropped, None) != program(dropped, jax.random.key(0))
  assert dropped.dropout == dropped.layers[0].dropout == 0.1 and dropped.layers[0].attention.scores.dropout == 0.5
  assert llama(embedding_dropout=0.).dropout == 0. and llama(embedding_dropout=0.).layers[0].dropout == 0.1


@pytest.mark.parametrize('make, message', [
    (lambda: transformer.llama(8, 8, 1, 2, attention_dropout=1.), r'attention_dropout=1\.0 is not in \[0, 1\)'),
    (lambda: transformer.gpt2(8, 8, 1, 2, embedding_dropout=-0.1), r'embedding_dropout=-0\.1 is not in'),
    (lambda: stack.stochastic_depth(4, 1.), r'probability 1\.0: it is not in \[0, 1\)'),
    (lambda: AttentionScores(dropout=1.5), r'attention dropout=1\.5'),
    (lambda: added(stack.layer_drop(2, 0.5), None), '2 rates of layer dropout do not fit 4 layers')])
def test_rates_that_cannot_be_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


class Gives(nn.Module):
  """A branch that returns a number."""
  value: float

  @nn.compact
  def __call__(self, x, context, cache=None):
    y = jnp.full(x.shape, self.value)
    return (y, Aux()) if self.value < 10 else (y, cache)   # the results of a feed-forward and of an attention branch


@pytest.mark.parametrize('block', [parts.Block, parts.ParallelBlock])
def test_each_branch_of_a_block_is_dropped_by_a_mask_of_its_own(block):
  x, rate = jnp.zeros((8, 32, 64)), 0.25
  module = block(Gives(30.), Gives(3.), Same(), Same(), dropout=rate)
  y = np.asarray(module.apply({}, x, Context(None, Visible(), jax.random.key(0)))[0]) * (1 - rate)
  attention, feed_forward = np.round(y / 30).astype(int), np.round((y - 30 * np.round(y / 30)) / 3).astype(int)
  np.testing.assert_allclose(y, 30 * attention + 3 * feed_forward, rtol=1e-5)
  error = 5 / np.sqrt(y.size)
  assert set(np.unique(attention)) == set(np.unique(feed_forward)) == {0, 1}
  for branch in (attention, feed_forward):
    assert np.mean(branch) == pytest.approx(1 - rate, abs=error)
  assert abs(np.corrcoef(attention.ravel(), feed_forward.ravel())[0, 1]) < error
