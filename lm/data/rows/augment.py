"""Augmentation of text, for training: other versions of a document at each epoch, as a pure function of the step.

Text is changed before the objective makes an example of it, so that the targets belong to the text that is read, and no
input reveals a target. Only `TokenDropout` changes the inputs and not the targets.
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
  """Base class, which changes nothing. n tokens become at most ratio * n tokens, and further ones are cut off."""

  ratio = 1.

  def check(self, tokenizer: Tokenizer) -> None:
    """Raises ValueError if the augmentation needs something that the tokenizer lacks."""

  def text(self, body: np.ndarray, rng: np.random.Generator, special: Special) -> np.ndarray:
    """Returns another version of the tokens of a document, or of a part of it, without bos and eos."""
    del rng, special
    return body

  def example(self, example: Example, rng: np.random.Generator, special: Special) -> Example:
    """Returns another version of an example."""
    del rng, special
    return example


@dataclasses.dataclass(frozen=True)
class TokenDropout(Augmentation):
  """Replaces each input token with probability `rate`, and no target (word dropout, Bowman et al. 2016).

  A token is replaced by the control token `token`, such as '<|mask|>', or, if that is None, by a random token of the
  vocabulary. Bos, eos, the control tokens of the objective, and the source of an encoder are not replaced.
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
    is_text = ~np.isin(tokens, [special.bos, special.eos, *special.control])
    is_replaced = (rng.random(len(tokens)) < self.rate) & is_text
    if self.token is None:
      tokens[is_replaced] = rng.integers(special.vocab, size=int(is_replaced.sum()))
    elif special.tokenizer is not None:
      tokens[is_replaced] = special.tokenizer.control_id(self.token)
    return example._replace(tokens=tokens)


@dataclasses.dataclass(frozen=True)
class SpanDeletion(Augmentation):
  """Deletes a share `rate` of the tokens, in spans that do not touch, of `mean_span` tokens on average."""
  rate: float
  mean_span: float = 3.

  def __post_init__(self):
    _check_share(self)
    if self.mean_span < 1:
      raise ValueError(f'mean_span={self.mean_span} is less than a token; give at least 1')

  def text(self, body, rng, special):
    deleted = min(round(self.rate * len(body)), len(body) - 3)   # 3 tokens remain: a target, and its context
    if deleted < 1:
      return body
    remaining = len(body) - deleted
    spans = min(max(1, round(deleted / self.mean_span)), remaining + 1)
    ends = np.sort(rng.choice(deleted - 1, spans - 1, replace=False)) + 1
    sizes = np.diff(ends, prepend=0, append=deleted)
    before = np.sort(rng.choice(remaining + 1, spans, replace=False))   # the remaining tokens before each span
    return np.delete(body, np.repeat(before, sizes) + np.arange(deleted))


@dataclasses.dataclass(frozen=True)
class Shuffle(Augmentation):
  """Shuffles the lines of a document in a row, with probability `rate`; with a `size`, parts of `size` tokens instead.

  The first part is shorter than `size`, by a random number of tokens, so that the cuts differ each time.
  """
  rate: float
  size: int | None = None

  def __post_init__(self):
    if not 0 <= self.rate <= 1:
      raise ValueError(f'Shuffle: rate={self.rate} is not a share between 0 and 1')
    if self.size is not None and self.size < 1:
      raise ValueError(f'size={self.size} is less than a token; give at least 1')

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
  """Writes a text in other tokens: BPE-dropout (Provilkov et al. 2020) or sampling from a unigram model (Kudo 2018).

  `alpha` is the share of merges that BPE omits, or the exponent of the probabilities of a unigram model, which a small
  exponent makes more even. The text takes more tokens, so a row holds only length / ratio tokens of it; what grows more
  is cut off at its end. A piece that begins or ends inside a character, or has tokens without text, is not changed.
  """
  alpha: float = 0.1
  ratio: float = 1.25

  def __post_init__(self):
    if not 0 < self.alpha <= 1:
      raise ValueError(f'SubwordSampling: alpha={self.alpha} is not above 0 and at most 1')
    if not self.ratio >= 1:
      raise ValueError(f'ratio={self.ratio} is less than 1; give at least 1')

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
  """Returns the objective with examples of text that goes through all augmentations in turn; for training only.

  Raises ValueError if the objective learns from something else than documents, or if an augmentation needs something
  that the tokenizer lacks.
  """
  if not augmentations:
    return objective
  if objective.needs is not np.ndarray:
    raise ValueError('augmentation is of documents, and this objective learns from dialogues, whose turns and answers '
                     'it would break; leave it out')
  if tokenizer is not None:
    for augmentation in augmentations:
      augmentation.check(tokenizer)
  return dataclasses.replace(objective, forms=tuple(_augmented(form, augmentations) for form in objective.forms))


def _augmented(form: Form, augmentations: Sequence[Augmentation]) -> Form:
  ratio, room = math.prod(augmentation.ratio for augmentation in augmentations), form.room

  def example(piece: np.ndarray, rng: np.random.Generator, special: Special) -> Example:
    # Bos and eos are not changed, nor is the token that a piece shares with the one before it if it reads ahead.
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
