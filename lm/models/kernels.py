"""Masks of attention, and the kernel that computes all of them on any platform. Shape legend: `transformer.py`."""
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


class Visible(NamedTuple):
  """Which keys a query sees: those of its own segment that are not later than it, or that are marked bidirectional.

  A window or a chunk restricts both kinds of keys; a window is as wide towards later keys as towards earlier ones. A
  field that is None does not restrict.

  Attributes:
    segments_BT: the number of the document of each query; 0 is padding.
    key_segments_BS: that of each key.
    bidirectional_BS: which keys are seen by earlier queries too.
    positions_BT: of queries in their documents; only `AttentionScores.chunk` uses positions.
    key_positions_BS: of keys in their documents.
    start: in cached decoding, the slot of the first query among the keys, a scalar or [B].
    bias_NTS: is added to the scores (T5), and is differentiated; in cached decoding, it may be [B, N, T, S].
    pages_BM: the numbers of the M pages that have the slots of each row, if the cache has pages.
    window_pages_BM: the same for layers with a window.
  """
  segments_BT: jax.Array | None = None
  key_segments_BS: jax.Array | None = None
  bidirectional_BS: jax.Array | None = None
  positions_BT: jax.Array | None = None
  key_positions_BS: jax.Array | None = None
  start: jax.Array | None = None
  bias_NTS: jax.Array | None = None
  pages_BM: jax.Array | None = None
  window_pages_BM: jax.Array | None = None

  def mask(self, queries: slice, keys: slice, scores: 'AttentionScores') -> jax.Array:
    """Returns the mask of a block of queries and keys, bool [B or 1, 1, T, S]."""
    first = jnp.reshape(0 if self.start is None else self.start, (-1, 1, 1))
    distance = (jnp.arange(queries.start, queries.stop)[None, :, None] + first
                - jnp.arange(keys.start, keys.stop)[None, None])
    mask = (distance >= 0 if scores.causal else jnp.full(distance.shape, True))[:, None]
    if self.bidirectional_BS is not None:
      mask = mask | self.bidirectional_BS[:, None, None, keys]
    if scores.window is not None:
      mask = mask & (jnp.abs(distance) < scores.window)[:, None]
    if scores.chunk is not None:
      chunk, key_chunk = self.positions_BT // scores.chunk, self.key_positions_BS // scores.chunk
      mask = mask & (chunk[:, None, queries, None] == key_chunk[:, None, None, keys])
    if self.segments_BT is not None:
      mask = mask & (self.segments_BT[:, None, queries, None] == self.key_segments_BS[:, None, None, keys])
    return mask


@dataclasses.dataclass(frozen=True)
class AttentionScores:
  """Attention scores: scale q k, or softcap * tanh(scale q k / softcap), and further restrictions on visible keys.

  Args:
    scale: the factor; None means 1 / sqrt(H).
    softcap: the bound of the scores; None for no bound.
    window: a query sees only the last `window` keys, its own included.
    chunk: a query sees only keys of its own chunk of so many positions.
    causal: whether later keys are hidden.
    dropout: the share of probabilities that training sets to zero; the others are divided by 1 - `dropout`.
  """
  scale: float | None = None
  softcap: float | None = None
  window: int | None = None
  chunk: int | None = None
  causal: bool = True
  dropout: float = 0.

  def __post_init__(self):
    if not 0 <= self.dropout < 1:
      raise ValueError(f'attention dropout={self.dropout} is not in [0, 1)')


