"""Attention in blocks: values and gradients are those of the plain formula, whatever is seen."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.models.attention import Scores, Visible, attend

TIME = 300   # of three blocks


def plain(q, k, v, visible, scores, sinks):
  """All scores at once."""
  groups = q.shape[2] // k.shape[2]
  k, v = (jnp.repeat(x, groups, axis=2) for x in (k, v))
  s = jnp.einsum('BTNH,BSNH->BNTS', q, k) * (q.shape[-1] ** -0.5 if scores.scale is None else scores.scale)
  if scores.softcap is not None:
    s = scores.softcap * jnp.tanh(s / scores.softcap)
  t = np.arange(q.shape[1])
  seen = jnp.broadcast_to((t[:, None] >= t[None])[None], (len(q), TIME, TIME))
  if visible.bidirectional_BS is not None:
    seen = seen | visible.bidirectional_BS[:, None]
  if scores.window is not None:
    seen = seen & (abs(t[:, None] - t[None]) < scores.window)[None]
  if scores.chunk is not None:
    chunk = visible.positions_BT // scores.chunk
    seen = seen & (chunk[:, :, None] == chunk[:, None])
  if visible.segments_BT is not None:
    seen = seen & (visible.segments_BT[:, :, None] == visible.segments_BT[:, None])
  s = jnp.where(seen[:, None], s, -jnp.inf)
  if sinks is not None:
    s = jnp.concatenate([s, jnp.broadcast_to(sinks[None, :, None, None], (*s.shape[:3], 1))], axis=-1)
  return jnp.einsum('BNTS,BSNH->BTNH', jax.nn.softmax(s)[..., :TIME], v)


PACKED = np.repeat([[1, 2, 3], [1, 2, 0]], [140, 90, 70], axis=1).astype(np.int32)
POSITIONS = np.concatenate([np.arange(n) for n in (140, 90, 70)]).astype(np.int32)[None].repeat(2, axis=0)
SEEN = {
    'causal': Visible(),
    'packed': Visible(PACKED, PACKED, None, POSITIONS, POSITIONS),
    'prefix': Visible(bidirectional_BS=np.arange(TIME)[None].repeat(2, 0) < np.array([[30], [170]])),
}


@pytest.mark.parametrize('seen', SEEN)
@pytest.mark.parametrize('scores, sinks', [
    (Scores(), False), (Scores(window=2), True), (Scores(window=200), False), (Scores(chunk=64), False),
    (Scores(softcap=1.5), True), (Scores(0.3, 1.5, 50), False), (Scores(0.3, 1.5, 50, 64), True)], ids=str)
def test_values_and_gradients_are_those_of_the_plain_formula(seen, scores, sinks):
  if scores.chunk is not None and seen != 'packed':
    pytest.skip('chunks are of positions')
  keys = jax.random.split(jax.random.key(0), 5)
  q, k = jax.random.normal(keys[0], (2, TIME, 4, 16)) * 2, jax.random.normal(keys[1], (2, TIME, 2, 16))
  v, dy = jax.random.normal(keys[2], (2, TIME, 2, 24)), jax.random.normal(keys[3], (2, TIME, 4, 24))
  inputs = (q, k, v, jax.random.normal(keys[4], (4,)) * 2) if sinks else (q, k, v)

  @jax.jit
  def both(*inputs):
    def of(function):
      y, pull = jax.vjp(lambda q, k, v, s=None: function(q, k, v, SEEN[seen], scores, s), *inputs)
      return y, *pull(dy)
    return of(attend), of(lambda q, k, v, visible, scores, s: plain(q, k, v, visible, scores, s))

  for name, actual, expected in zip(('y', 'dq', 'dk', 'dv', 'dsinks'), *both(*inputs)):
    assert np.abs(expected).max() > 1e-3, name
    np.testing.assert_allclose(actual, expected, atol=2e-5 * max(1, np.abs(expected).max()), err_msg=name)
