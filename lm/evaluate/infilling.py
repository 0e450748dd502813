"""Measures how much a suffix helps a decoder to predict the tokens between a prefix and the suffix."""
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data import tokenizers
from lm.data.batch import Batch


class Case(NamedTuple):
  """A middle of a document, and the tokens on both sides of it."""
  prefix: np.ndarray
  middle: np.ndarray
  suffix: np.ndarray


def cases(documents: Any, tokens: tokenizers.Tokenizer, room: int, lines: bool, count: int) -> list[Case]:
  """Returns at most `count` random cases with `room // 2` tokens on each side; none if all documents are too short.

  A middle is one token or, with `lines`, the end of a line, of 2 to 16 tokens.
  """
  rng, result, side = np.random.default_rng(0), [], room // 2
  ends = np.array(['\n' in tokens.decode([i]) for i in range(tokens.vocab_size)])
  long_enough = [i for i in range(len(documents)) if len(documents[i]) > 2 * side + 32]
  while long_enough and len(result) < count:
    ids = np.asarray(documents[int(rng.choice(long_enough))], np.int32)
    start = int(rng.integers(side, len(ids) - side - 16))
    size = int(np.argmax(ends[ids[start:start + 17]])) if lines else 1
    if size >= (2 if lines else 1):
      result.append(Case(ids[start - side:start], ids[start:start + size], ids[start + size:start + size + side]))
  return result


@functools.partial(jax.jit, static_argnames='apply')
@sharding.whole_rows()
def _predictions(apply, params, batch):
  """Returns the log-probability of each target, and whether it is the likeliest token, both [B, T]."""
  outputs = apply(params, jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch))
  logits = sharding.whole_logits(outputs.head, outputs.hidden)
  targets = sharding.constrain(batch.targets, 'BT')
  log_probabilities = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], -1)
  return log_probabilities[..., 0], jnp.argmax(logits, -1) == targets


def judge(model: Any, params: Any, before: list[np.ndarray], middles: list[np.ndarray]
          ) -> tuple[list[np.ndarray], list[np.ndarray]]:
  """Returns for each middle -log p of its tokens in nats, after the tokens `before` it, and which are the likeliest."""
  nats, is_right = [], []
  for first in range(0, len(before), 32):
    rows = [np.concatenate(pair) for pair in zip(before[first:first + 32], middles[first:first + 32])]
    tokens, targets = np.zeros((2, 32, model.max_length), np.int32)
    for row, ids in enumerate(rows):
      tokens[row, :len(ids) - 1], targets[row, :len(ids) - 1] = ids[:-1], ids[1:]
    log_probabilities, is_likeliest = (np.asarray(x) for x in _predictions(model.apply, params, Batch(tokens, targets)))
    for row, (ids, middle) in enumerate(zip(rows, middles[first:])):
      span = row, slice(len(ids) - 1 - len(middle), len(ids) - 1)
      nats.append(-log_probabilities[span])
      is_right.append(is_likeliest[span])
  return nats, is_right