class AttentionDropout(NamedTuple):
  """Draws the probabilities that are set to zero, from the key and the global indices of row and head."""
  key: jax.Array
  rows_B: jax.Array
  heads_N: jax.Array

  def scale(self, rate: float, block: int, shape: tuple[int, ...]) -> jax.Array:
    """Returns 0 with probability r, otherwise 1 / (1 - r), as float32 [B, K, G, T, S]; the same values at every call.

    r equals `rate` to within 2 ** -17, because each random number of 32 bits serves two probabilities.
    """
    key, (queries, keys) = jax.random.fold_in(self.key, block), shape[3:]

    def draw(row, head):
      return jax.random.bits(jax.random.fold_in(jax.random.fold_in(key, row), head), (queries, -(-keys // 2)))

    bits = jax.vmap(lambda row: jax.vmap(lambda head: draw(row, head))(self.heads_N))(self.rows_B)
    bits = jnp.concatenate([bits >> 16, bits & 0xffff], axis=-1)[..., :keys].reshape(shape)
    dropped = min(round(rate * 2 ** 16), 2 ** 16 - 1)
    return jnp.where(bits >= dropped, 1 / (1 - dropped / 2 ** 16), 0.)


def blockwise(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, visible: Visible,
              scores: AttentionScores = AttentionScores(),
              sinks_N: jax.Array | None = None, drop: AttentionDropout | None = None) -> jax.Array:
  """Computes attention for a block of queries at a time. Scores are not stored, nor computed above the diagonal.

  The backward pass recomputes them in float32 from the outputs and the logarithms of the softmax's denominators (Dao et
  al. 2022), and draws the same dropout again.
  """
  q, sinks = _grouped(scores, q_BTNH, sinks_N, k_BTKH.shape[2])
  return _ungrouped(_blockwise(scores, q, k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2), sinks, visible, drop))


def cached(q_BTNH: jax.Array, k_BKSH: jax.Array, v_BKSH: jax.Array, visible: Visible, scores: AttentionScores,
           sinks_N: jax.Array | None = None, drop: AttentionDropout | None = None) -> jax.Array:
  """Computes attention over the slots of a cache, all scores at once."""
  del drop   # training uses no cache
  q, sinks = _grouped(scores, q_BTNH, sinks_N, k_BKSH.shape[1])
  queries, keys = slice(0, q.shape[3]), slice(0, k_BKSH.shape[2])
  y, _ = _softmax(_scores(scores, q.astype(k_BKSH.dtype), k_BKSH, visible, queries, keys), v_BKSH, sinks)
  return _ungrouped(y.astype(q_BTNH.dtype))


def paged(q_BTNH: jax.Array, k_PKSH: jax.Array, v_PKSH: jax.Array, visible: Visible, scores: AttentionScores,
          sinks_N: jax.Array | None = None) -> jax.Array:
  """Computes attention over the pages of each row, each of which has S slots, one page of all rows at a time.

  It reads as many pages as the longest row has, without gathering them. A slot that a row does not see changes no bit
  of the row's output, so that the output does not depend on the other rows, even where their values are not finite.
  """
  q, sinks = _grouped(scores, q_BTNH, sinks_N, k_PKSH.shape[1])
  table, time, size = visible.pages_BM, q.shape[3], k_PKSH.shape[2]
  mask = visible.mask(slice(0, time), slice(0, table.shape[1] * size), scores)[:, :, None]
  is_live = visible.segments_BT[:, -1] > 0
  last = jnp.max(jnp.where(is_live, visible.start, 0)) + time - 1
  first = 0
  if scores.window is not None:
    earliest = jnp.min(jnp.where(is_live, visible.start, last)) - scores.window + 1
    first = jnp.maximum(earliest, 0) // size

  def add_page(number, carry):
    y, highest, total = carry
    pages = table[:, number]
    s = jnp.einsum('BKGTH,BKSH->BKGTS', q.astype(k_PKSH.dtype), k_PKSH[pages], preferred_element_type=jnp.float32)
    if scores.softcap is not None:
      s = scores.softcap * jnp.tanh(s / scores.softcap)
    page_mask = jax.lax.dynamic_slice_in_dim(mask, number * size, size, axis=4)
    s = jnp.where(page_mask, s, -1e30)
    is_seen_B1S1 = jnp.any(page_mask, axis=3)[:, 0, :, :, None]
    v = jnp.where(is_seen_B1S1, v_PKSH[pages], 0)   # the page may be another row's, and 0 * NaN would be NaN
    new_highest = jnp.maximum(highest, jnp.max(s, axis=-1, keepdims=True))
    weights, factor = jnp.exp(s - new_highest), jnp.exp(highest - new_highest)
    values = jnp.einsum('BKGTS,BKSH->BKGTH', weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return y * factor + values, new_highest, total * factor + jnp.sum(weights, axis=-1, keepdims=True)

  shape = q.shape[:4]
  y, highest, total = jax.lax.fori_loop(first, jnp.minimum(last // size + 1, table.shape[1]), add_page, (
      jnp.zeros((*shape, v_PKSH.shape[-1])), jnp.full((*shape, 1), -1e30), jnp.zeros((*shape, 1))))
  if sinks is not None:
    new_highest = jnp.maximum(highest, sinks)
    y, total = y * jnp.exp(highest - new_highest), total * jnp.exp(highest - new_highest) + jnp.exp(sinks - new_highest)
  return _ungrouped((y / total).astype(q_BTNH.dtype))


def _grouped(scores, q_BTNH, sinks_N, groups):
  """Returns scaled queries as [B, K, G, T, H], and sinks as [1, K, G, 1, 1]."""
  batch, time, heads, size = q_BTNH.shape
  scale = size ** -0.5 if scores.scale is None else scores.scale
  q = (q_BTNH * scale).astype(q_BTNH.dtype).reshape(batch, time, groups, heads // groups, size)
  sinks = None if sinks_N is None else sinks_N.astype(jnp.float32).reshape(1, groups, heads // groups, 1, 1)
  return q.transpose(0, 2, 3, 1, 4), sinks


def _ungrouped(y_BKGTH):
  batch, groups, each, time, size = y_BKGTH.shape
  return y_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, time, groups * each, size)


def _blocks(time: int, keys: int, visible: Visible, scores: AttentionScores) -> list[tuple[slice, slice]]:
  """Returns blocks of queries, each with the range of keys that it may see."""
  block = max(128, -(-time // 16))   # at most 16 blocks, because each adds to the compiled program
  ends = [(start, min(start + block, time)) for start in range(0, time, block)]
  if visible.bidirectional_BS is not None or not scores.causal:
    return [(slice(a, b), slice(0, keys)) for a, b in ends]
  return [(slice(a, b), slice(max(0, a + 1 - (scores.window or time)), b)) for a, b in ends]


def _scores(scores, q, k, visible, queries, keys):
  s = jnp.einsum('BKGTH,BKSH->BKGTS', q[:, :, :, queries], k[:, :, keys], preferred_element_type=jnp.float32)
  if visible.bias_NTS is not None:
    s = s + visible.bias_NTS[..., queries, keys].reshape(-1, *s.shape[1:])
  if scores.softcap is not None:
    s = scores.softcap * jnp.tanh(s / scores.softcap)
  return jnp.where(visible.mask(queries, keys, scores)[:, :, None], s, -1e30)   # finite, because padding sees no key


def _softmax(s_BKGTS, v_BKSH, sinks, dropout=None):
  """Returns softmax(s) v in float32, and the logarithm of the denominators; `dropout` multiplies the probabilities."""
  highest = jnp.max(s_BKGTS, axis=-1, keepdims=True)
  if sinks is not None:
    highest = jnp.maximum(highest, sinks)
  weights = jnp.exp(s_BKGTS - highest)
  total = jnp.sum(weights, axis=-1, keepdims=True)
  if sinks is not None:
    total = total + jnp.exp(sinks - highest)
  if dropout is not None:
    weights = weights * dropout
  y = jnp.einsum('BKGTS,BKSH->BKGTH', weights.astype(v_BKSH.dtype), v_BKSH, preferred_element_type=jnp.float32)
  return y / total, highest + jnp.log(total)


def _dropout(scores, drop, block, s_BKGTS):
  return None if drop is None else drop.scale(scores.dropout, block, s_BKGTS.shape)


def _forward(scores, q_BKGTH, k_BKTH, v_BKTH, sinks, visible, drop):
  outputs, logs = [], []
  for i, (queries, keys) in enumerate(_blocks(q_BKGTH.shape[3], k_BKTH.shape[2], visible, scores)):
    s = _scores(scores, q_BKGTH, k_BKTH, visible, queries, keys)
    y, log = _softmax(s, v_BKTH[:, :, keys], sinks, _dropout(scores, drop, i, s))
    outputs.append(y.astype(v_BKTH.dtype))
    logs.append(log)
  y = checkpoint_name(jnp.concatenate(outputs, axis=3), 'attended')
  log = checkpoint_name(jnp.concatenate(logs, axis=3), 'attended')
  return y, (q_BKGTH, k_BKTH, v_BKTH, sinks, visible, drop, y, log)


def _backward(scores, residuals, dy):
  q, k, v, sinks, visible, drop, y, log = residuals
  correction = jnp.sum((y * dy).astype(jnp.float32), axis=-1, keepdims=True)
  dq, dk, dv = [], jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)
  dbias = None if visible.bias_NTS is None else jnp.zeros_like(visible.bias_NTS)
  for i, (queries, keys) in enumerate(_blocks(q.shape[3], k.shape[2], visible, scores)):
    s = _scores(scores, q, k, visible, queries, keys)
    weights = jnp.exp(s - log[:, :, :, queries])
    dropout, block = _dropout(scores, drop, i, s), dy[:, :, :, queries]
    applied = weights if dropout is None else weights * dropout
    f32 = {'preferred_element_type': jnp.float32}
    dv = dv.at[:, :, keys].add(jnp.einsum('BKGTS,BKGTH->BKSH', applied.astype(dy.dtype), block, **f32))
    dweights = jnp.einsum('BKGTH,BKSH->BKGTS', block, v[:, :, keys], **f32)
    dweights = dweights if dropout is None else dweights * dropout
    ds = weights * (dweights - correction[:, :, :, queries])
    if scores.softcap is not None:
      ds = jnp.where(s > -1e30, ds * (1 - jnp.square(s / scores.softcap)), 0)
    if dbias is not None:
      dbias = dbias.at[:, queries, keys].add(jnp.sum(ds, axis=0).reshape(-1, *ds.shape[3:]).astype(dbias.dtype))
    ds = ds.astype(q.dtype)
    dq.append(jnp.einsum('BKGTS,BKSH->BKGTH', ds, k[:, :, keys]))
    dk = dk.at[:, :, keys].add(jnp.einsum('BKGTS,BKGTH->BKSH', ds, q[:, :, :, queries], **f32))
  dsinks = None if sinks is None else -jnp.sum(jnp.exp(sinks - log) * correction, axis=(0, 3, 4), keepdims=True)
  return jnp.concatenate(dq, axis=3), dk.astype(k.dtype), dv.astype(v.dtype), dsinks, Visible(bias_NTS=dbias), None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blockwise(scores, q, k, v, sinks, visible, drop):
  return _forward(scores, q, k, v, sinks, visible, drop)[0]


_blockwise.defvjp(_forward, _backward)
