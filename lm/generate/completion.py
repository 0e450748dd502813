"""Completions of token ids: prompts in, new tokens out, some at a time. An `engine` decodes them.

Shapes: the legend in `models/transformer.py`.
"""
import collections
import zlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.data.tokenizers.folder import Tokenizer
from lm.generate.drafted_steps import Drafter
from lm.generate.engine import Engine
from lm.generate.grammars import Matcher, allowed_tokens
from lm.generate.sampling import Sampling, settings
from lm.generate.slots import WIDTHS
from lm.models.transformer import LanguageModel


class Draft(Protocol):
  """Makes an engine that drafts tokens, as `module_drafts.SelfSpeculation` does."""

  def engine(self, model: Any, params: Any, slots: int, vocab: int, ends: Sequence[int]) -> Engine:
    """Returns an engine whose rows have at least `slots` slots; see `Engine` for the arguments."""


class Completion(NamedTuple):
  """The model that completes texts, how a token is drawn, and the largest number of tokens to write.

  `matchers` are those of the texts, if they have to match a grammar; they follow what is written.
  """
  model: LanguageModel
  params: Any
  tokenizer: Tokenizer
  sampling: Sampling
  max_tokens: int
  seed: int
  draft: Draft | Drafter | None = None
  matchers: Sequence[Matcher] = ()

  @property
  def ends(self) -> tuple[int, ...]:
    """The ids that end a text."""
    return *self.tokenizer.eos_ids, *self.sampling.stop_ids

  def engine(self, slots: int) -> Engine:
    """Returns an engine whose rows have at least `slots` slots."""
    model, ends = self.model, tuple(self.tokenizer.eos_ids)
    params, vocab = model.unstack(self.params), self.tokenizer.vocab_size
    if isinstance(self.draft, Drafter):
      slots += self.draft.drafts
    elif self.draft is not None:
      return self.draft.engine(model, params, slots, vocab, ends)
    return Engine(model, params, round_up_slots(slots), vocab, ends)


