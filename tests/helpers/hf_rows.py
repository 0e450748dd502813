"""Batches, logits and comparisons that the tests of Hugging Face models share. This file does not need torch."""
import functools

import jax
import numpy as np

from lm.data.batch import Batch

VOCAB = 96
# These programs run once: optimising them would take longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})
forward = jit(lambda model, params, batch: (lambda out: out.head(out.hidden))(model.apply(params, batch)),
              static_argnums=0)


def rows(*documents, pads=(0, 0)):
  """Returns a batch [2, 64] of two packed rows: row i holds `documents[i]` after `pads[i]` places of padding.

  The shape is always the same, so that each model compiles one program.
  """
  tokens, segments, positions = np.zeros((3, 2, 64), np.int32)
  for row, (contents, start) in enumerate(zip(documents, pads)):
    for segment, document in enumerate(contents, 1):
      place = row, slice(start, start + len(document))
      tokens[place], segments[place], positions[place] = document, segment, np.arange(len(document))
      start += len(document)
  return Batch(tokens, segments=segments, positions=positions)


def mean_loss(logits, tokens):
  """Returns the mean loss of the next token in nats, for logits [B, T, V] of tokens [B, T]."""
  logits = np.asarray(logits, np.float64)[:, :-1]
  chosen = np.take_along_axis(logits, tokens[:, 1:, None], -1)[..., 0]
  return float((np.log(np.exp(logits).sum(-1)) - chosen).mean())


def assert_small(record, row, column, difference, bound=1e-4):
  """Asserts that no absolute difference exceeds `bound`, and records the largest for the table of `pytest --rows`."""
  worst = float(np.abs(difference).max())
  record(f'{row}/{column}', worst)
  assert worst <= bound


def random_tokens(*shape, seed=0):
  """Returns random token ids (int32) of this shape."""
  return np.random.default_rng(seed).integers(0, VOCAB, shape, np.int32)
