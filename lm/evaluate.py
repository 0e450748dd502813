"""Evaluation: of a model over fixed batches, of a text, and what file compressors make of the same."""
import bisect
import collections
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batches import Batch, Batches
from lm.objectives.objective import Objective, target_log_probabilities


def make_step(apply: Callable[..., Any], objective: Objective, byte_lengths: np.ndarray) -> Callable:
  """A jitted `(params, batch) -> sums` over a batch, without dropout.

  Beside the objective's own sums: `loss`, `weight`, and `bytes`, UTF-8 bytes of the targets (`byte_lengths[V]` each).
  """
  def step(params, batch: Batch):
    loss, weight, sums = objective.loss(apply, params, batch, None)
    lengths = jnp.asarray(byte_lengths, jnp.int32).at[batch.targets].get(out_sharding=sharding.spec('BT'))
    return {'loss': loss, 'weight': weight, 'bytes': jnp.sum(jnp.where(batch.weights > 0, lengths, 0)), **sums}
  return jax.jit(step)


def evaluate(step: Callable, params: Any, batches: Batches, mesh: jax.sharding.Mesh,
             limit: int | None = None) -> dict[str, float]:
  """Metrics over all of `batches`, or the first `limit` of them: each target counts the same.

  Returns `loss` (the objective's), `nll` (nats a token), `perplexity` = exp(nll), `bits_per_byte` = nats / ln 2 over
  the UTF-8 bytes of the text (ends of documents cost bits and have no bytes), and `accuracy` of the likeliest token.
  """
  rows = sharding.local_rows(batches.rows, mesh)
  steps = batches.steps_per_epoch if limit is None else min(limit, batches.steps_per_epoch)
  total, pending = collections.Counter(), {}
  for i in range(steps):
    running = step(params, sharding.shard_rows(batches(i, rows), mesh))
    total.update({name: float(value) for name, value in pending.items()})   # of the batch before, while this one runs
    pending = running
  total.update({name: float(value) for name, value in pending.items()})
  if total['tokens'] == 0:
    raise ValueError('nothing to evaluate: the batches hold no targets')
  nll = total['nll'] / total['tokens']
  return {'loss': total['loss'] / total['weight'], 'nll': nll, 'perplexity': float(np.exp(nll)),
          'bits_per_byte': total['nll'] / np.log(2) / max(total['bytes'], 1),
          'accuracy': total['correct'] / total['tokens']}


@functools.partial(jax.jit, static_argnames='apply')
def _log_probabilities(apply, params, batch: Batch) -> jax.Array:
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  outputs = apply(params, batch)
  found = target_log_probabilities(outputs.hidden, outputs.head, batch.targets)
  return sharding.constrain(found, '--')   # so that every host can read it


@functools.partial(jax.jit, static_argnames='apply')
def _log_probabilities_at(apply, params, batch: Batch, places_B: jax.Array) -> jax.Array:
  """Of one place of each row, [B]: the head sees no other."""
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  outputs = apply(params, batch)
  here = jnp.arange(batch.tokens.shape[1])[None] == sharding.constrain(places_B, 'B')[:, None]
  hidden = jnp.sum(jnp.where(here[..., None], outputs.hidden, 0), axis=1, keepdims=True)
  targets = jnp.sum(jnp.where(here, batch.targets, 0), axis=1, keepdims=True)
  return sharding.constrain(target_log_probabilities(hidden, outputs.head, targets)[:, 0], '-')


class _Piece(NamedTuple):
  """Tokens `first` to `stop` of a text are read, and those after them from `start` on scored."""
  text: int
  first: int
  start: int
  stop: int


def _rows(pieces: list[_Piece], width: int) -> list[list[_Piece]]:
  """Pieces packed into rows of `width` positions: the longest first, each where it leaves the least room."""
  rows, room = [], []   # room: (positions left, row), in order
  for piece in sorted(pieces, key=lambda piece: piece.first - piece.stop):
    size = piece.stop - piece.first
    at = bisect.bisect_left(room, (size, 0))
    left, row = room.pop(at) if at < len(room) else (width, len(rows))
    if row == len(rows):
      rows.append([])
    rows[row].append(piece)
    bisect.insort(room, (left - size, row))
  return rows


