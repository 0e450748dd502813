"""How varied texts are among themselves; references are not read.

Words are those of `words.split`, so that every script has some.
"""
import collections
import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from lm import seeds
from lm.evaluate.measures import Measure, mean, ratio
from lm.evaluate.texts import words
from lm.evaluate.texts.scored_pairs import References


def ngrams(tokens: Sequence[str], n: int) -> list[tuple[str, ...]]:
  """Returns the n-grams of a text in their order, [max(len(tokens) - n + 1, 0)]."""
  return list(zip(*(tokens[i:] for i in range(n))))


def _tokens(name: str, candidates: Sequence[str]) -> list[list[str]]:
  if isinstance(candidates, str) or not len(candidates):
    raise ValueError(f'{name} is of a list of texts, and there are none')
  return [words.split(text) for text in candidates]


@dataclasses.dataclass(frozen=True)
class Distinct:
  """distinct-n: the different n-grams of all texts together over the number of n-grams (Li et al. 2016).

  It falls as texts become more, so only sets with the same number of texts are comparable. An n-gram that occurs c
  times gives each text 1/c for each occurrence, so that the sum is the number of different ones; the interval takes
  these as fixed.

  Args:
    orders: the values of n.
  """
  orders: tuple[int, ...] = (1, 2, 3)

  def __call__(self, candidates: Sequence[str], references: References | None = None) -> list[Measure]:
    del references
    tokens, results = _tokens('distinct', candidates), []
    for n in self.orders:
      of_texts = [ngrams(text, n) for text in tokens]
      counts = collections.Counter(ngram for text in of_texts for ngram in text)
      rows = [[math.fsum(1 / counts[ngram] for ngram in text), len(text)] for text in of_texts]
      results.append(Measure(f'distinct_{n}', np.float64(rows), ratio, 'higher',
                             f'of:corpus|texts:{len(candidates)}|tok:unicode'))
    return results


@dataclasses.dataclass(frozen=True)
class Repetition:
  """The share of repeated n-grams within a text, as a mean over texts (Welleck et al. 2020), and of copied texts.

  A text without an n-gram does not count. A copy is a text that occurs elsewhere too, but for white space.

  Args:
    n: words of an n-gram.
  """
  n: int = 4

  def __call__(self, candidates: Sequence[str], references: References | None = None) -> list[Measure]:
    del references
    scores, weights = [], []
    for tokens in _tokens('repetition', candidates):
      grams = ngrams(tokens, self.n)
      scores.append(1 - len(set(grams)) / len(grams) if grams else 0.)
      weights.append(float(bool(grams)))
    texts = [' '.join(text.split()) for text in candidates]
    counts = collections.Counter(texts)
    return [mean(f'repetition_{self.n}', scores, 'lower', 'of:text|tok:unicode', weights),
            mean('copies', [counts[text] > 1 for text in texts], 'lower', f'of:corpus|texts:{len(texts)}')]


@dataclasses.dataclass(frozen=True)
class SelfBleu:
  """Self-BLEU: the mean BLEU of each text with all others as its references, 0 to 100 (Zhu et al. 2018).

  It is sacrebleu's sentence BLEU with effective order and exponential smoothing, on the words of `words.split`. It
  rises with the number of texts, so only sets with the same number are comparable.

  Args:
    limit: of more texts than this, so many are drawn.
    seed: of that draw.
  """
  limit: int = 1000
  seed: int = 0

  def __call__(self, candidates: Sequence[str], references: References | None = None) -> list[Measure]:
    del references
    tokens, count = _tokens('self_bleu', candidates), len(candidates)
    if count < 2:
      raise ValueError('self_bleu compares texts with each other, and there is one; give more, or leave it out')
    chosen = np.arange(count)
    if count > self.limit:
      chosen = np.sort(seeds.generator(self.seed).choice(count, self.limit, replace=False))
    scores, weights = np.zeros(count), np.zeros(count)
    scores[chosen], weights[chosen] = _self_bleu([tokens[i] for i in chosen]), 1
    drawn = f'|drawn_from:{count}|seed:{self.seed}' if count > self.limit else ''
    return [mean('self_bleu', scores, 'lower', f'of:corpus|texts:{len(chosen)}{drawn}|eff:yes|smooth:exp|tok:unicode',
                 weights)]


def _self_bleu(texts: Sequence[Sequence[str]], order: int = 4) -> list[float]:
  """Returns the BLEU of each text against the others, in time linear in their total length."""
  counts = [[collections.Counter(ngrams(text, n)) for n in range(1, order + 1)] for text in texts]
  # The largest count of each n-gram in any text, which text has it, and the largest in the other texts.
  largest: dict[tuple[str, ...], tuple[int, int, int]] = {}
  for i, of_text in enumerate(counts):
    for ngram, count in (item for counter in of_text for item in counter.items()):
      first, owner, second = largest.get(ngram, (0, -1, 0))
      largest[ngram] = (count, i, first) if count > first else (first, owner, max(second, count))
  lengths = collections.Counter(map(len, texts))
  return [_bleu([[(count, largest[ngram][2] if largest[ngram][1] == i else largest[ngram][0])
                  for ngram, count in counter.items()] for counter in of_text], len(text), _closest(len(text), lengths))
          for i, (text, of_text) in enumerate(zip(texts, counts))]


def _closest(length: int, lengths: collections.Counter[int]) -> int:
  """Returns the length nearest to that of one of the texts among the others; the shorter of two."""
  others = (other for other, count in lengths.items() if other != length or count > 1)
  return min(others, key=lambda other: (abs(other - length), other))


def _bleu(pairs: Sequence[Sequence[tuple[int, int]]], length: int, reference_length: int) -> float:
  """Returns sentence BLEU from (count, count in the references) of the n-grams of each order."""
  logs, halving = [], 1.
  for of_order in pairs:
    total = sum(count for count, _ in of_order)
    correct = sum(min(pair) for pair in of_order)
    if total == 0:
      break
    if correct == 0:
      halving *= 2
    logs.append(math.log(100 * (correct or 1 / halving) / total))
  if not any(min(pair) for of_order in pairs for pair in of_order):
    return 0.
  penalty = 1. if length >= reference_length else math.exp(1 - reference_length / length)
  return penalty * math.exp(sum(logs) / len(logs))
