"""Augmentation of text, for training: other versions of a document's pieces at each epoch, as pure as all batches are.

Text is changed before the objective makes its example of it, so that targets are always those of the text that is read,
and nothing read tells a target; `TokenDropout` alone changes what is read and leaves the targets.
"""
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data.batch import Example, Form, Room, Special
from lm.data.tokenizers.base import Tokenizer


@dataclasses.dataclass(frozen=True)
class Augmentation:
  """Base: changes nothing. `ratio` bounds growth: n tokens become ratio * n at most, and what is over is cut."""

  ratio = 1.

  def check(self, tokenizer: Tokenizer) -> None:
    """ValueError where the tokenizer cannot do it."""

  def text(self, body: np.ndarray, rng: np.random.Generator, special: Special) -> np.ndarray:
    """Tokens of a document, or of a part of it, without bos and eos."""
    del rng, special
    return body

  def example(self, example: Example, rng: np.random.Generator, special: Special) -> Example:
    del rng, special
    return example


@dataclasses.dataclass(frozen=True)
class TokenDropout(Augmentation):
  """Each token that is read is replaced with probability `rate`; targets stay (word dropout, Bowman et al. 2016).

  By the control token named `token`, such as '<|mask|>', or, where it is None, by any token of the vocabulary. Tokens
  that mean something to the objective, bos and eos stay, and so does the source of an encoder.
  """
  rate: float
  token: str | None = '<|mask|>'

  def __post_init__(self):
    _check_share(self)

  def check(self, tokenizer):
    if self.token is not None:
      tokenizer.control_id(self.token)

  def example(self, example, rng, special):
    tokens = example.tokens.copy()
    hit = (rng.random(len(tokens)) < self.rate) & ~np.isin(tokens, [special.bos, special.eos, *special.control])
    if self.token is None:
      tokens[hit] = rng.integers(special.vocab, size=int(hit.sum()))
    elif special.tokenizer is not None:
      tokens[hit] = special.tokenizer.control_id(self.token)
    return example._replace(tokens=tokens)


@dataclasses.dataclass(frozen=True)
class SpanDeletion(Augmentation):
  """A share `rate` of the tokens is cut out, rounded, in spans of `mean_span` on average that do not touch."""
  rate: float
  mean_span: float = 3.

  def __post_init__(self):
    _check_share(self)
    if self.mean_span < 1:
      raise ValueError(f'mean_span={self.mean_span} is less than a token')

  def text(self, body, rng, special):
    gone = min(round(self.rate * len(body)), len(body) - 3)   # something to predict, and to predict it from, stays
    if gone < 1:
      return body
    left = len(body) - gone
    spans = min(max(1, round(gone / self.mean_span)), left + 1)
    ends = np.sort(rng.choice(gone - 1, spans - 1, replace=False)) + 1
    sizes = np.diff(ends, prepend=0, append=gone)
    before = np.sort(rng.choice(left + 1, spans, replace=False))   # how many tokens that stay are before each span
    return np.delete(body, np.repeat(before, sizes) + np.arange(gone))


@dataclasses.dataclass(frozen=True)
class Shuffle(Augmentation):
  """With probability `rate`, the lines of what a row holds of a document change places; or parts of `size` tokens.

  Of a `size`, the first and the last part are shorter, so that the cuts are in other places each time.
  """
  rate: float
  size: int | None = None

  def __post_init__(self):
    if not 0 <= self.rate <= 1:
      raise ValueError(f'Shuffle: rate={self.rate} is not a share between 0 and 1')
    if self.size is not None and self.size < 1:
      raise ValueError(f'size={self.size} is less than a token')

  def text(self, body, rng, special):
    if rng.random() >= self.rate or self.size is None and special.tokenizer is None:
      return body
    if self.size is None:
      cuts = np.flatnonzero(_ends_line(special.tokenizer)[body]) + 1
    else:
      cuts = np.arange(1 + rng.integers(self.size), len(body), self.size)
    parts = np.split(body, cuts)
    return np.concatenate([parts[i] for i in rng.permutation(len(parts))])


