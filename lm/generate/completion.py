"""Completions of token ids: prompts in, new tokens out, some at a time; decoded by an `engine`.

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
from lm.generate.engine import Engine
from lm.generate.sampling import Sampling, settings
from lm.models.transformer import LanguageModel


class Draft(Protocol):
  """What makes an engine that drafts tokens."""

  def engine(self, model: Any, params: Any, slots: int, vocab: int, ends: Sequence[int]) -> Engine:
    """An engine for rows of `slots` tokens."""


class Request(NamedTuple):
  """How texts are completed: by which model, how tokens are drawn, and how many at most."""
  model: LanguageModel
  params: Any
  tokenizer: Tokenizer
  sampling: Sampling
  max_tokens: int
  seed: int
  draft: Draft | None = None

  def engine(self, slots: int) -> Engine:
    """An engine whose rows have room for so many tokens."""
    model, ends = self.model, tuple(self.tokenizer.eos_ids)
    params, vocab = model.unstack(self.params), self.tokenizer.vocab_size
    if self.draft is not None:
      return self.draft.engine(model, params, slots, vocab, ends)
    return Engine(model, params, rounded(slots), vocab, ends)


def rounded(slots: int) -> int:
  """The slots of a cache, few different numbers, so that few programs are compiled."""
  return -(-slots // 64) * 64


def prompts_of(model: LanguageModel, texts: Sequence[np.ndarray], tokenizer: Tokenizer, adds_bos: bool = True) -> Batch:
  """A row for each text, after bos with `adds_bos`, and empty rows up to what the mesh can split."""
  return model.prompt(texts, sharding.padded_rows(len(texts)), tokenizer.bos_id, tokenizer.eos_id, adds_bos)


def streams(texts: Sequence[np.ndarray], rows: int, bos: int) -> np.ndarray:
  """The random stream of each row, uint32: of its text and how many equal ones stand before it."""
  numbers, copies = np.zeros(rows, np.uint32), collections.Counter()
  for row, ids in enumerate(texts):
    known = np.int32(ids if len(ids) and ids[0] == bos else [bos, *ids]).tobytes()
    numbers[row] = zlib.crc32(known, copies[known])
    copies[known] += 1
  return numbers


def complete(request: Request, texts: Sequence[np.ndarray], batch: Batch, stream: np.ndarray | None = None,
             step: int = 0, whole: Sequence[np.ndarray] = ()) -> Iterator[list[np.ndarray]]:
  """New tokens of each text, at most about CHUNK at a time; none of a text that has ended.

  `stream` and `step` are those of texts that go on, which have so many new tokens already. `whole` are the texts with
  what was left behind of them: a penalty is for all of their tokens.
  """
  rows, width = batch.tokens.shape
  stream = streams(texts, rows, request.tokenizer.bos_id) if stream is None else stream
  engine, limit = request.engine(width + request.max_tokens), step + request.max_tokens
  state, tokens = engine.prefill(batch, settings([request.sampling] * rows, [request.seed] * rows, stream),
                                 [limit] * rows, step, whole)
  written, ended = np.zeros(len(texts), int), np.zeros(len(texts), bool)
  while True:
    pieces = tokens.rows(len(texts))
    written += [len(piece) for piece in pieces]
    ended |= [np.isin(piece, engine.ends).any() for piece in pieces]
    yield pieces
    if (ended | (written >= request.max_tokens)).all():
      return
    state, tokens = engine.step(state)


def complete_past(request: Request, texts: Sequence[np.ndarray], batch: Batch) -> Iterator[list[np.ndarray]]:
  """As `complete`, of texts with all control tokens, which are read again where a cache cannot go on.

  That is at the token with which a text passes LongRoPE's original context, as in transformers' `generate`; and where
  the context is full: then the last half of the text, after its bos, is the text.
  """
  model, tokenizer, original, step = request.model, request.tokenizer, request.model.original_context, 0
  stream = streams(texts, len(batch.tokens), tokenizer.bos_id)
  whole, prompts = list(texts), [len(ids) for ids in texts]
  texts, ended = whole, np.zeros(len(whole), bool)
  while step < request.max_tokens:
    if max(map(len, texts)) >= model.max_length:
      if batch.bidirectional is not None:
        raise ValueError('a prompt that is read bidirectionally cannot be left behind; leave out the window')
      half = model.max_length // 2
      texts = [ids if len(ids) <= half else np.r_[ids[:int(ids[0] == tokenizer.bos_id)], ids[-half:]] for ids in texts]
    if step:
      bidirectional = batch.bidirectional
      batch = prompts_of(model, texts, tokenizer, adds_bos=False)
      if bidirectional is not None:   # of the prompts alone, as they were read at first
        columns = batch.positions < np.array([*prompts, *[0] * (len(batch.tokens) - len(texts))])[:, None]
        batch = batch._replace(bidirectional=columns & (batch.segments > 0))
    passes = [original + 1 - len(ids) for ids in texts if original is not None and len(ids) <= original]
    count = min(request.max_tokens - step, model.max_length - max(map(len, texts)), *passes)
    new = [[] for _ in texts]
    for pieces in complete(request._replace(max_tokens=count), texts, batch, stream, step, whole):
      for row, piece in zip(new, pieces):
        row.extend(piece.tolist())
      yield pieces
    step += count
    ended |= [np.isin(row, tokenizer.eos_ids).any() for row in new]
    if ended.all():
      return
    new = [np.int32(row + [tokenizer.eos_ids[0]] * (count - len(row))) for row in new]   # those that have ended
    texts, whole = ([np.r_[ids, row].astype(np.int32) for ids, row in zip(rows, new)] for rows in (texts, whole))
