"""What objectives make of documents, dialogues and pairs, `Example`, and how examples lie in rows, `Batch`."""
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np

from lm.data.tokenizers.base import Tokenizer

Array = Any   # NumPy on the host, JAX on the devices


class Dialogue(NamedTuple):
  """Tokens, and which of them the model learns to write: the messages of the assistant, or the answer to a prompt."""
  tokens: np.ndarray      # int32 [n]
  loss_mask: np.ndarray   # bool [n]


class Pair(NamedTuple):
  """Two dialogues that begin alike, of which the first was preferred."""
  chosen: Dialogue
  rejected: Dialogue


class Rated(NamedTuple):
  """A dialogue that was found good or not; and its prompt with an answer to another (see KTO)."""
  dialogue: Dialogue
  good: bool
  mismatched: Dialogue


# What data may hold, and how it is called.
KINDS = {np.ndarray: 'documents', Dialogue: 'dialogues', Pair: 'pairs of a preferred and another dialogue',
         Rated: 'dialogues that are rated good or bad'}


class Example(NamedTuple):
  """What an objective makes of one document, or of a piece of it: NumPy arrays of the same length."""
  tokens: Array                       # int32, what the model reads
  targets: Array                      # int32, what it is asked at each position
  weights: Array                      # float32, how much each position counts
  bidirectional: Array | None = None  # bool, positions that all others of the document see
  segments: Array | None = None       # 1, 2, ... where these are several that do not see each other; None: one
  source: Array | None = None         # int32, of its own length: what an encoder reads
  columns: Mapping[str, Array] | None = None   # what else the loss reads of each position
  inputs: Mapping[str, Array] | None = None    # what else a model reads, such as an image; axes of their own


class Batch(NamedTuple):
  """Rows of packed examples, `[B, T]`. A model reads all but `targets`, `weights` and `columns`.

  An encoder-decoder reads `source` too, `[B, S]`, with its encoder; the decoder reads `tokens` and is asked for
  `targets`, so that the losses of decoders hold for it. Segment i of the tokens sees segment i of the source.
  """
  tokens: Array
  targets: Array | None = None
  weights: Array | None = None
  positions: Array | None = None      # place within the piece of a document; None: 0, 1, 2, ...
  segments: Array | None = None       # 0 padding, then 1, 2, ... by document; None: one document a row, no padding
  bidirectional: Array | None = None
  types: Array | None = None          # which sentence of a pair a token is of (BERT); None: 0
  source: Array | None = None
  source_segments: Array | None = None   # as `segments`
  columns: dict[str, Array] | None = None   # [B, T, ...], what else the loss reads
  inputs: dict[str, Array] | None = None    # [B, ...], what else a model reads of each row, with axes of their own


class Special(NamedTuple):
  """What an objective is told of the tokenizer. `control` are the ids of the control tokens that it names."""
  bos: int
  eos: int
  vocab: int
  control: tuple[int, ...]
  tokenizer: Tokenizer | None = None   # to cut text inside a token; None where it is not known yet, as in checks

  def bare(self, piece: np.ndarray) -> np.ndarray:
    """A piece of a document without its bos and eos."""
    first = int(len(piece) > 0 and piece[0] == self.bos)
    return piece[first:len(piece) - int(len(piece) > first and piece[-1] == self.eos)]


def special(tokenizer: Tokenizer, control: tuple[str, ...]) -> Special:
  """ValueError where the tokenizer lacks one of the control tokens that an objective needs."""
  if missing := [name for name in control if name not in tokenizer.control_names]:
    raise ValueError(f'the objective needs control tokens that the tokenizer lacks: {", ".join(missing[:4])}'
                     f'{", ..." if missing[4:] else ""}; it has {", ".join(tokenizer.control_names)}. Train one with '
                     'them (control=...), or name the tokens that this one has for the purpose')
  return Special(tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size, tuple(map(tokenizer.control_id, control)),
                 tokenizer)


class Room(NamedTuple):
  """How long an example of n tokens gets at most: ratio * n + extra positions; and likewise its source."""
  ratio: float = 1.
  extra: int = 0
  source_ratio: float | None = None   # None: there is no source
  source_extra: int = 0

  def tokens(self, length: int, source_length: int | None) -> int:
    """Of one example, or of several that cost `gap` more each, in a row of `length`."""
    fits = (length - self.extra) / self.ratio
    if self.source_ratio is not None:
      fits = min(fits, (source_length - self.source_extra) / self.source_ratio)
    return math.floor(fits + 1e-9)

  @property
  def gap(self) -> int:
    """Tokens that would take the room of `extra`."""
    source = 0. if self.source_ratio is None else self.source_extra / self.source_ratio
    return math.ceil(max(self.extra / self.ratio, source) - 1e-9)


class Form(NamedTuple):
  """One way to make an example: `example(piece, rng, special) -> Example`.

  A piece is of what the objective needs: a dialogue, a pair, or, of documents, an int32 array of the tokens of one, or
  of a part of it, bos and eos included; `ahead`, with the token that follows the part (the pieces of a document then
  share one token, as next-token prediction needs it), which does not count in n of `Room`. A piece may be as short as
  one token, and an example may be empty. `in_place` says that the targets are the tokens of the piece in their order,
  but the first if `ahead`: then the bytes of the text that each stands for are known of any tokenizer.
  """
  example: Callable[[Any, np.random.Generator, Special], Example]
  room: Room = Room()
  ahead: bool = False
  in_place: bool = False