@dataclasses.dataclass(frozen=True)
class SubwordSampling(Augmentation):
  """The same text in other tokens: BPE-dropout (Provilkov et al. 2020) or sampling from a unigram model (Kudo 2018).

  `alpha` is the share of the merges that BPE leaves out, or the exponent of the probabilities of unigram: the smaller,
  the more even. Text grows, so rows take length / ratio tokens of it; what grows more is cut off at its end. A piece
  that begins or ends inside a character, or has tokens without text, stays as it is.
  """
  alpha: float = 0.1
  ratio: float = 1.25

  def __post_init__(self):
    if not 0 < self.alpha <= 1:
      raise ValueError(f'SubwordSampling: alpha={self.alpha} is not above 0 and at most 1')
    if not self.ratio >= 1:
      raise ValueError(f'ratio={self.ratio} is less than 1')

  def check(self, tokenizer):
    tokenizer.sample('a', self.alpha, 0)

  def text(self, body, rng, special):
    seed = int(rng.integers(2 ** 31))
    if special.tokenizer is None or not _has_text(special.tokenizer)[body].all():
      return body
    text = special.tokenizer.decode(body)
    if '\ufffd' in text:
      return body
    sampled = special.tokenizer.sample(text, self.alpha, seed)
    return sampled if special.tokenizer.decode(sampled) == text else body


def augmented(objective: Any, augmentations: Sequence[Augmentation], tokenizer: Tokenizer | None = None) -> Any:
  """The objective, made of text that goes through the augmentations in turn; for training alone.

  ValueError where it learns from something else than documents, or the tokenizer cannot do one of them.
  """
  if augmentations and objective.needs is not np.ndarray:
    raise ValueError('augmentation is of documents, and this objective learns from dialogues, whose turns and answers '
                     'it would break; leave it out')
  for augmentation in augmentations if tokenizer is not None else ():
    augmentation.check(tokenizer)
  return dataclasses.replace(objective, forms=tuple(_augmented(form, augmentations) for form in objective.forms)
                             ) if augmentations else objective


def _augmented(form: Form, augmentations: Sequence[Augmentation]) -> Form:
  ratio, room = math.prod(augmentation.ratio for augmentation in augmentations), form.room

  def example(piece: np.ndarray, rng: np.random.Generator, special: Special) -> Example:
    # Bos and eos stay where they are; and the tokens that a piece reads ahead, and shares with the piece before.
    first = int(form.ahead or piece[0] == special.bos)
    last = max(first, len(piece) - int(form.ahead or piece[-1] == special.eos))
    body = piece[first:last]
    for augmentation in augmentations:
      body = augmentation.text(body, rng, special)
    limit = math.floor(ratio * (len(piece) - form.ahead) + 1e-9) + form.ahead
    changed = np.concatenate([piece[:first], body, piece[last:]])[:limit]
    result = form.example(changed.astype(np.int32), rng, special)
    for augmentation in augmentations:
      result = augmentation.example(result, rng, special)
    return result

  source = None if room.source_ratio is None else room.source_ratio * ratio
  return form._replace(example=example, room=Room(room.ratio * ratio, room.extra, source, room.source_extra))


def _check_share(augmentation: TokenDropout | SpanDeletion) -> None:
  if not 0 <= augmentation.rate < 1:
    raise ValueError(f'{type(augmentation).__name__}: rate={augmentation.rate} is not in [0, 1)')


@functools.lru_cache(maxsize=4)
def _ends_line(tokenizer: Tokenizer) -> np.ndarray:
  return np.array([tokenizer.decode([i]).endswith('\n') for i in range(tokenizer.vocab_size)])


@functools.lru_cache(maxsize=4)
def _has_text(tokenizer: Tokenizer) -> np.ndarray:
  return tokenizer.byte_lengths() > 0
