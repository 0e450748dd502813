"""Documents, dialogues and pairs; `Example`, what an objective makes of one; `Batch`, examples packed into rows."""
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from lm.data.tokenizers.base import Tokenizer

Array = Any   # NumPy on the host, JAX on the devices


class Dialogue(NamedTuple):
  """Tokens, and a mask of those that the model learns to write: the assistant's messages, or the answer to a prompt."""
  tokens: np.ndarray      # int32 [n]
  loss_mask: np.ndarray   # bool [n]


class Pair(NamedTuple):
  """Two dialogues with the same beginning, of which the first was preferred."""
  chosen: Dialogue
  rejected: Dialogue


class Rated(NamedTuple):
  """A dialogue with a rating, and its prompt with an answer to another prompt (see KTO)."""
  dialogue: Dialogue
  good: bool
  mismatched: Dialogue


class RatedPair(NamedTuple):
  """The tokens of a candidate and of its references, one or more, with the rating that the candidate got."""
  references: tuple[np.ndarray, ...]   # int32 [n] each
  candidate: np.ndarray                # int32 [m]
  rating: float


# The kinds of records that data may hold, and their names.
KINDS = {np.ndarray: 'documents', Dialogue: 'dialogues', Pair: 'pairs of a preferred and another dialogue',
         Rated: 'dialogues that are rated good or bad', RatedPair: 'candidates with references and ratings'}


class Example(NamedTuple):
  """What an objective makes of one document, or of a piece of it: NumPy arrays of the same length."""
  tokens: Array                       # int32, what the model reads
  targets: Array                      # int32, what it predicts at each position
  weights: Array                      # float32, the weight of each position in the loss
  bidirectional: Array | None = None  # bool, positions that all others of the document see
  segments: Array | None = None       # 1, 2, ...: parts that do not see each other; None: one part
  source: Array | None = None         # int32, of its own length: what an encoder reads
  columns: Mapping[str, Array] | None = None   # further values of each position, which the loss reads
  inputs: Mapping[str, Array] | None = None    # further inputs of the model, such as an image, with axes of their own


class Batch(NamedTuple):
  """Rows of packed examples, `[B, T]`. A model reads all fields but `targets`, `weights` and `columns`.

  The encoder of an encoder-decoder reads `source`, `[B, S]`; its decoder reads `tokens` and predicts `targets`, as any
  decoder does. Segment i of the tokens sees segment i of the source.
  """
  tokens: Array
  targets: Array | None = None
  weights: Array | None = None
  positions: Array | None = None      # positions within the piece of a document; None: 0, 1, 2, ...
  segments: Array | None = None       # 0: padding; 1, 2, ...: by document; None: one document a row, no padding
  bidirectional: Array | None = None
  types: Array | None = None          # the sentence of a pair that a token belongs to (BERT); None: 0
  source: Array | None = None
  source_segments: Array | None = None   # as `segments`
  columns: dict[str, Array] | None = None   # [B, T, ...], further values that the loss reads
  inputs: dict[str, Array] | None = None    # [B, ...], further inputs of the model, of whole rows


class Special(NamedTuple):
  """The special tokens of a tokenizer, for an objective. `control` are the ids of the control tokens that it names."""
  bos: int
  eos: int
  vocab: int
  control: tuple[int, ...]
  tokenizer: Tokenizer | None = None   # None: not known yet, as in checks

  def bare(self, piece: np.ndarray) -> np.ndarray:
    """Returns a piece of a document without its bos and eos."""
    if len(piece) and piece[0] == self.bos:
      piece = piece[1:]
    if len(piece) and piece[-1] == self.eos:
      piece = piece[:-1]
    return piece


