"""Each kernel of attention has the values and gradients of the plain formula, for every kind of mask it accepts."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.slow import slow

from lm import sharding
from lm.models import kernel_choice
from lm.models.attention import AttentionScores, Visible, attend
from lm.models.kernel_choice import Choice, choose, splash
from lm.models.kernels import AttentionDropout, blockwise

TIME = 300   # three blocks


def plain(q, k, v, visible, scores, sinks):
  """Returns attention with all scores at once."""
  groups = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
  s = jnp.einsum('BTNH,BSNH->BNTS', q, k) * (q.shape[-1] ** -0.5 if scores.scale is None else scores.scale)
  if scores.softcap is not None:
    s = scores.softcap * jnp.tanh(s / scores.softcap)
  t = np.arange(q.shape[1])
  visible_from = t[:, None] >= t[None] if scores.causal else np.full((len(t), len(t)), True)
  mask = jnp.broadcast_to(visible_from[None], (len(q), q.shape[1], q.shape[1]))
  if visible.bidirectional_BS is not None:
    mask = mask | visible.bidirectional_BS[:, None]
  if scores.window is not None:
    mask = mask & (abs(t[:, None] - t[None]) < scores.window)[None]
  if scores.chunk is not None:
    chunk = visible.positions_BT // scores.chunk
    mask = mask & (chunk[:, :, None] == chunk[:, None])
  if visible.segments_BT is not None:
    mask = mask & (visible.segments_BT[:, :, None] == visible.segments_BT[:, None])
  s = jnp.where(mask[:, None], s, -jnp.inf)
  if sinks is not None:
    s = jnp.concatenate([s, jnp.broadcast_to(sinks[None, :, None, None], (*s.shape[:3], 1))], axis=-1)
  return jnp.einsum('BNTS,BSNH->BTNH', jax.nn.softmax(s)[..., :q.shape[1]], v)


PACKED = np.repeat([[1, 2, 3], [1, 2, 0]], [140, 90, 70], axis=1).astype(np.int32)
POSITIONS = np.concatenate([np.arange(n) for n in (140, 90, 70)]).astype(np.int32)[None].repeat(2, axis=0)
VISIBLE = {
    'causal': Visible(),
    'packed': Visible(PACKED, PACKED, None, POSITIONS, POSITIONS),
    'prefix': Visible(bidirectional_BS=np.arange(TIME)[None].repeat(2, 0) < np.array([[30], [170]])),
}


@pytest.mark.parametrize('visibility', VISIBLE)
@pytest.mark.parametrize('scores, sinks', [
    (AttentionScores(), False), (AttentionScores(0.3, 1.5, 50, 64), True), *slow(
        (AttentionScores(window=2), True), (AttentionScores(window=200), False), (AttentionScores(chunk=64), False),
        (AttentionScores(softcap=1.5), True), (AttentionScores(0.3, 1.5, 50), False))], ids=str)
def test_values_and_gradients_are_those_of_the_plain_formula(visibility, scores, sinks):
  if scores.chunk is not None and visibility != 'packed':
    pytest.skip('chunks are of positions')
  keys = jax.random.split(jax.random.key(0), 5)
  q, k = jax.random.normal(keys[0], (2, TIME, 4, 16)) * 2, jax.random.normal(keys[1], (2, TIME, 2, 16))
  v, dy = jax.random.normal(keys[2], (2, TIME, 2, 24)), jax.random.normal(keys[3], (2, TIME, 4, 24))
  inputs = (q, k, v, jax.random.normal(keys[4], (4,)) * 2) if sinks else (q, k, v)

  @jax.jit
  def both(*inputs):
    def of(function):
      y, pull = jax.vjp(lambda q, k, v, s=None: function(q, k, v, VISIBLE[visibility], scores, s), *inputs)
      return y, *pull(dy)
    return of(attend), of(lambda q, k, v, visible, scores, s: plain(q, k, v, visible, scores, s))

  for name, actual, expected in zip(('y', 'dq', 'dk', 'dv', 'dsinks'), *both(*inputs)):
    assert np.abs(expected).max() > 1e-3, name
    np.testing.assert_allclose(actual, expected, atol=2e-5 * max(1, np.abs(expected).max()), err_msg=name)


@pytest.fixture
def fused(monkeypatch):
  """Lets the platform count as a GPU, and returns the options of each call of the fused kernel. XLA computes it here.
  """
  calls, compute = [], jax.nn.dot_product_attention

  def stand_in(*arrays, implementation, **options):
    calls.append({'implementation': implementation, **options})
    return compute(*arrays, **options)

  monkeypatch.setattr(sharding, 'platform', lambda: 'cuda')
  monkeypatch.setattr(jax.nn, 'dot_product_attention', stand_in)
  return calls


def half(*sizes, dtype=jnp.bfloat16):
  """Returns bfloat16 queries, keys and values of these head sizes, with two heads for one key head."""
  keys = jax.random.split(jax.random.key(3), 3)
  return tuple(jax.random.normal(key, (2, TIME, heads, size), dtype)
               for key, heads, size in zip(keys, (4, 2, 2), sizes))


@pytest.mark.parametrize('visibility', VISIBLE)
@pytest.mark.parametrize('scores', [AttentionScores(), AttentionScores(window=20), AttentionScores(0.3),
                                    AttentionScores(causal=False), AttentionScores(chunk=64)],
                         ids=str)
def test_the_fused_kernel_has_the_mask_of_the_plain_formula(fused, scores, visibility):
  if scores.chunk is not None and visibility != 'packed':
    pytest.skip('chunks are of positions')
  q, k, v = half(16, 16, 16)
  actual = attend(q, k, v, VISIBLE[visibility], scores)
  assert [call['implementation'] for call in fused] == ['cudnn']
  has_mask = visibility != 'causal' or scores.chunk is not None
  assert ('mask' in fused[0]) == has_mask   # cuDNN is quickest without one
  if scores.causal:
    expected = plain(*(x.astype(jnp.float32) for x in (q, k, v)), VISIBLE[visibility], scores, None)
    real = np.ones((2, TIME), bool) if VISIBLE[visibility].segments_BT is None else VISIBLE[visibility].segments_BT > 0
    np.testing.assert_allclose(np.float32(actual)[real], np.asarray(expected)[real], atol=0.03)


@pytest.mark.parametrize('arrays, scores, sinks, bias', [
    (half(16, 16, 16), AttentionScores(softcap=1.5), False, False), (half(16, 16, 16), AttentionScores(), True, False),
    (half(16, 16, 16), AttentionScores(), False, True), (half(16, 16, 24), AttentionScores(), False, False),
    (half(12, 12, 12), AttentionScores(), False, False),
    (half(16, 16, 16, dtype=jnp.float32), AttentionScores(), False, False)],
    ids=['softcap', 'sinks', 'bias', 'values of another size', 'heads of 12', 'float32'])
def test_the_fused_kernel_is_not_called_for_what_it_cannot_compute(fused, arrays, scores, sinks, bias):
  visible = Visible(bias_NTS=jnp.ones((4, TIME, TIME))) if bias else Visible()
  actual = attend(*arrays, visible, scores, jnp.ones(4) if sinks else None)
  assert not fused and actual.shape == (2, TIME, 4, arrays[2].shape[-1])


def test_a_platform_without_a_fused_kernel_computes_blockwise_and_has_no_reason_to_give():
  assert choose('cpu', *half(16, 16, 16), Visible(), AttentionScores()) == Choice(blockwise)


DROP = AttentionDropout(jax.random.key(0), np.arange(2), np.arange(4))


@pytest.mark.parametrize('platform, length, options, reason', [
    ('tpu', 256, {'scores': AttentionScores(chunk=64)}, 'chunks of positions are not'),
    ('tpu', 256, {'visible': Visible(bidirectional_BS=np.ones((2, 256), bool))}, 'bidirectional tokens are not'),
    ('tpu', 256, {'visible': Visible(bias_NTS=np.ones((4, 256, 256)))}, 'no bias'),
    ('tpu', 256, {'drop': DROP}, 'no dropout'), ('tpu', 200, {}, 'multiples of 128, not 200 and 200'),
    ('tpu', 256, {'dtype': jnp.float16}, 'not in float16'),
    ('cuda', 256, {'dtype': jnp.float32, 'drop': DROP}, 'no dropout of attention; it computes in bfloat16 or float16'),
    ('cuda', 256, {'size': 12}, 'multiple of 8 up to 128, not 12'), ('cuda', 256, {'size': 256}, 'up to 128, not 256'),
    ('cuda', 255, {}, 'lengths are even, not 255 and 255'), ('gpu', 256, {'sinks_N': np.ones(4)}, 'no sinks')], ids=str)
def test_what_a_fused_kernel_cannot_compute_is_said_and_is_computed_blockwise(platform, length, options, reason):
  options = dict(options)
  q = jax.ShapeDtypeStruct((2, length, 4, options.pop('size', 16)), options.pop('dtype', jnp.bfloat16))
  k = jax.ShapeDtypeStruct((2, length, 2, q.shape[-1]), q.dtype)
  options = {'visible': Visible(), 'scores': AttentionScores(), **options}
  choice = choose(platform, q, k, k, **options)
  assert choice.kernel is blockwise and reason in choice.reason


def test_the_kernel_is_printed_once(fused, capsys):
  kernel_choice._print.cache_clear()
  for _ in range(2):
    attend(*half(16, 16, 16), Visible())
    attend(*half(16, 16, 16), Visible(), AttentionScores(softcap=30.))
  assert capsys.readouterr().err.splitlines() == [
      'cudnn attention', 'blockwise attention, because cudnn does not fit: it has no softcap']


LENGTH = 384   # three blocks of the splash kernel
SEGMENTS = np.repeat([[1, 2, 3], [1, 2, 0]], [200, 90, 94], axis=1).astype(np.int32)


@pytest.mark.parametrize('packed, scores, sinks, sizes', [
    (True, AttentionScores(0.3, 1.5, 150), True, (16, 24)), (False, AttentionScores(), False, (64, 64)),
    *slow((True, AttentionScores(), False, (16, 16)), (False, AttentionScores(causal=False), False, (16, 16)),
          (True, AttentionScores(window=100, causal=False), False, (16, 16)))], ids=str)
def test_the_splash_kernel_has_the_values_and_gradients_of_the_plain_formula(packed, scores, sinks, sizes):
  keys = jax.random.split(jax.random.key(0), 5)
  q, k = jax.random.normal(keys[0], (2, LENGTH, 4, sizes[0])) * 2, jax.random.normal(keys[1], (2, LENGTH, 2, sizes[0]))
  v, dy = jax.random.normal(keys[2], (2, LENGTH, 2, sizes[1])), jax.random.normal(keys[3], (2, LENGTH, 4, sizes[1]))
  inputs = (q, k, v, jax.random.normal(keys[4], (4,)) * 2) if sinks else (q, k, v)
  visible = Visible(SEGMENTS, SEGMENTS) if packed else Visible()
  assert choose('tpu', q, k, v, visible, scores, inputs[3:] or None).kernel is splash

  @jax.jit
  def both(*inputs):
    def of(function):
      y, pull = jax.vjp(lambda q, k, v, s=None: function(q, k, v, s), *inputs)
      return y, *pull(dy)
    return (of(lambda q, k, v, s: splash(q, k, v, visible, scores, s, interpret=True)),
            of(lambda q, k, v, s: plain(q, k, v, visible, scores, s)))

  for name, actual, expected in zip(('y', 'dq', 'dk', 'dv', 'dsinks'), *both(*inputs)):
    assert np.abs(expected).max() > 1e-3, name
    np.testing.assert_allclose(actual, expected, atol=2e-5 * max(1, np.abs(expected).max()), err_msg=name)
