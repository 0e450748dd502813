"""Span corruption: spans of a text are each replaced by a sentinel, and the targets say what each stood for.

  text     Thank you for inviting me to your party last week
  source   Thank you <0> me to your party <1> week
  targets  <0> for inviting <1> last
"""
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from lm.data.batch import Batch, Example, Form, Room, Special
from lm.data.tokenizers.base import sentinels
from lm.objectives.objective import Objective, TokenLoss, causal_prompt, cross_entropy, token_mean, token_objective


def counts(tokens: np.ndarray | int, density: float, mean: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns the numbers of noise tokens and noise spans of T5: rounded (half to even), at least one."""
  noise = np.clip(np.rint(np.multiply(tokens, density)), 1, np.maximum(np.subtract(tokens, 1), 1)).astype(int)
  spans = np.clip(np.rint(noise / mean), 1, np.maximum(np.minimum(noise, tokens - noise), 1)).astype(int)
  return noise, spans


def lengths(tokens: int, density: float = 0.15, mean: float = 3.) -> tuple[int, int]:
  """Returns the lengths of source and targets, each with its eos."""
  noise, spans = counts(tokens, density, mean)
  return int(tokens - noise + spans + 1), int(noise + spans + 1)


def raw_length(source: int, density: float = 0.15, mean: float = 3.) -> int:
  """Returns the largest number of tokens whose source fits (T5's `random_spans_helper`): 568 for 512."""
  tokens = source
  while lengths(tokens + 1, density, mean)[0] <= source:
    tokens += 1
  return tokens


def noise_mask(tokens: int, density: float, mean: float, rng: np.random.Generator) -> np.ndarray:
  """Returns which tokens are noise, bool [n]: random spans, with all ways to cut equally likely.

  T5's `random_spans_noise_mask`: the first token is kept, the last is noise. A single token is noise.
  """
  def cut(items, parts):
    ends = np.sort(rng.choice(items - 1, parts - 1, replace=False, shuffle=False)) + 1 if parts > 1 else ()
    return np.diff(np.concatenate([[0], ends, [items]]).astype(int))

  if tokens < 2:
    return np.ones(tokens, bool)
  noise, spans = map(int, counts(tokens, density, mean))
  each = np.stack([cut(tokens - noise, spans), cut(noise, spans)], axis=1).reshape(-1)
  return np.repeat(np.arange(2 * spans) % 2 == 1, each)


def corrupt(tokens: np.ndarray, mask: np.ndarray, sentinels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  """Returns source and targets, without eos. Each run of the mask is a span; it gets the next id of `sentinels`."""
  first = mask & ~np.concatenate([[False], mask[:-1]])
  marked, noise, starts = tokens.copy(), tokens[mask], np.flatnonzero(first[mask])
  ids = marked[first] = sentinels[:len(starts)]
  targets = np.empty(len(noise) + len(starts), np.int32)
  targets[np.arange(len(noise)) + np.cumsum(first[mask])] = noise
  targets[starts + np.arange(len(starts))] = ids
  return marked[~mask | first], targets


def fill(source: np.ndarray, targets: np.ndarray, sentinels: np.ndarray) -> np.ndarray:
  """Returns the text: each sentinel of the source is replaced by what follows it in the targets, if any."""
  starts = np.flatnonzero(np.isin(targets, sentinels))
  spans = {int(span[0]): span[1:] for span in np.split(targets, starts)[1:]}
  places = np.flatnonzero(np.isin(source, sentinels))
  parts = np.split(source, places)
  return np.concatenate([parts[0], *(x for part in parts[1:] for x in (spans.get(int(part[0]), part[:0]), part[1:]))])


class Noise(NamedTuple):
  """Corruption of a piece of n tokens.

  `mask(n, rng)` says which tokens are noise, and `spans(n)` is the number of their spans. The lengths of `source`, of
  `targets` and of `both`, without eos, are at most ratio * n + extra, each given as (ratio, extra).
  """
  mask: Callable[[int, np.random.Generator], np.ndarray]
  spans: Callable[[int], int]
  source: tuple[float, float]
  targets: tuple[float, float]
  both: tuple[float, float]


def random_spans(density: float, mean: float) -> Noise:
  """Returns the noise of T5: a share `density` of the tokens, in spans of `mean` tokens on average."""
  if not 0 < density < 1 or not mean >= 1:
    raise ValueError(f'density={density} must be between 0 and 1, mean={mean} at least 1')
  tokens, span_density = np.arange(1, 1 << 16), min(density / mean, 1 - density)
  noise, spans = counts(tokens, density, mean)

  def line(ratio, lengths):   # over all sizes, because the extra tokens are due to rounding
    return ratio, float((lengths - ratio * tokens).max())

  return Noise(functools.partial(noise_mask, density=density, mean=mean), lambda n: counts(n, density, mean)[1],
               line(1 - density + span_density, tokens - noise + spans),
               line(density + span_density, noise + spans),
               line(1 + 2 * span_density, tokens + 2 * spans))


class Layout(NamedTuple):
  """The places of source and targets in an example. `prompt` is as in `Objective`."""
  arrange: Callable[[np.ndarray, np.ndarray, Special], Example]
  room: Callable[[Noise, int], Room]   # of a noise, and the number of additional tokens in the source
  prompt: Callable[[Batch], Batch]


def _for_encoder_decoder(source: np.ndarray, targets: np.ndarray, special: Special) -> Example:
  targets_and_eos = np.append(targets, np.int32(special.eos))
  return Example(np.concatenate([np.int32([special.bos]), targets]), targets_and_eos,
                 np.ones(len(targets_and_eos), np.float32),
                 source=np.append(source, np.int32(special.eos)))


def _for_decoder(source: np.ndarray, targets: np.ndarray, special: Special) -> Example:
  row = np.concatenate([np.int32([special.bos]), source, targets, np.int32([special.eos])])
  places = np.arange(len(row) - 1)
  return Example(row[:-1], row[1:], (places >= len(source)).astype(np.float32), places <= len(source))


def _all_but_last(batch: Batch) -> Batch:
  """Marks the source as bidirectional, but not the last token of a prompt, the first sentinel of the targets."""
  marks = batch.segments > 0
  marks[:, -1] = False
  return batch._replace(bidirectional=marks)


# Functions with names, because a stored objective is built again by name.
def _encoder_decoder_room(noise: Noise, extra: int) -> Room:
  return Room(noise.targets[0], noise.targets[1] + 1, noise.source[0], noise.source[1] + extra + 1)


def _decoder_room(noise: Noise, extra: int) -> Room:
  return Room(noise.both[0], noise.both[1] + extra + 1)


# The encoder reads the source and eos. The decoder begins with bos, T5's start token, and ends with eos.
ENCODER_DECODER = Layout(_for_encoder_decoder, _encoder_decoder_room, causal_prompt)
# One segment of bos, source, targets and eos, where the source is bidirectional and the first sentinel ends it.
DECODER = Layout(_for_decoder, _decoder_room, _all_but_last)


def form(noise: Noise, layout: Layout, sentinels: int, mode: int | None = None) -> Form:
  """Returns one way to corrupt text. `special.control` begins with the sentinels; token `mode` begins the source."""
  def example(piece: np.ndarray, rng: np.random.Generator, special: Special) -> Example:
    body, ids = special.bare(piece), np.array(special.control, np.int32)
    if not len(body):
      return Example(body, body, np.zeros(0, np.float32))
    spans = noise.spans(len(body))
    if spans > sentinels:
      raise ValueError(f'{len(body)} tokens, as many as a row takes, have {spans} spans, but there are only '
                       f'{sentinels} sentinels; name more that the tokenizer has, or take longer spans or shorter rows')
    source, targets = corrupt(body, noise.mask(len(body), rng=rng), ids[:sentinels])
    return layout.arrange(source if mode is None else np.append(ids[mode], source), targets, special)

  return Form(example, layout.room(noise, int(mode is not None)))


def span_corruption(density: float = 0.15, mean: float = 3., layout: Layout = ENCODER_DECODER,
                    sentinels: tuple[str, ...] = sentinels(32),
                    denominator: Callable[[Batch], jax.Array] = token_mean, token_loss: TokenLoss = cross_entropy
                    ) -> Objective:
  """T5's objective (Raffel et al. 2020, arXiv:1910.10683, section 3.1.4), with its arithmetic.

  Of n tokens, m = round(density n) are noise, in s = round(m / mean) spans; the source has n - m + s tokens, the
  targets m + s, and eos ends both.

  Args:
    layout: `ENCODER_DECODER`; or `DECODER`, one segment whose loss is on the targets.
    sentinels: names of control tokens, `<extra_id_0>` and so on in T5's tokenizer. ValueError where a row is so long
      that it may need more.
  """
  return token_objective(form(random_spans(density, mean), layout, len(sentinels)), control=tuple(sentinels),
                         denominator=denominator, token_loss=token_loss, prompt=layout.prompt)
