"""Log-probabilities of texts by decoders, encoder-decoders and encoders."""
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
from lm.train.validation import read_behind


@functools.partial(jax.jit, static_argnames='apply')
def _log_probabilities(apply, params, batch: Batch, columns_BP: jax.Array | None = None) -> jax.Array:
  """Returns the log-probability of each target, [B, T]; of the targets [B, P] of `columns_BP` if it is given."""
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  outputs = apply(params, batch)
  hidden = outputs.hidden
  if columns_BP is not None:
    hidden = jnp.take_along_axis(hidden, sharding.constrain(columns_BP, 'BT')[..., None], axis=1)
  scores = target_log_probabilities(hidden, outputs.head, batch.targets)
  return sharding.constrain(scores, '--')   # replicated, so that every process can read all of them


def _widths(lengths: np.ndarray, most: int) -> np.ndarray:
  """Returns the widths of rows for pieces of `lengths` [pieces, sides]; a side is the text, or its source.

  There are few different widths, so that there are few compilations. The side with more tokens has a width that is a
  power of two, and at most `most`. The other width is chosen such that rows are equally full on both sides.
  """
  total, longest = lengths.sum(0), lengths.max(0)
  main = int(total.argmax())
  width = min(1 << (max(int(longest[main]), min(256, int(total[main])), 16) - 1).bit_length(), most)
  widths = np.maximum(longest, -(-width * total // total[main]))
  widths = -(-widths // 32) * 32
  widths[main] = width
  return widths


def _rows(lengths: np.ndarray, widths: np.ndarray) -> list[list[int]]:
  """Packs pieces into rows of `widths`, by the side that fills its row the most. Returns the pieces of each row."""
  width = int(widths.max())
  return best_fit((-(-lengths * width // widths)).max(1).tolist(), width)


def _groups(rows: list[list[int]], width: int, positions: int) -> Iterator[list[list[int]]]:
  """Yields groups of rows of about `positions` positions. Empty rows make their number divisible over the mesh."""
  count = sharding.padded_rows(min(max(positions // width, 1), len(rows)))
  for begin in range(0, len(rows), count):
    group = rows[begin:begin + count]
    yield group + [[]] * (count - len(group))


class _Piece(NamedTuple):
  """A piece of a text: the model reads tokens `first` to `stop` - 1, and tokens `start` + 1 to `stop` are scored."""
  text: int
  first: int
  start: int
  stop: int


def log_probabilities(model: Any, params: Any, texts: Sequence[np.ndarray], positions: int = 2048,
                      sources: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
  """Returns log p(tokens[i + 1] | earlier tokens) in nats, `[n - 1]`, of each text, computed on the current mesh.

  Texts are packed into rows, and rows into batches of about `positions` positions. A text that is longer than the
  model's context is read in windows of that length, which overlap by half, so that each scored token has at least half
  a window before it. For an encoder-decoder, `sources` has the source of each text.

  Raises ValueError if the model is an encoder.
  """
  if not model.causal:
    raise ValueError('an encoder sees the token that it predicts; score with pseudo_log_probabilities')
  size, pieces = model.max_length, []
  result = [np.zeros(max(len(tokens) - 1, 0), np.float32) for tokens in texts]
  for text, scores in enumerate(result):
    if not len(scores):
      continue
    for start in [0, *range(size, len(scores), size // 2)]:
      first = 0 if start == 0 else start - size // 2
      pieces.append(_Piece(text, first, start, min(first + size, len(scores))))
  if not pieces:
    return result
  lengths = np.array([[piece.stop - piece.first, *([] if sources is None else [len(sources[piece.text])])]
                      for piece in pieces])
  widths = _widths(lengths, size)
  groups = [[[pieces[i] for i in row] for row in group]
            for group in _groups(_rows(lengths, widths), int(widths.max()), positions)]
  scored = read_behind(
      _log_probabilities(model.apply, params, _batch(texts, sources, group, *widths.tolist())) for group in groups)
  for scores_BT, group in zip(scored, groups):
    for row, packed in enumerate(group):
      column = 0
      for text, first, start, stop in packed:
        result[text][start:stop] = scores_BT[row, column + start - first:column + stop - first]
        column += stop - first
  return result


def _batch(texts: Sequence[np.ndarray], sources: Sequence[np.ndarray] | None, rows: list[list[_Piece]], width: int,
           source_width: int = 0) -> Batch:
  tokens, targets, positions, segments = np.zeros((4, len(rows), width), np.int32)
  batch = Batch(tokens, targets, positions=positions, segments=segments)
  if sources is not None:
    batch = batch._replace(**dict(zip(('source', 'source_segments'), np.zeros((2, len(rows), source_width), np.int32))))
  for row, packed in enumerate(rows):
    column = source_column = 0
    for segment, (text, first, _, stop) in enumerate(packed, 1):
      span = row, slice(column, column + stop - first)
      tokens[span], targets[span] = texts[text][first:stop], texts[text][first + 1:stop + 1]
      positions[span], segments[span] = np.arange(stop - first), segment
      column += stop - first
      if sources is not None:
        source = sources[text]
        span = row, slice(source_column, source_column + len(source))
        batch.source[span], batch.source_segments[span] = source, segment
        source_column += len(source)
  return batch


def pseudo_log_probabilities(model: Any, params: Any, texts: Sequence[np.ndarray], mask: int, positions: int = 2048
                             ) -> list[np.ndarray]:
  """Returns log p(tokens[i] | all other tokens) in nats, `[n - 2]`, of each text, by a masked language model.

  A copy of the text for each token has `mask` in its place (Salazar et al. 2020, arXiv:1910.14659). The first and the
  last token, [CLS] and [SEP], are not scored. Copies are packed and batched as in `log_probabilities`.

  Raises:
    ValueError: a text is longer than the model reads at once.
  """
  longest = max(map(len, texts), default=0)
  if longest > model.max_length:
    raise ValueError(f'a text of {longest} tokens, with the two around it, is more than the {model.max_length} that '
                     'the model reads at once; score its parts')
  result = [np.zeros(max(len(tokens) - 2, 0), np.float32) for tokens in texts]
  copies = [(text, place) for text, scores in enumerate(result) for place in range(1, len(scores) + 1)]
  if not copies:
    return result
  lengths = np.array([[len(texts[text])] for text, _ in copies])
  width = int(_widths(lengths, model.max_length)[0])
  rows = _rows(lengths, np.array([width]))
  groups = [[[copies[i] for i in row] for row in group] for group in _groups(rows, width, positions)]
  count = 1 << (max(map(len, rows)) - 1).bit_length()
  scored = read_behind(
      _log_probabilities(model.apply, params, *_masked(texts, group, width, count, mask)) for group in groups)
  for scores_BP, group in zip(scored, groups):
    for row, packed in enumerate(group):
      for i, (text, place) in enumerate(packed):
        result[text][place - 1] = scores_BP[row, i]
  return result


def _masked(texts: Sequence[np.ndarray], rows: list[list[tuple[int, int]]], width: int, count: int, mask: int
            ) -> tuple[Batch, np.ndarray]:
  """Returns a batch of the copies (text, place) in `rows`, and the columns of their masks, [rows, `count`]."""
  tokens, positions, segments = np.zeros((3, len(rows), width), np.int32)
  targets, columns = np.zeros((2, len(rows), count), np.int32)
  for row, packed in enumerate(rows):
    first = 0
    for i, (text, place) in enumerate(packed):
      ids = texts[text]
      span = row, slice(first, first + len(ids))
      tokens[span], positions[span], segments[span] = ids, np.arange(len(ids)), i + 1
      targets[row, i], columns[row, i] = ids[place], first + place
      tokens[row, first + place] = mask
      first += len(ids)
  return Batch(tokens, targets, positions=positions, segments=segments), columns