def special(tokenizer: Tokenizer, control: tuple[str, ...]) -> Special:
  """Returns the special tokens that an objective needs. Raises ValueError if the tokenizer lacks one of them."""
  if missing := [name for name in control if name not in tokenizer.control_names]:
    raise ValueError(f'the objective needs control tokens that the tokenizer lacks: {", ".join(missing[:4])}'
                     f'{", ..." if missing[4:] else ""}; it has {", ".join(tokenizer.control_names)}. Train one with '
                     'these control tokens (control=...), or give the objective the names of tokens that it has')
  return Special(tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size, tuple(map(tokenizer.control_id, control)),
                 tokenizer)


class Room(NamedTuple):
  """The most positions that an example of n tokens takes, ratio * n + extra, and likewise its source."""
  ratio: float = 1.
  extra: int = 0
  source_ratio: float | None = None   # None: there is no source
  source_extra: int = 0

  def tokens(self, length: int, source_length: int | None) -> int:
    """Returns the tokens that fit in a row of `length`, of one example, or of several if each counts `gap` more tokens.
    """
    fits = (length - self.extra) / self.ratio
    if self.source_ratio is not None:
      fits = min(fits, (source_length - self.source_extra) / self.source_ratio)
    return math.floor(fits + 1e-9)

  @property
  def gap(self) -> int:
    """The number of tokens that take as many positions as `extra`."""
    source = 0. if self.source_ratio is None else self.source_extra / self.source_ratio
    return math.ceil(max(self.extra / self.ratio, source) - 1e-9)


class Form(NamedTuple):
  """One way to make an example: `example(piece, rng, special) -> Example`.

  A piece is a dialogue, a pair, or the tokens of a document or of a part of it, int32, with bos and eos. A piece may
  be as short as one token, and an example may be empty.

  Attributes:
    room: the most positions that an example takes.
    ahead: whether a part of a document has the token that follows it too, as next-token prediction needs it. This token
      does not count in n of `Room`.
    in_place: whether the targets are the tokens of the piece in order, without the first if `ahead`. The number of
      bytes of each target is then known of any tokenizer.
  """
  example: Callable[[Any, np.random.Generator, Special], Example]
  room: Room = Room()
  ahead: bool = False
  in_place: bool = False


