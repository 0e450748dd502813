"""Evaluation: of a model over fixed batches, of a text, and what file compressors make of the same."""
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batches import Batch, Batches
from lm.data.packing import best_fit
from lm.data.tokenizer import Tokenizer
from lm.objectives.objective import Objective, target_log_probabilities


def make_step(apply: Callable[..., Any], objective: Objective, tokenizer: Tokenizer) -> Callable:
  """A jitted `(params, batch) -> sums` over a batch, without dropout.

  Beside the objective's own sums: `loss`, `weight`, `spelled`, bytes of the targets by the tokenizer's table, and,
  where they are known, `bytes`, UTF-8 bytes of the text that the targets stand for: by the batches, see
  `Batches.with_bytes`, or by the table of a lossless tokenizer.
  """
  byte_lengths, lossless = tokenizer.byte_lengths(), tokenizer.lossless

  def step(params, batch: Batch):
    loss, weight, sums = objective.loss(apply, params, batch, None)
    total = lambda sizes: jnp.sum(jnp.where(batch.weights > 0, sizes, 0))
    spelled = total(jnp.asarray(byte_lengths, jnp.int32).at[batch.targets].get(out_sharding=sharding.spec('BT')))
    if 'bytes' in (batch.columns or {}):
      sums = {'bytes': total(batch.columns['bytes']), **sums}
    elif lossless:
      sums = {'bytes': spelled, **sums}
    return {'loss': loss, 'weight': weight, 'spelled': spelled, **sums}
  return jax.jit(step)


def evaluate(step: Callable, params: Any, batches: Batches, mesh: jax.sharding.Mesh,
             limit: int | None = None, stop: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
  """Metrics over all of `batches`, or the first `limit` of them: each target counts the same.

  None where `stop`, which is called before each batch, returns True.

  Returns `loss` (the objective's), `nll` (nats a token), `perplexity` = exp(nll), `bits_per_byte` = nats / ln 2 over
  the UTF-8 bytes of the text (ends of documents cost bits and have no bytes), `accuracy` of the likeliest token, and
  the objective's own metrics. Where targets stand for no text, as those of a reward model, there is no `nll`,
  `perplexity` and `bits_per_byte`; nor is there `bits_per_byte` where it is not known which bytes they stand for: the
  tokenizer is not lossless, and targets are other than the text in its order, or the data is of before this was stored.
  """
  batches = batches.with_bytes()
  rows = sharding.local_rows(batches.rows, mesh)
  steps = batches.steps_per_epoch if limit is None else min(limit, batches.steps_per_epoch)
  total, count = None, 0
  # Sums of the batch before are read while the next one runs.
  for sums in _one_behind(step(params, sharding.shard_rows(batches(i, rows), mesh))
                          for i in itertools.takewhile(lambda _: not stop(), range(steps))):
    count += 1
    total = jax.tree.map(lambda x: np.float64(x), sums) if total is None else jax.tree.map(np.add, total, sums)
  if count < steps:
    return None
  if total['tokens'] == 0:
    raise ValueError('nothing to evaluate: the batches hold no targets')
  nll = total['nll'] / total['tokens']
  own = {name: pair[0] / max(pair[1], 1) for name, pair in total.items() if isinstance(pair, tuple)}
  text = {}
  if total['spelled']:
    with np.errstate(over='ignore'):   # of a model that has diverged
      text = {'nll': nll, 'perplexity': np.exp(nll)}
    if total.get('bytes'):
      text['bits_per_byte'] = total['nll'] / np.log(2) / total['bytes']
  return {name: float(value) for name, value in {
      'loss': total['loss'] / total['weight'], **text, 'accuracy': total['correct'] / total['tokens'], **own}.items()}


def reading(batches: Batches, limit: int | None = None) -> str:
  """What `evaluate` reads, in words; losses of other rows or of another context differ."""
  total, context = batches.steps_per_epoch, getattr(batches, 'context', None)
  count = f'all {total:,}' if limit is None or limit >= total else f'the first {limit:,} of {total:,}'
  rows = f'{count} batches of {batches.rows} rows of {batches.length} positions'
  if context:
    return f'{rows}, of which {context} repeat the row before'
  return rows if context is None else f'{rows}, each without the text before it'


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


def _one_behind(calls: Iterable[Any]) -> Iterator[Any]:
  """What calls give, trees of arrays, each read while the next one runs."""
  running = None
  for started in calls:
    if running is not None:
      yield jax.tree.map(np.asarray, running)
    running = started
  if running is not None:
    yield jax.tree.map(np.asarray, running)


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
  """As many rows at a time as have about so many positions and the mesh divides, filled up with empty ones."""
  data = max(dict(jax.sharding.get_abstract_mesh().shape).get('data', 1), 1)
  count = -(-min(max(positions // width, 1), len(rows)) // data) * data
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
  scored = _one_behind(
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
    ValueError: a text is longer than the model can place.
  """
  if (longest := max(map(len, texts), default=0)) > model.max_length:
    raise ValueError(f'a text of {longest} tokens, with the two around it, is more than the {model.max_length} that '
                     'the model can place; score its parts')
  found = [np.zeros(max(len(tokens) - 2, 0), np.float32) for tokens in texts]
  copies = [(text, place) for text, scores in enumerate(found) for place in range(1, len(scores) + 1)]
  if not copies:
    return found
  lengths = np.array([[len(texts[text])] for text, _ in copies])
  width = int(_widths(lengths, model.max_length)[0])
  rows = _rows(lengths, np.array([width]))
  groups = [[[copies[i] for i in row] for row in group] for group in _groups(rows, width, positions)]
  count = 1 << (max(map(len, rows)) - 1).bit_length()
  scored = _one_behind(
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
