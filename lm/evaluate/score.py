"""Log-probabilities of texts by decoders, encoder-decoders and encoders.

A score is the same to the last bit whatever texts are scored with it, see `row_shapes`.
"""
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.evaluate import row_shapes
from lm.models.encoder import TextScorer
from lm.objectives.objective import by_position
from lm.train.validation import read_behind


class Predicted(NamedTuple):
  """How a model predicted the tokens of a text, each field `[n]`."""
  log_p: np.ndarray       # log-probability of the token, in nats
  top_log_p: np.ndarray   # log-probability of the most likely token, in nats
  correct: np.ndarray     # whether no token is more likely


def _empty(count: int) -> Predicted:
  return Predicted(np.zeros(count, np.float32), np.zeros(count, np.float32), np.zeros(count, bool))


@functools.partial(jax.jit, static_argnames='apply')
@sharding.whole_rows()
def predict(apply, params, batch: Batch, columns_B: jax.Array | None = None, cache: Any = None,
            cache_rows_B: jax.Array | None = None) -> Predicted:
  """Returns the predictions of the targets, [B, T]; with `columns_B`, of one column of each row, [B, 1].

  With a `cache`, row b of the batch continues row `cache_rows_B[b]` of the cache, which several rows may share.
  """
  batch = jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
  if cache is None:
    outputs = apply(params, batch)
  else:
    outputs = apply(params, batch, cache=sharding.take_rows(cache, cache_rows_B))
  hidden_BTD, targets_BT = outputs.hidden, batch.targets
  if columns_B is not None:
    columns_BT = sharding.constrain(columns_B[:, None], 'BT')
    hidden_BTD = jnp.take_along_axis(hidden_BTD, columns_BT[..., None], axis=1)
    targets_BT = jnp.take_along_axis(targets_BT, columns_BT, axis=1)

  def predictions(logits_BTV, targets_BT):
    is_target = jnp.arange(logits_BTV.shape[-1])[None, None, :] == targets_BT[..., None]
    target = jnp.sum(jnp.where(is_target, logits_BTV, 0), axis=-1)
    top, normaliser = jnp.max(logits_BTV, axis=-1), jax.nn.logsumexp(logits_BTV, axis=-1)
    return Predicted(target - normaliser, top - normaliser, target >= top)
  predicted = by_position(predictions, hidden_BTD, outputs.head, (targets_BT,))
  return jax.tree.map(lambda x: sharding.constrain(x, '--'), predicted)   # every process reads all rows


class _Piece(NamedTuple):
  """A piece of a text: the model reads tokens `first` to `stop` - 1, and tokens `start` + 1 to `stop` are scored."""
  text: int
  first: int
  start: int
  stop: int


def _pieces(text: int, count: int, window: int, stride: int) -> Iterator[_Piece]:
  """Yields the pieces by which `count` tokens of a text are scored, in windows of at most `window` tokens."""
  start = 0
  while start < count:
    stop = min(start + (stride if start else window), count)
    yield _Piece(text, max(0, stop - window), start, stop)
    start = stop


