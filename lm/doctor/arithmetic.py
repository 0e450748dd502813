"""Probes of arithmetic: the loss of new parameters, and the attention kernel."""
import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.doctor.findings import DoesNotApply, Finding, Verdict, judge
from lm.doctor.subject import Subject
from lm.models import kernel_choice
from lm.models.kernels import AttentionScores, Visible

LONGEST = 1024   # positions of the rows that the attention kernel is compared on


def loss_at_initialisation(subject: Subject) -> Finding:
  """Whether new parameters predict a random token with a loss near ln V."""
  if not subject.is_new:
    raise DoesNotApply('the parameters are not new')
  loss, vocab = subject.loss_and_vocabulary
  expected = math.log(vocab)
  text = f'the loss of new parameters is {loss:.2f} nats on random tokens, and ln {vocab:,} is {expected:.2f}'
  if loss < expected - max(0.5, 0.1 * expected):
    return judge(False, text, 'lower than any guess, so that the model sees its answers')
  return judge(loss <= expected + max(1.5, 0.3 * expected), text,
               'the initial logits are too large; lower the scale of the initial values', Verdict.WARNING)


class Heads(NamedTuple):
  """The attention of a layer: its scores and sizes."""
  scores: AttentionScores
  queries: int
  keys: int
  key_size: int
  value_size: int
  has_sinks: bool


def attention_kernel(subject: Subject) -> Finding:
  """Whether the attention of each kind of layer, and its gradient, are those of softmax(scores) v.

  The softmax is over the keys that the definition of the layer shows.
  """
  kinds = sorted(set(_attentions(subject.base_model)), key=str)
  if not kinds:
    raise DoesNotApply('no layer has attention of a known kind')
  dtype = getattr(subject.base_model, 'dtype', jnp.float32)
  limit = 2e-5 if dtype == jnp.float32 else 3e-2
  sizes = {(kind, of): size for kind in kinds for of, size in _kernel_differences(subject, kind, dtype).items()}
  worst, of = max(sizes, key=sizes.get)
  size, length = sizes[worst, of], _kernel_length(subject, worst)
  text = f'{of} of {length} positions differs from the plain formula by {size:.1e} (limit {limit:.0e})'
  if len(kinds) > 1:
    text = f'{text}, in the worst of {len(kinds)} kinds of layers'
  window = f' with a window of {worst.scores.window}' if worst.scores.window else ''
  return judge(size <= limit, f'{text}{window}',
               'the kernel computes something else; report it with the lines on devices and versions')


def _attentions(module: Any) -> Iterator[Heads]:
  """Yields the attention of the modules inside a model; that of a decoder to its source is left out."""
  if isinstance(module, tuple | list):
    for item in module:
      yield from _attentions(item)
  elif dataclasses.is_dataclass(module) and not isinstance(module, type):
    values = {field.name: getattr(module, field.name, None) for field in dataclasses.fields(module)}
    scores = values.get('scores')
    if isinstance(scores, AttentionScores) and {'nope_size', 'rope_size', 'value_size'} <= values.keys():
      size = values['nope_size'] + values['rope_size']
      yield Heads(scores, module.heads, module.heads, size, values['value_size'], False)
    elif isinstance(scores, AttentionScores) and {'kv_heads', 'head_size'} <= values.keys():
      yield Heads(scores, module.heads, module.kv_heads, module.head_size, module.head_size, bool(values.get('sinks')))
    else:
      yield from _attentions([value for name, value in values.items() if name not in ('parent', 'name')])


def _kernel_length(subject: Subject, kind: Heads) -> int:
  """Returns the positions of a row: enough for the windows and chunks of the layer, where training has as many."""
  span = max(kind.scores.window or 0, kind.scores.chunk or 0)
  return int(min(max(256, span + 64), LONGEST, subject.run.data.length))