def round_up_slots(slots: int) -> int:
  """Returns a number of slots for a cache, a multiple of 64, so that few sizes are compiled."""
  return -(-slots // 64) * 64


def prompt_batch(model: LanguageModel, texts: Sequence[np.ndarray], tokenizer: Tokenizer, adds_bos: bool = True
                 ) -> Batch:
  """Returns a batch with a row for each text, after bos if `adds_bos` is true.

  Empty rows follow, up to a number of rows that the mesh can split.
  """
  return model.prompt(texts, sharding.padded_rows(len(texts)), tokenizer.bos_id, tokenizer.eos_id, adds_bos)


def random_streams(texts: Sequence[np.ndarray], rows: int, bos: int) -> np.ndarray:
  """Returns the number of each row's random stream, uint32 [rows].

  It depends on the text of the row, with or without bos, and on the number of equal texts before it.
  """
  numbers, copies = np.zeros(rows, np.uint32), collections.Counter()
  for row, ids in enumerate(texts):
    text = np.int32(ids if len(ids) and ids[0] == bos else [bos, *ids]).tobytes()
    numbers[row] = zlib.crc32(text, copies[text])
    copies[text] += 1
  return numbers


def complete(request: Completion, texts: Sequence[np.ndarray], batch: Batch, streams: np.ndarray | None = None,
             step: int = 0, full_texts: Sequence[np.ndarray] = ()) -> Iterator[list[np.ndarray]]:
  """Yields new tokens of each text, at most about CHUNK at a time, and none for a text that has ended.

  Args:
    request: the model and how it samples.
    texts: the token ids of the texts.
    batch: the prompts of the texts, as `prompt_batch` makes them.
    streams: the random streams of the rows; None computes those of `texts`.
    step: the number of tokens that were written earlier: random numbers continue after these.
    full_texts: texts with the tokens that no longer fit the context, all of which a repetition penalty counts.

  Raises ValueError if the parser of a grammar reaches its limits.
  """
  rows, width = batch.tokens.shape
  if streams is None:
    streams = random_streams(texts, rows, request.tokenizer.bos_id)
  engine, limit = request.engine(width + request.max_tokens), step + request.max_tokens
  row_settings = settings([request.sampling] * rows, [request.seed] * rows, streams)
  allowed = allowed_tokens(request.matchers, engine.model.vocab)
  state, tokens = engine.prefill(batch, row_settings, [limit] * rows, step, full_texts, allowed)
  written, ended = np.zeros(len(texts), int), np.zeros(len(texts), bool)
  drafter, so_far = request.draft, []
  if isinstance(drafter, Drafter):
    so_far = [ids[segments > 0] for ids, segments in zip(batch.tokens, batch.segments[:len(texts)])]
    drafter.prepare(engine, rows, WIDTHS, max(map(len, so_far)) + request.max_tokens)
    for row, ids in enumerate(so_far):
      drafter.join(ids, row)
  while True:
    pieces = tokens.rows(len(texts))
    for matcher, piece in zip(request.matchers, pieces):
      matcher.add(piece.tolist())
    written += [len(piece) for piece in pieces]
    ended |= [np.isin(piece, request.ends).any() for piece in pieces]
    yield pieces
    if (ended | (written >= request.max_tokens)).all():
      return
    allowed = allowed_tokens(request.matchers, engine.model.vocab)
    failures = [matcher.failure for matcher in request.matchers if matcher.failure]
    if failures:
      raise ValueError(f'the grammar allows no further token: {failures[0]}')
    if isinstance(drafter, Drafter):
      so_far = [np.r_[ids, piece] for ids, piece in zip(so_far, pieces)]
      drafted = [None if has_ended or allowed is not None else ids for ids, has_ended in zip(so_far, ended)]
      state, tokens = drafter.step(engine, state, [*drafted, *[None] * (rows - len(texts))], allowed)
    else:
      state, tokens = engine.step(state) if allowed is None else engine.step(state, 1, allowed)


def complete_past_context(request: Completion, texts: Sequence[np.ndarray], batch: Batch) -> Iterator[list[np.ndarray]]:
  """Like `complete`, but reads texts again where a cache cannot continue. `texts` contain all control tokens.

  That is so after the token with which a text exceeds LongRoPE's original context, as in `generate` of transformers,
  and when the context is full: then bos and the last half of the context become the text.
  """
  model, tokenizer, step = request.model, request.tokenizer, 0
  streams = random_streams(texts, len(batch.tokens), tokenizer.bos_id)
  full_texts, prompt_lengths = list(texts), [len(ids) for ids in texts]
  texts, ended = full_texts, np.zeros(len(full_texts), bool)
  while step < request.max_tokens:
    if max(map(len, texts)) >= model.max_length:
      if batch.bidirectional is not None:
        raise ValueError('a prompt that is read bidirectionally cannot be left behind; leave out the window')
      texts = [_last_half(ids, model.max_length // 2, tokenizer.bos_id) for ids in texts]
    if step:
      batch = _read_again(batch, prompt_batch(model, texts, tokenizer, adds_bos=False), prompt_lengths)
    count = min(request.max_tokens - step, _continuous(model, texts))
    new = [[] for _ in texts]
    for pieces in complete(request._replace(max_tokens=count), texts, batch, streams, step, full_texts):
      for row, piece in zip(new, pieces):
        row.extend(piece.tolist())
      yield pieces
    step += count
    ended |= [np.isin(row, request.ends).any() for row in new]
    if ended.all():
      return
    # Rows that have ended are filled up, so that all rows have the same number of new tokens.
    new = [np.int32(row + [tokenizer.eos_ids[0]] * (count - len(row))) for row in new]
    texts, full_texts = _append(texts, new), _append(full_texts, new)


def _last_half(ids: np.ndarray, half: int, bos: int) -> np.ndarray:
  """Returns bos, if the text begins with it, and the last `half` tokens; a text that is not longer stays as it is."""
  return ids if len(ids) <= half else np.r_[ids[:int(ids[0] == bos)], ids[-half:]]


def _read_again(before: Batch, batch: Batch, prompt_lengths: Sequence[int]) -> Batch:
  """Returns `batch`, with the prompts marked as bidirectional if they are in the batch `before`."""
  if before.bidirectional is None:
    return batch
  lengths = np.array([*prompt_lengths, *[0] * (len(batch.tokens) - len(prompt_lengths))])
  return batch._replace(bidirectional=(batch.positions < lengths[:, None]) & (batch.segments > 0))


def _continuous(model: LanguageModel, texts: Sequence[np.ndarray]) -> int:
  """Returns how many tokens can be written after the texts before one of them has to be read again."""
  counts = [model.max_length - max(map(len, texts))]
  if model.original_context is not None:
    counts += [model.original_context + 1 - len(ids) for ids in texts if len(ids) <= model.original_context]
  return min(counts)


def _append(texts: Sequence[np.ndarray], new: Sequence[np.ndarray]) -> list[np.ndarray]:
  return [np.r_[ids, tokens].astype(np.int32) for ids, tokens in zip(texts, new)]