def sample(kind: type, tokens: int, token: int) -> Any:
  """Returns a piece of a kind, to try a form on."""
  document = np.full(tokens, token, np.int32)
  dialogue = Dialogue(document, np.arange(tokens) >= tokens // 2)
  return {np.ndarray: document, Dialogue: dialogue, Pair: Pair(dialogue, dialogue),
          Rated: Rated(dialogue, True, dialogue),
          RatedPair: RatedPair((document[:tokens // 2],), document[tokens // 2:], 0.)}[kind]


class ExampleMaker(Protocol):
  """The members of an objective that data uses; see `lm.objectives.objective`."""
  forms: tuple[Form, ...]
  needs: type
  control: tuple[str, ...]


def template(objective: ExampleMaker, special: Special, length: int, source_length: int | None = None) -> Batch:
  """Returns an empty row, with the fields that the examples of an objective have.

  Raises ValueError if an example is too long for its room or has no target, or if only one of the objective and the
  data has sources.
  """
  has_source = {form.room.source_ratio is not None for form in objective.forms}
  if has_source != {source_length is not None}:
    if True in has_source:
      raise ValueError('the objective makes sources for an encoder: give the data a source_length')
    raise ValueError(f'source_length={source_length}: this objective makes no sources; leave it out')
  examples = []
  token = min({0, 1, 2} - {special.bos, special.eos})
  for form in objective.forms:
    for n in (2, max(2, form.room.tokens(length, source_length))):
      piece = sample(objective.needs, n + form.ahead, token)
      examples.append(form.example(piece, np.random.default_rng(0), special))
      if objective.needs is np.ndarray and len(examples[-1].tokens) > form.room.ratio * n + form.room.extra + 1e-6:
        raise ValueError(f'an example of {n} tokens has {len(examples[-1].tokens)} positions, more than the '
                         f'{form.room} of its objective says')
    if objective.needs is np.ndarray and not examples[-1].weights.any():
      raise ValueError(f'an example of {n} tokens, as many as a row takes, has no target; raise the length')
  return _empty_row(examples, length, source_length)


def _empty_row(examples: Sequence[Example], length: int, source_length: int | None) -> Batch:
  """Returns an empty row, with the fields that any of the examples has."""
  zeros = lambda dtype, shape=(): np.zeros((1, length, *shape), dtype)
  batch = Batch(zeros(np.int32), zeros(np.int32), zeros(np.float32), zeros(np.int32), zeros(np.int32))
  if any(example.bidirectional is not None for example in examples):
    batch = batch._replace(bidirectional=zeros(bool))
  if source_length is not None:
    batch = batch._replace(source=np.zeros((1, source_length), np.int32),
                           source_segments=np.zeros((1, source_length), np.int32))
  columns, inputs = {}, {}
  for example in examples:
    columns |= {name: zeros(x.dtype, x.shape[1:]) for name, x in (example.columns or {}).items()}
    inputs |= {name: np.zeros((1, *x.shape), x.dtype) for name, x in (example.inputs or {}).items()}
  return batch._replace(columns=columns or None, inputs=inputs or None)


def blank(row: Batch, rows: int) -> Batch:
  """Returns a batch of `rows` empty rows with the fields of `row`."""
  return jax.tree.map(lambda x: np.zeros((rows, *x.shape[1:]), x.dtype), row)


class Row:
  """A row of a batch, which is filled from the left. `index` is its number in the batch."""

  def __init__(self, batch: Batch, index: int):
    self.batch, self.index = batch, index
    self._end, self._source_end, self._segments = 0, 0, 0   # of the examples that the row has

  def add(self, example: Example) -> None:
    """Adds an example, unless it has no tokens. Inputs belong to a whole row, so a row with inputs has one example.

    Raises ValueError if the example does not fit, or if its inputs are not those that the row has a place for.
    """
    size = len(example.tokens)
    if not size:
      return
    self._add_inputs(example.inputs or {})
    batch, end = self.batch, self._end + size
    source_end = self._source_end + (0 if example.source is None else len(example.source))
    if end > batch.tokens.shape[1] or batch.source is not None and source_end > batch.source.shape[1]:
      raise ValueError(f'an example of {size} positions does not fit its row, because it is longer than its Room; give '
                       'the form a larger Room')
    span = self.index, slice(self._end, end)
    batch.tokens[span], batch.targets[span], batch.weights[span] = example[:3]
    if example.segments is None:
      batch.positions[span], batch.segments[span] = np.arange(size), self._segments + 1
      count = 1
    else:
      starts = np.flatnonzero(np.diff(example.segments, prepend=0))
      batch.positions[span] = np.arange(size) - np.repeat(starts, np.diff(starts, append=size))
      batch.segments[span] = self._segments + example.segments
      count = len(starts)
    if example.bidirectional is not None:
      batch.bidirectional[span] = example.bidirectional
    for name, values in (example.columns or {}).items():
      batch.columns[name][span] = values
    if example.source is not None:
      source_span = self.index, slice(self._source_end, source_end)
      batch.source[source_span], batch.source_segments[source_span] = example.source, self._segments + 1
    self._end, self._source_end, self._segments = end, source_end, self._segments + count

  def _add_inputs(self, inputs: Mapping[str, Array]) -> None:
    places = self.batch.inputs or {}
    if places and self._end:
      raise ValueError(f'a row would hold several examples, and inputs ({", ".join(places)}) are of the whole row; '
                       'give each example a row of its own')
    for name, values in inputs.items():
      place = places.get(name)
      if place is None or place.shape[1:] != np.shape(values):
        has = 'none of that name' if place is None else f'one of shape {list(place.shape[1:])}'
        raise ValueError(f'an example has the input {name} of shape {list(np.shape(values))}, and its row {has}; '
                         'declare it in `inputs` of the data')
      place[self.index] = values