def _kernel_differences(subject: Subject, kind: Heads, dtype: Any) -> dict[str, float]:
  """Returns the largest differences of a kernel and its gradients from the formula, relative to the largest values."""
  time, rows, rng = _kernel_length(subject, kind), sharding.padded_rows(1), np.random.default_rng(0)
  shapes = [(1, time, kind.queries, kind.key_size), (1, time, kind.keys, kind.key_size),
            (1, time, kind.keys, kind.value_size), (1, time, kind.queries, kind.value_size)]
  # Rounded to the dtype first, so that both compute from the same numbers.
  q, k, v, dy = (np.asarray(jnp.asarray(rng.normal(size=shape), dtype), np.float32) for shape in shapes)
  sinks = rng.normal(size=kind.queries).astype(np.float32) if kind.has_sinks else None
  borders = [time // 3, time - time // 10]   # two documents and padding
  segments = np.select([np.arange(time) < borders[0], np.arange(time) < borders[1]], [1, 2], 0)[None].astype(np.int32)
  dy = dy * (segments > 0)[:, :, None, None]   # nothing is trained on padding
  positions = (np.arange(time) - np.select([segments[0] == 1, segments[0] == 2], [0, borders[0]], borders[1]))[None]
  marks = None
  if kind.scores.causal and subject.small().bidirectional is not None:
    marks = (segments == 2) & (positions < time // 4)

  def attend(segments, positions, marks, q, k, v, sinks):
    q, k, v = (sharding.constrain(x.astype(dtype), axes) for x, axes in ((q, 'BTNH'), (k, 'BTKH'), (v, 'BTKH')))
    segments, positions, marks = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), (segments, positions, marks))
    sinks = None if sinks is None else sharding.constrain(sinks, 'N')
    visible = Visible(segments, segments, marks, positions, positions)
    return sharding.constrain(kernel_choice.attend(q, k, v, visible, kind.scores, sinks).astype(jnp.float32), '----')

  @jax.jit
  def with_gradient(visible, factors, dy):
    y, gradient = jax.vjp(functools.partial(attend, *visible), *factors)
    gradients = gradient(sharding.constrain(dy, '----'))
    return y, *jax.tree.map(lambda x: sharding.constrain(x, '-' * x.ndim), gradients)   # every process reads all rows

  repeat = lambda tree: jax.tree.map(lambda x: np.repeat(x, rows, axis=0), tree)
  ours = with_gradient(repeat((segments, positions.astype(np.int32), marks)), (*repeat((q, k, v)), sinks), repeat(dy))
  ours = [np.asarray(x)[0] if x.ndim > 1 else np.asarray(x) / rows for x in jax.tree.leaves(ours)]
  plain = plain_attention(q[0], k[0], v[0], segments[0], positions[0], None if marks is None else marks[0],
                          kind.scores, sinks, dy[0])
  names = ['attention', *(f'the gradient of {name} in attention' for name in ('queries', 'keys', 'values', 'sinks'))]
  shown = segments[0] > 0
  pairs = ((a[shown], b[shown]) if a.ndim > 1 else (a, b) for a, b in zip(ours, jax.tree.leaves(plain), strict=True))
  return {name: float(np.abs(a - b).max() / np.abs(b).max()) for name, (a, b) in zip(names, pairs)}


def plain_attention(q_TNH: np.ndarray, k_TKH: np.ndarray, v_TKH: np.ndarray, segments_T: np.ndarray,
                    positions_T: np.ndarray, bidirectional_T: np.ndarray | None, scores: AttentionScores,
                    sinks_N: np.ndarray | None, dy_TNH: np.ndarray) -> tuple[np.ndarray, ...]:
  """Returns attention by its formula, in float64, [T, N, H], and the gradients of sum(attention * dy).

  The gradients are those of queries, keys, values and sinks, the last one None without sinks.
  """
  time, heads, size = q_TNH.shape
  query, key = np.arange(time)[:, None], np.arange(time)[None]
  sees = key <= query if scores.causal else np.full((time, time), True)
  if bidirectional_T is not None:
    sees = sees | bidirectional_T[None]
  if scores.window is not None:
    sees = sees & (np.abs(query - key) < scores.window)
  if scores.chunk is not None:
    chunks = positions_T // scores.chunk
    sees = sees & (chunks[:, None] == chunks[None])
  sees = (sees & (segments_T[:, None] == segments_T[None]))[None]
  k, v = (np.repeat(x.astype(np.float64), heads // x.shape[1], axis=1) for x in (k_TKH, v_TKH))
  scale = size ** -0.5 if scores.scale is None else scores.scale
  s, slope = np.einsum('TNH,SNH->NTS', q_TNH.astype(np.float64), k) * scale, scale
  if scores.softcap is not None:
    s = scores.softcap * np.tanh(s / scores.softcap)
    slope = scale * (1 - np.square(s / scores.softcap))
  highest = np.where(sees, s, -np.inf).max(-1, keepdims=True)
  weights = np.where(sees, np.exp(s - highest), 0)
  sink = 0 if sinks_N is None else np.exp(sinks_N[:, None, None] - highest)
  total = weights.sum(-1, keepdims=True) + sink
  weights = weights / total
  y, dweights = np.einsum('NTS,SNH->TNH', weights, v), np.einsum('TNH,SNH->NTS', dy_TNH, v)
  mean = np.sum(weights * dweights, axis=-1, keepdims=True)
  ds = weights * (dweights - mean) * slope
  by_group = lambda x: x.reshape(time, k_TKH.shape[1], -1, x.shape[-1]).sum(2)   # keys are repeated for queries
  gradients = (np.einsum('NTS,SNH->TNH', ds, k), by_group(np.einsum('NTS,TNH->SNH', ds, q_TNH)),
               by_group(np.einsum('NTS,TNH->SNH', weights, dy_TNH)))
  return y, *gradients, None if sinks_N is None else -np.sum(sink / total * mean, axis=(1, 2))
