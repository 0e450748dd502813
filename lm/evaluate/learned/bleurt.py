"""BLEURT (Sellam et al. 2020, arXiv:2004.04696): an encoder reads a reference with a candidate, and gives a score.

Scores of different models are not comparable. Those of BLEURT-20 lie between 0 and 1, roughly.
"""
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data import tokenizers
from lm.evaluate import measures
from lm.evaluate.learned import text_rows
from lm.evaluate.measures import Measure
from lm.evaluate.texts import scored_pairs
from lm.evaluate.texts.scored_pairs import References
from lm.models.encoder import TextScorer


def truncated(reference: np.ndarray, candidate: np.ndarray, room: int) -> tuple[np.ndarray, np.ndarray]:
  """Cuts two texts to `room` tokens together: the longer one first, and the candidate where both are as long.

  This is what BLEURT does, whose loop removes one token after another (bleurt/encoding.py).
  """
  excess = max(len(reference) + len(candidate) - room, 0)
  difference = len(reference) - len(candidate)
  cut = min(excess, abs(difference))
  both = excess - cut
  from_reference = both // 2 + (cut if difference > 0 else 0)
  return reference[:len(reference) - from_reference], candidate[:len(candidate) - (excess - from_reference)]


def pair(reference: np.ndarray, candidate: np.ndarray, bos: int, eos: int, most: int) -> text_rows.Text:
  """Returns `[CLS] reference [SEP] candidate [SEP]` of at most `most` tokens; the candidate is the second sentence."""
  reference, candidate = truncated(reference, candidate, most - 3)
  tokens = np.concatenate([[bos], reference, [eos], candidate, [eos]]).astype(np.int32)
  return text_rows.Text(tokens, (np.arange(len(tokens)) >= len(reference) + 2).astype(np.int32))


def scores(model: TextScorer, params: Any, tokenizer: tokenizers.Tokenizer, references: Sequence[str],
           candidates: Sequence[str], length: int | None = None) -> np.ndarray:
  """Returns the score of each candidate against its reference, float32 [n], on the current mesh.

  Pairs are cut to `length` tokens, by default to as many as the model reads.
  """
  if not isinstance(model, TextScorer):
    raise ValueError(f'a model of class {type(model).__name__} gives pairs of texts no score; take a checkpoint of '
                     'BLEURT, or a run of learned_metric.py')
  encoded = dict(zip(texts := list(dict.fromkeys([*references, *candidates])), tokenizer.encode_batch(texts)))
  most = model.max_length if length is None else length
  pairs = [pair(encoded[reference], encoded[candidate], tokenizer.bos_id, tokenizer.eos_id, most)
           for reference, candidate in zip(references, candidates, strict=True)]
  result = np.zeros(len(pairs), np.float32)
  function = functools.partial(text_rows.scores, model.apply, params)
  for places, values in text_rows.compute('bleurt', function, pairs, most):
    result[places] = values[:len(places)]
  return result


@dataclasses.dataclass(frozen=True, eq=False)
class Bleurt:
  """The mean score of candidates by a BLEURT model; of several references, the one with the best score counts.

  Args:
    model: the model.
    params: its parameters.
    tokenizer: its tokenizer, whose bos and eos are [CLS] and [SEP].
    name: the name of the model, for the signature.
    length: the most tokens of a pair; none for as many as the model reads.
  """
  model: TextScorer
  params: Any = dataclasses.field(repr=False)
  tokenizer: tokenizers.Tokenizer
  name: str = ''
  length: int | None = None

  def __call__(self, candidates: Sequence[str], references: References | None) -> list[Measure]:
    scored_pairs.check('bleurt', candidates, references)
    owner = np.repeat(np.arange(len(candidates)), [len(several) for several in references])
    values = scores(self.model, self.params, self.tokenizer, [text for several in references for text in several],
                    [candidates[i] for i in owner], self.length)
    best = np.full(len(candidates), -np.inf)
    np.maximum.at(best, owner, values)
    signature = (f'bleurt model:{self.name} refs:{scored_pairs.count(references)} (best) '
                 f'length:{self.length or self.model.max_length}')
    return [measures.mean('bleurt', best, 'higher', signature)]

  def note(self, candidates: Sequence[str], references: References) -> str | None:
    """Returns a line that says how many pairs are cut; None without any."""
    most, sizes = self.length or self.model.max_length, text_rows.sizes(self.tokenizer, candidates, references)
    cut = [sizes[candidate] + sizes[reference] > most - 3
           for candidate, several in zip(candidates, references) for reference in several]
    return (f'bleurt reads {most} tokens of a pair with 3 separators, and {sum(cut):,} of {len(cut):,} pairs are '
            'longer: they lose the end of the longer text' if any(cut) else None)