def check_window(window: int | None, stride: int | None, most: int) -> tuple[int, int]:
  """Returns the length of windows and their stride, by default `most`, the context of the model, and half of a window.

  Raises ValueError if the window is longer than the context, or the stride longer than the window.
  """
  if window is not None and not 1 <= window <= most:
    raise ValueError(f'a window of {window} tokens is not between 1 and {most}, which the model reads at once')
  window = most if window is None else window
  if stride is not None and not 1 <= stride <= window:
    raise ValueError(f'a stride of {stride} tokens is not between 1 and {window}, the length of a window')
  return window, stride or max(window // 2, 1)


def predictions(model: Any, params: Any, texts: Sequence[np.ndarray], sources: Sequence[np.ndarray] | None = None,
                window: int | None = None, stride: int | None = None) -> list[Predicted]:
  """Returns how the model predicts `tokens[1:]` of each text, given the tokens before them, on the current mesh.

  A text that is longer than a window is read in several: the first one scores all its tokens, and each of the others
  scores `stride` tokens and reads `window - stride` before them. The last window is as long as the others and reads
  more before them. By default, a window is as long as the context of the model, and the stride is half of that. For an
  encoder-decoder, `sources` has the source of each text.

  Raises ValueError if the model is an encoder, or as `check_window`.
  """
  if not model.causal:
    raise ValueError('an encoder sees the token that it predicts; score with pseudo_log_probabilities')
  window, stride = check_window(window, stride, model.max_length)
  counts = [max(len(tokens) - 1, 0) for tokens in texts]
  result = [_empty(count) for count in counts]
  pieces = [piece for text, count in enumerate(counts) for piece in _pieces(text, count, window, stride)]

  def shape(piece: _Piece) -> tuple[int, ...]:
    width = row_shapes.width(piece.stop - piece.first, model.max_length)
    return (width,) if sources is None else (width, row_shapes.width(len(sources[piece.text])))
  groups = list(row_shapes.groups([shape(piece) for piece in pieces]))
  batches = (_batch(texts, sources, [pieces[i] for i in group], *of_shape) for group, of_shape in groups)
  for predicted, (group, _) in zip(read_behind(predict(model.apply, params, batch) for batch in batches), groups):
    for row, i in enumerate(group):
      text, first, start, stop = pieces[i]
      for values, values_BT in zip(result[text], predicted):
        values[start:stop] = values_BT[row, start - first:stop - first]
  return result


def log_probabilities(model: Any, params: Any, texts: Sequence[np.ndarray],
                      sources: Sequence[np.ndarray] | None = None) -> list[np.ndarray]:
  """Returns log p(tokens[i + 1] | earlier tokens) in nats, `[n - 1]`, of each text; see `predictions`."""
  return [predicted.log_p for predicted in predictions(model, params, texts, sources)]


def _batch(texts: Sequence[np.ndarray], sources: Sequence[np.ndarray] | None, pieces: Sequence[_Piece], width: int,
           source_width: int = 0) -> Batch:
  """Returns a batch with a row for each piece, and empty rows after them."""
  rows = row_shapes.rows((width, source_width))
  tokens, targets, segments = np.zeros((3, rows, width), np.int32)
  positions = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width))
  batch = Batch(tokens, targets, positions=positions, segments=segments)
  for row, (text, first, _, stop) in enumerate(pieces):
    count = stop - first
    tokens[row, :count], targets[row, :count] = texts[text][first:stop], texts[text][first + 1:stop + 1]
    segments[row, :count] = 1
  if sources is None:
    return batch
  source, source_segments = np.zeros((2, rows, source_width), np.int32)
  for row, piece in enumerate(pieces):
    ids = sources[piece.text]
    source[row, :len(ids)], source_segments[row, :len(ids)] = ids, 1
  return batch._replace(source=source, source_segments=source_segments)


def pseudo_log_probabilities(model: Any, params: Any, texts: Sequence[np.ndarray], mask: int) -> list[np.ndarray]:
  """Returns log p(tokens[i] | all other tokens) in nats, `[n - 2]`, of each text; see `pseudo_predictions`."""
  return [predicted.log_p for predicted in pseudo_predictions(model, params, texts, mask)]


def pseudo_predictions(model: Any, params: Any, texts: Sequence[np.ndarray], mask: int) -> list[Predicted]:
  """Returns how a masked language model predicts `tokens[1:-1]` of each text, each token given all others.

  A copy of the text for each token has `mask` in its place (Salazar et al. 2020, arXiv:1910.14659). The first and the
  last token, [CLS] and [SEP], are not scored.

  Raises:
    ValueError: the model gives scores and no probabilities, or a text is longer than it reads at once.
  """
  if isinstance(model, TextScorer):
    raise ValueError('this model gives pairs of texts a score, and no token a probability; use it as '
                     '"score_texts.py --bleurt", or score with another model')
  longest = max(map(len, texts), default=0)
  if longest > model.max_length:
    raise ValueError(f'a text of {longest} tokens, with the two around it, is more than the {model.max_length} that '
                     'the model reads at once; score its parts')
  counts = [max(len(tokens) - 2, 0) for tokens in texts]
  result = [_empty(count) for count in counts]
  copies = [(text, place) for text, count in enumerate(counts) for place in range(1, count + 1)]
  groups = list(row_shapes.groups([(row_shapes.width(len(texts[text]), model.max_length),) for text, _ in copies]))
  calls = (predict(model.apply, params, *_masked(texts, [copies[i] for i in group], *shape, mask))
           for group, shape in groups)
  for predicted, (group, _) in zip(read_behind(calls), groups):
    for row, i in enumerate(group):
      text, place = copies[i]
      for values, values_BT in zip(result[text], predicted):
        values[place - 1] = values_BT[row, 0]
  return result


def _masked(texts: Sequence[np.ndarray], copies: Sequence[tuple[int, int]], width: int, mask: int
            ) -> tuple[Batch, np.ndarray]:
  """Returns a batch with a row for each copy (text, place), and the column of the mask in each row."""
  rows = row_shapes.rows((width,))
  tokens, targets, segments = np.zeros((3, rows, width), np.int32)
  columns = np.zeros(rows, np.int32)
  positions = np.broadcast_to(np.arange(width, dtype=np.int32), (rows, width))
  for row, (text, place) in enumerate(copies):
    ids = texts[text]
    tokens[row, :len(ids)], targets[row, :len(ids)], segments[row, :len(ids)] = ids, ids, 1
    tokens[row, place], columns[row] = mask, place
  return Batch(tokens, targets, positions=positions, segments=segments), columns