def log_probabilities(model: Any, params: Any, texts: Sequence[np.ndarray], positions: int = 2048) -> list[np.ndarray]:
  """Of each text, log p(tokens[i + 1] | tokens before it) in nats, `[n - 1]`; on the mesh that is set.

  Texts are packed into rows, and rows into batches of about so many `positions`. One that is longer than the model can
  place is read in windows as long as it can, half overlapping: a token has at least half a window before it.
  """
  size, pieces = model.max_length, []
  found = [np.zeros(max(len(tokens) - 1, 0), np.float32) for tokens in texts]
  for text, scores in enumerate(found):
    for start in [0, *range(size, len(scores), size // 2)] if len(scores) else ():
      first = 0 if start == 0 else start - size // 2
      pieces.append(_Piece(text, first, start, min(first + size, len(scores))))
  if not pieces:
    return found
  width = min(_width(max(*(piece.stop - piece.first for piece in pieces), min(256, sum(map(len, found))))), size)
  rows, data = _rows(pieces, width), max(dict(jax.sharding.get_abstract_mesh().shape).get('data', 1), 1)
  count = -(-min(max(positions // width, 1), len(rows)) // data) * data

  def read(scored, group):
    scored = np.asarray(scored)
    for row, packed in enumerate(group):
      at = 0
      for piece in packed:
        found[piece.text][piece.start:piece.stop] = scored[row, at + piece.start - piece.first:][
            :piece.stop - piece.start]
        at += piece.stop - piece.first

  running = None
  for begin in range(0, len(rows), count):
    group = rows[begin:begin + count]
    scored = _log_probabilities(model.apply, params, _batch(texts, group, count, width))
    if running:
      read(*running)   # the batch before, while this one runs
    running = scored, group
  read(*running)
  return found


def _batch(texts: Sequence[np.ndarray], rows: list[list[_Piece]], count: int, width: int) -> Batch:
  tokens, targets, positions, segments = np.zeros((4, count, width), np.int32)
  for row, packed in enumerate(rows):
    at = 0
    for segment, (text, first, _, stop) in enumerate(packed, 1):
      span = row, slice(at, at := at + stop - first)
      tokens[span], targets[span] = texts[text][first:stop], texts[text][first + 1:stop + 1]
      positions[span], segments[span] = np.arange(stop - first), segment
  return Batch(tokens, targets, positions=positions, segments=segments)


def log_probabilities_given(model: Any, params: Any, sources: Sequence[np.ndarray], texts: Sequence[np.ndarray],
                            positions: int = 2048) -> list[np.ndarray]:
  """Of each text, log p(tokens[i + 1] | tokens before it, its source) in nats, `[n - 1]`, by an encoder-decoder.

  Batches hold about so many `positions` of texts and of sources, pairs of like length together.
  """
  order = sorted(range(len(texts)), key=lambda i: (len(texts[i]), len(sources[i])), reverse=True)
  data, found, at = max(dict(jax.sharding.get_abstract_mesh().shape).get('data', 1), 1), [np.zeros(0)] * len(texts), 0
  while at < len(order):
    width = _width(len(texts[order[at]]) - 1)
    wide = _width(max(len(sources[i]) for i in order[at:at + max(positions // width, 1)]))
    count = -(-max(positions // max(width, wide), 1) // data) * data
    group = order[at:at + count]
    tokens, targets, segments = np.zeros((3, count, width), np.int32)
    source, source_segments = np.zeros((2, count, wide), np.int32)
    for row, i in enumerate(group):
      size, span = len(texts[i]) - 1, (row, slice(len(sources[i])))
      tokens[row, :size], targets[row, :size], segments[row, :size] = texts[i][:-1], texts[i][1:], 1
      source[span], source_segments[span] = sources[i], 1
    batch = Batch(tokens, targets, segments=segments, source=source, source_segments=source_segments)
    for i, scores in zip(group, np.asarray(_log_probabilities(model.apply, params, batch))):
      found[i] = scores[:len(texts[i]) - 1]
    at += count
  return found


def pseudo_log_probabilities(model: Any, params: Any, texts: Sequence[np.ndarray], mask: int,
                             positions: int = 2048) -> list[np.ndarray]:
  """Of each text, log p(token i | all other tokens) in nats, `[n - 2]`, by a masked encoder; not of the ends.

  Each token in turn is read as the token `mask` (Salazar et al. 2020, Masked Language Model Scoring): the sum is a
  pseudo-log-likelihood, not to be compared with a decoder's. ValueError for a text longer than the model can place.
  """
  data, found = max(dict(jax.sharding.get_abstract_mesh().shape).get('data', 1), 1), []
  for text in texts:
    if len(text) > model.max_length:
      raise ValueError(f'a text of {len(text)} tokens is longer than the {model.max_length} that the model can place; '
                       'cut it')
    width, scores = min(_width(len(text)), model.max_length), []
    count = -(-max(positions // width, 1) // data) * data
    for first in range(1, len(text) - 1, count):
      places = np.minimum(np.arange(first, first + count), len(text) - 1)
      tokens, segments = np.zeros((2, count, width), np.int32)
      tokens[:, :len(text)], segments[:, :len(text)] = text, 1
      targets = tokens.copy()
      tokens[np.arange(count), places] = mask
      read = _log_probabilities_at(model.apply, params, Batch(tokens, targets, segments=segments), places)
      scores.append(np.asarray(read)[:len(text) - 1 - first])
    found.append(np.concatenate(scores) if scores else np.zeros(0, np.float32))
  return found


def _width(longest: int) -> int:
  """Few widths, so few compilations."""
  return 1 << (max(longest, 16) - 1).bit_length()


def compress(text: bytes, training_text: bytes) -> dict[str, tuple[float, float]]:
  """Of gzip -9, bzip2 -9 and xz -9: bits per byte of `text` alone, and primed with training text.

  Primed: gzip with the last 32 KiB as its dictionary (its window), bzip2 with as much as fits in a block of 900 kB
  before the text, xz with all of it; counted is what the text adds to the size of the training text compressed.
  """
  import bz2
  import lzma
  import zlib

  def deflate(data, prime=b''):
    # 31 is gzip's format, which has no dictionaries; -15 is the same stream without its 18 bytes of frame.
    packer = zlib.compressobj(9, wbits=-15, zdict=prime) if prime else zlib.compressobj(9, wbits=31)
    return len(packer.compress(data) + packer.flush())

  def xz(data):
    return len(lzma.compress(data, filters=[{'id': lzma.FILTER_LZMA2, 'preset': 9, 'dict_size': 1 << 28}]))

  room = max(900_000 - len(text), 0)
  block = training_text[-room:] if room else b''
  sizes = {
      'gzip -9': (deflate(text), deflate(text, training_text[-(1 << 15):])),
      'bzip2 -9': (len(bz2.compress(text)), len(bz2.compress(block + text)) - len(bz2.compress(block))),
      'xz -9': (xz(text), xz(training_text + text) - xz(training_text))}
  return {name: (8 * alone / len(text), 8 * primed / len(text)) for name, (alone, primed) in sizes.items()}
