"""The log-probabilities of texts, by any kind of model."""
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.data.rows.packed_records import best_fit
from lm.objectives.objective import target_log_probabilities
from lm.train.validation import one_behind


@functools.partial(jax.jit, static_argnames='apply')
def _log_probabilities(apply, params, batch: Batch, asked_BP: jax.Array | None = None) -> jax.Array:
  """Of each target; with `asked_BP`, targets are of these columns, [B, P]."""
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  outputs = apply(params, batch)
  hidden = outputs.hidden
  if asked_BP is not None:
    hidden = jnp.take_along_axis(hidden, sharding.constrain(asked_BP, 'BT')[..., None], axis=1)
  found = target_log_probabilities(hidden, outputs.head, batch.targets)
  return sharding.constrain(found, '--')   # so that every host can read it


def _widths(lengths: np.ndarray, most: int) -> np.ndarray:
  """Of rows for pieces of `lengths` [pieces, sides], each side: few different ones, so few compilations.

  The longer side's is a power of two, if that is not more than `most`; the other is as full as that one.
  """
  total, longest = lengths.sum(0), lengths.max(0)
  main = int(total.argmax())
  width = min(1 << (max(int(longest[main]), min(256, int(total[main])), 16) - 1).bit_length(), most)
  widths = np.maximum(longest, -(-width * total // total[main]))
  widths = -(-widths // 32) * 32
  widths[main] = width
  return widths


def _rows(lengths: np.ndarray, widths: np.ndarray) -> list[list[int]]:
  """Indices of pieces packed into rows of `widths`, by the side that fills its row the most."""
  width = int(widths.max())
  return best_fit((-(-lengths * width // widths)).max(1).tolist(), width)


def _groups(rows: list[list[int]], width: int, positions: int) -> Iterator[list[list[int]]]:
  """Groups of rows with about `positions` positions each; empty rows fill a group up to what the mesh can split."""
  count = sharding.padded_rows(min(max(positions // width, 1), len(rows)))
  for begin in range(0, len(rows), count):
    group = rows[begin:begin + count]
    yield group + [[]] * (count - len(group))


class _Piece(NamedTuple):
  """Tokens `first` to `stop` of a text are read, and those after them from `start` on scored."""
  text: int
  first: int
  start: int
  stop: int


def log_probabilities(model: Any, params: Any, texts: Sequence[np.ndarray], positions: int = 2048,
                      sources: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
  """Of each text, log p(tokens[i + 1] | tokens before it) in nats, `[n - 1]`; on the mesh that is set.

  Texts are packed into rows, and rows into batches of about so many `positions`. One that is longer than the model can
  place is read in windows as long as it can, half overlapping: a token has at least half a window before it. With an
  encoder-decoder, each text is given its source.
  """
  if not model.causal:
    raise ValueError('an encoder sees the token that it is asked for; score with pseudo_log_probabilities')
  size, pieces = model.max_length, []
  found = [np.zeros(max(len(tokens) - 1, 0), np.float32) for tokens in texts]
  for text, scores in enumerate(found):
    for start in [0, *range(size, len(scores), size // 2)] if len(scores) else ():
      first = 0 if start == 0 else start - size // 2
      pieces.append(_Piece(text, first, start, min(first + size, len(scores))))
  if not pieces:
    return found
  lengths = np.array([[piece.stop - piece.first, *([] if sources is None else [len(sources[piece.text])])]
                      for piece in pieces])
  widths = _widths(lengths, size)
  groups = [[[pieces[i] for i in row] for row in group]
            for group in _groups(_rows(lengths, widths), int(widths.max()), positions)]
  scored = one_behind(
      _log_probabilities(model.apply, params, _batch(texts, sources, group, *widths.tolist())) for group in groups)
  for scores_BT, group in zip(scored, groups):
    for row, packed in enumerate(group):
      at = 0
      for text, first, start, stop in packed:
        found[text][start:stop] = scores_BT[row, at + start - first:at + stop - first]
        at += stop - first
  return found


def _batch(texts: Sequence[np.ndarray], sources: Sequence[np.ndarray] | None, rows: list[list[_Piece]], width: int,
           source_width: int = 0) -> Batch:
  tokens, targets, positions, segments = np.zeros((4, len(rows), width), np.int32)
  batch = Batch(tokens, targets, positions=positions, segments=segments)
  if sources is not None:
    batch = batch._replace(**dict(zip(('source', 'source_segments'), np.zeros((2, len(rows), source_width), np.int32))))
  for row, packed in enumerate(rows):
    at = source_at = 0
    for segment, (text, first, _, stop) in enumerate(packed, 1):
      span = row, slice(at, at := at + stop - first)
      tokens[span], targets[span] = texts[text][first:stop], texts[text][first + 1:stop + 1]
      positions[span], segments[span] = np.arange(stop - first), segment
      if sources is not None:
        span = row, slice(source_at, source_at := source_at + len(sources[text]))
        batch.source[span], batch.source_segments[span] = sources[text], segment
  return batch


def pseudo_log_probabilities(model: Any, params: Any, texts: Sequence[np.ndarray], mask: int, positions: int = 2048
                             ) -> list[np.ndarray]:
  """Of each text, log p(tokens[i] | all others of it) in nats, `[n - 2]`, by an encoder that predicts masked tokens.

  Each token in turn has `mask` in its place (Salazar et al. 2020, arXiv:1910.14659), but the first and the last, which
  stand around the text as the model knows it, [CLS] and [SEP]. Copies of texts are packed and batched as above.

  Raises:
    ValueError: a text is longer than the model reads at once.
  """
  if (longest := max(map(len, texts), default=0)) > model.max_length:
    raise ValueError(f'a text of {longest} tokens, with the two around it, is more than the {model.max_length} that '
                     'the model reads at once; score its parts')
  found = [np.zeros(max(len(tokens) - 2, 0), np.float32) for tokens in texts]
  copies = [(text, place) for text, scores in enumerate(found) for place in range(1, len(scores) + 1)]
  if not copies:
    return found
  lengths = np.array([[len(texts[text])] for text, _ in copies])
  width = int(_widths(lengths, model.max_length)[0])
  rows = _rows(lengths, np.array([width]))
  groups = [[[copies[i] for i in row] for row in group] for group in _groups(rows, width, positions)]
  count = 1 << (max(map(len, rows)) - 1).bit_length()
  scored = one_behind(
      _log_probabilities(model.apply, params, *_masked(texts, group, width, count, mask)) for group in groups)
  for scores_BP, group in zip(scored, groups):
    for row, packed in enumerate(group):
      for i, (text, place) in enumerate(packed):
        found[text][place - 1] = scores_BP[row, i]
  return found


def _masked(texts: Sequence[np.ndarray], rows: list[list[tuple[int, int]]], width: int, count: int, mask: int
            ) -> tuple[Batch, np.ndarray]:
  """Copies (text, place), each with its mask, and the columns of these, of `count` a row."""
  tokens, positions, segments = np.zeros((3, len(rows), width), np.int32)
  targets, asked = np.zeros((2, len(rows), count), np.int32)
  for row, packed in enumerate(rows):
    at = 0
    for i, (text, place) in enumerate(packed):
      ids = texts[text]
      targets[row, i], asked[row, i] = ids[place], at + place
      span = row, slice(at, at := at + len(ids))
      tokens[span], positions[span], segments[span] = ids, np.arange(len(ids)), i + 1
      tokens[row, asked[row, i]] = mask
  return Batch(tokens, targets, positions=positions, segments=segments), asked
