"""Evaluation: of a model over fixed batches, of a text, and what file compressors make of the same."""
import collections
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batches import Batch, Batches
from lm.objectives.objective import Objective


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
  outputs = apply(params, batch)

  def picked(logits, targets):
    chosen = jnp.arange(logits.shape[-1])[None, None] == targets[..., None]
    return jnp.sum(jnp.where(chosen, jax.nn.log_softmax(logits), 0), axis=-1)
  return picked(outputs.head(outputs.hidden), batch.targets)


def log_probabilities(model: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
  """log p(tokens[i + 1] | tokens before it), in nats, `[n - 1]`, by the model's longest windows, half overlapping."""
  size = model.max_length
  rows = max(dict(jax.sharding.get_abstract_mesh().shape).get('data', 1), 1)
  found = np.zeros(len(tokens) - 1, np.float32)
  for start in [0, *range(size, len(found), size // 2)]:
    first = 0 if start == 0 else start - size // 2   # what is read, before what is asked
    piece = tokens[first:first + size + 1]
    width = min(max(16, 1 << (len(piece) - 2).bit_length()), size)   # few widths, so few compilations
    row = np.zeros((2, rows, width), np.int32)
    row[0, :, :len(piece) - 1], row[1, :, :len(piece) - 1] = piece[:-1], piece[1:]
    scores = np.asarray(_log_probabilities(model.apply, params, Batch(row[0], row[1])))[0, :len(piece) - 1]
    found[start:first + len(scores)] = scores[start - first:]
  return found


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