def sample(kind: type, tokens: int, token: int) -> Any:
  """A piece of a kind, to try a form on."""
  document = np.full(tokens, token, np.int32)
  dialogue = Dialogue(document, np.arange(tokens) >= tokens // 2)
  return {np.ndarray: document, Dialogue: dialogue, Pair: Pair(dialogue, dialogue),
          Rated: Rated(dialogue, True, dialogue)}[kind]


class ExampleMaker(Protocol):
  """What data knows of an objective: see `lm.objectives.objective`."""
  forms: tuple[Form, ...]
  needs: type
  control: tuple[str, ...]


def template(objective: ExampleMaker, special: Special, length: int, source_length: int | None = None) -> Batch:
  """One empty row, with the fields that the examples of an objective have.

  ValueError where an example is too long for its room, or has a source and the data no place for one.
  """
  has_source = {form.room.source_ratio is not None for form in objective.forms}
  if has_source != {source_length is not None}:
    raise ValueError('the objective makes sources for an encoder: give the data a source_length' if True in has_source
                     else f'source_length={source_length}: this objective makes no sources; leave it out')
  examples = []
  word = min({0, 1, 2} - {special.bos, special.eos})
  for form in objective.forms:
    for n in (2, max(2, form.room.tokens(length, source_length))):
      piece = sample(objective.needs, n + form.ahead, word)
      examples.append(form.example(piece, np.random.default_rng(0), special))
      if objective.needs is np.ndarray and len(examples[-1].tokens) > form.room.ratio * n + form.room.extra + 1e-6:
        raise ValueError(f'an example of {n} tokens has {len(examples[-1].tokens)} positions, more than the '
                         f'{form.room} of its objective says')
    if objective.needs is np.ndarray and not examples[-1].weights.any():
      raise ValueError(f'an example of {n} tokens, as many as a row takes, has no target; raise the length')
  new = lambda dtype, shape=(): np.zeros((1, length, *shape), dtype)
  batch = Batch(new(np.int32), new(np.int32), new(np.float32), new(np.int32), new(np.int32))
  if any(example.bidirectional is not None for example in examples):
    batch = batch._replace(bidirectional=new(bool))
  if source_length is not None:
    batch = batch._replace(**dict(zip(('source', 'source_segments'), np.zeros((2, 1, source_length), np.int32))))
  columns = {name: new(x.dtype, x.shape[1:]) for example in examples for name, x in (example.columns or {}).items()}
  inputs = {name: np.zeros((1, *x.shape), x.dtype) for example in examples for name,
            x in (example.inputs or {}).items()}
  return batch._replace(columns=columns or None, inputs=inputs or None)


def blank(row: Batch, rows: int) -> Batch:
  """So many rows as empty as this one."""
  return jax.tree.map(lambda x: np.zeros((rows, *x.shape[1:]), x.dtype), row)


class Row:
  """Row `i` of a batch, which is filled from the left."""

  def __init__(self, batch: Batch, i: int):
    self.batch, self.i, self.at, self.source_at, self.segments = batch, i, 0, 0, 0

  def add(self, example: Example) -> None:
    """Adds an example; one without tokens adds nothing. A row with inputs, which are of all of it, holds one example.

    Raises:
      ValueError: the example does not fit, or its inputs are not those that the row has a place for.
    """
    if not (size := len(example.tokens)):
      return
    self._add_inputs(example.inputs or {})
    batch, end = self.batch, self.at + size
    source_end = self.source_at + (0 if example.source is None else len(example.source))
    if end > batch.tokens.shape[1] or batch.source is not None and source_end > batch.source.shape[1]:
      raise ValueError(f'an example of {size} positions does not fit its row: it is longer than its Room says')
    span = self.i, slice(self.at, end)
    batch.tokens[span], batch.targets[span], batch.weights[span] = example[:3]
    if example.segments is None:
      batch.positions[span], batch.segments[span] = np.arange(size), self.segments + 1
      count = 1
    else:
      first = np.flatnonzero(np.diff(example.segments, prepend=0))
      batch.positions[span] = np.arange(size) - np.repeat(first, np.diff(first, append=size))
      batch.segments[span] = self.segments + example.segments
      count = len(first)
    if example.bidirectional is not None:
      batch.bidirectional[span] = example.bidirectional
    for name, values in (example.columns or {}).items():
      batch.columns[name][span] = values
    if example.source is not None:
      source = self.i, slice(self.source_at, source_end)
      batch.source[source], batch.source_segments[source] = example.source, self.segments + 1
    self.at, self.source_at, self.segments = end, source_end, self.segments + count

  def _add_inputs(self, inputs: Mapping[str, Array]) -> None:
    places = self.batch.inputs or {}
    if places and self.at:
      raise ValueError(f'a row would hold several examples, and inputs ({", ".join(places)}) are of the whole row; '
                       'give each example a row of its own')
    for name, values in inputs.items():
      place = places.get(name)
      if place is None or place.shape[1:] != np.shape(values):
        has = 'none of that name' if place is None else f'one of shape {list(place.shape[1:])}'
        raise ValueError(f'an example has the input {name} of shape {list(np.shape(values))}, and its row {has}; '
                         'declare it in `inputs` of the data')
      place[self.i] = values
