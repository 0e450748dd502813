"""Probes of arithmetic: the loss of new parameters, the attention kernel, and what makes a step compile again."""
import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import seeds, sharding, train
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
  """Whether the attention of each kind of layer equals softmax(scores) v over the keys that its definition shows."""
  kinds = sorted(set(_attentions(subject.base_model)), key=str)
  if not kinds:
    raise DoesNotApply('no layer has attention of a known kind')
  dtype = getattr(subject.base_model, 'dtype', jnp.float32)
  limit = 2e-5 if dtype == jnp.float32 else 3e-2
  sizes = {kind: _kernel_difference(subject, kind, dtype) for kind in kinds}
  worst = max(sizes, key=sizes.get)
  length = _kernel_length(subject, worst)
  text = f'attention of {length} positions differs from the plain formula by {sizes[worst]:.1e} (limit {limit:.0e})'
  if len(kinds) > 1:
    text = f'{text}, in the worst of {len(kinds)} kinds of layers'
  window = f' with a window of {worst.scores.window}' if worst.scores.window else ''
  return judge(sizes[worst] <= limit, f'{text}{window}',
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


def _kernel_difference(subject: Subject, kind: Heads, dtype: Any) -> float:
  """Returns the largest difference of the kernel from the plain formula, relative to the largest value."""
  time, rows, rng = _kernel_length(subject, kind), sharding.padded_rows(1), np.random.default_rng(0)
  shapes = [(1, time, kind.queries, kind.key_size), (1, time, kind.keys, kind.key_size),
            (1, time, kind.keys, kind.value_size)]
  # Rounded to the dtype first, so that both compute from the same numbers.
  q, k, v = (np.asarray(jnp.asarray(rng.normal(size=shape), dtype), np.float32) for shape in shapes)
  sinks = rng.normal(size=kind.queries).astype(np.float32) if kind.has_sinks else None
  borders = [time // 3, time - time // 10]   # two documents and padding
  segments = np.select([np.arange(time) < borders[0], np.arange(time) < borders[1]], [1, 2], 0)[None].astype(np.int32)
  positions = (np.arange(time) - np.select([segments[0] == 1, segments[0] == 2], [0, borders[0]], borders[1]))[None]
  marks = None
  if kind.scores.causal and subject.small().bidirectional is not None:
    marks = (segments == 2) & (positions < time // 4)

  def attend(q, k, v, sinks, segments, positions, marks):
    q, k, v = (sharding.constrain(x.astype(dtype), axes) for x, axes in ((q, 'BTNH'), (k, 'BTKH'), (v, 'BTKH')))
    segments, positions, marks = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), (segments, positions, marks))
    sinks = None if sinks is None else sharding.constrain(sinks, 'N')
    visible = Visible(segments, segments, marks, positions, positions)
    return sharding.constrain(kernel_choice.attend(q, k, v, visible, kind.scores, sinks).astype(jnp.float32), '----')

  repeated = jax.tree.map(lambda x: np.repeat(x, rows, axis=0), (q, k, v, segments, positions.astype(np.int32), marks))
  y = np.asarray(jax.jit(attend)(*repeated[:3], sinks, *repeated[3:]))[0]
  expected = plain_attention(q[0], k[0], v[0], segments[0], positions[0], None if marks is None else marks[0],
                             kind.scores, sinks)
  in_documents = segments[0] > 0
  return float(np.abs(y - expected)[in_documents].max() / np.abs(expected[in_documents]).max())


def plain_attention(q_TNH: np.ndarray, k_TKH: np.ndarray, v_TKH: np.ndarray, segments_T: np.ndarray,
                    positions_T: np.ndarray, bidirectional_T: np.ndarray | None, scores: AttentionScores,
                    sinks_N: np.ndarray | None) -> np.ndarray:
  """Returns attention by its formula, in float64: [T, N, H]."""
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
  sees = sees & (segments_T[:, None] == segments_T[None])
  k, v = (np.repeat(x.astype(np.float64), heads // x.shape[1], axis=1) for x in (k_TKH, v_TKH))
  s = np.einsum('TNH,SNH->NTS', q_TNH.astype(np.float64), k) * (size ** -0.5 if scores.scale is None else scores.scale)
  if scores.softcap is not None:
    s = scores.softcap * np.tanh(s / scores.softcap)
  weights = np.where(sees[None], np.exp(s - np.where(sees[None], s, -np.inf).max(-1, keepdims=True)), 0)
  total = weights.sum(-1, keepdims=True)
  if sinks_N is not None:
    total = total + np.exp(sinks_N[:, None, None] - np.where(sees[None], s, -np.inf).max(-1, keepdims=True))
  return np.einsum('NTS,SNH->TNH', weights / total, v)


def step_compiles_once(subject: Subject) -> Finding:
  """Whether a step returns a state of the same types as the state that it is given, so that the next step is the same.

  Types are shapes, dtypes, weak types and shardings.
  """
  if subject.state is None:
    raise DoesNotApply('the workdir does not describe the optimizer')
  run = subject.run
  batch = train.abstract_batch(run, subject.mesh)
  new, _ = jax.eval_shape(train.step_function(run), subject.state, batch, subject.constants, seeds.key(run.seed))
  before = {_path(path): _type(x) for path, x in jax.tree_util.tree_leaves_with_path(subject.state)}
  after = {_path(path): _type(x) for path, x in jax.tree_util.tree_leaves_with_path(new)}
  changed = [path for path in {**before, **after} if before.get(path) != after.get(path)]
  shapes = len({*run.schedule.shapes()})
  text = f'a step changes the types of {len(changed)} of {len(before)} arrays of its state'
  if not changed:
    times = 'once' if shapes == 1 else f'once for each of {shapes} shapes of batches'
    return judge(True, f'{text}, so that it compiles {times}')
  path = changed[0]
  return judge(False, text, f'it compiles again; {path} is {before.get(path)} before and {after.get(path)} after',
               Verdict.WARNING)


def _path(path: Any) -> str:
  return jax.tree_util.keystr(path, simple=True, separator='/')


def _type(x: Any) -> str:
  aval = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
  layout = aval.sharding
  spec = tuple(layout.spec) if getattr(layout, 'spec', None) is not None else ()
  spec += (None,) * (len(aval.shape) - len(spec))
  return f'{aval.dtype}{list(aval.shape)}{" weak" if aval.weak_type else ""} {spec}'
