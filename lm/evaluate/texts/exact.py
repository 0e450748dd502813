"""How near texts are to their references, symbol by symbol: exact match, values, edit distances, lengths."""
import collections
import dataclasses
import re
import string
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from lm.evaluate.measures import Measure, mean, ratio
from lm.evaluate.texts import scored_pairs, words
from lm.evaluate.texts.scored_pairs import References

_PUNCTUATION = str.maketrans('', '', string.punctuation)


def squad(text: str) -> str:
  """Returns a text as the evaluation of SQuAD compares it: lower case, no ASCII punctuation, no articles."""
  text = re.sub(r'\b(a|an|the)\b', ' ', text.lower().translate(_PUNCTUATION))
  return ' '.join(text.split())


@dataclasses.dataclass(frozen=True)
class ExactMatch:
  """The share of texts that equal one of their references, without white space at both ends.

  Args:
    normalise: compare as SQuAD does: in lower case, without punctuation and articles.
  """
  normalise: bool = False

  def __call__(self, candidates: Sequence[str], references: References | None) -> list[Measure]:
    form = squad if self.normalise else str.strip
    matches = [form(candidate) in {form(reference) for reference in several}
               for candidate, several in scored_pairs.pairs('exact_match', candidates, references)]
    return [mean('exact_match', matches, 'higher',
                 f'nrefs:{scored_pairs.count(references)}|norm:{"squad" if self.normalise else "strip"}')]


@dataclasses.dataclass(frozen=True)
class SlotAccuracy:
  """The share of the values in the references, such as days and prices, that the texts have too.

  A value that a reference has twice has to be there twice. Each text has one reference.

  Args:
    pattern: a regular expression with one group, whose matches are the values.
  """
  pattern: str

  def __call__(self, candidates: Sequence[str], references: References | None) -> list[Measure]:
    rows = []
    for candidate, (reference,) in scored_pairs.pairs('slot_accuracy', candidates, references):
      expected, written = (collections.Counter(re.findall(self.pattern, text)) for text in (reference, candidate))
      rows.append([(expected & written).total(), expected.total()])
    return [Measure('slot_accuracy', np.float64(rows), ratio, 'higher', 'of:corpus')]


@dataclasses.dataclass(frozen=True)
class EditDistance:
  """Word and character error rates: edits over the length of the references, of all texts together.

  An edit inserts, deletes or replaces a symbol. Of several references, the one with the fewest edits for its length
  counts. Words are what white space separates, or the characters of scripts without spaces.
  """

  def __call__(self, candidates: Sequence[str], references: References | None) -> list[Measure]:
    return [Measure(name, self._rows(name, candidates, references, symbols), ratio, 'lower',
                    f'nrefs:{scored_pairs.count(references)}|multi:best')
            for name, symbols in (('word_error_rate', _words), ('character_error_rate', list))]

  def _rows(self, name: str, candidates: Sequence[str], references: References | None,
            symbols: Callable[[str], Sequence[Hashable]]) -> np.ndarray:
    rows = []
    for candidate, several in scored_pairs.pairs(name, candidates, references):
      options = [(edits(symbols(candidate), symbols(reference)), len(symbols(reference))) for reference in several]
      rows.append(min(options, key=lambda option: (option[0] / max(option[1], 1), -option[1])))
    return np.float64(rows)


def _words(text: str) -> list[str]:
  return [word for chunk in text.split() for word in (words.split(chunk) if not chunk.isascii() else [chunk])]


def edits(first: Sequence[Hashable], second: Sequence[Hashable]) -> int:
  """Returns the Levenshtein distance of two sequences.

  The columns of the table are bits of two integers (Myers 1999, as in Hyyrö 2001), which is fast for long sequences.
  """
  if not first or not second:
    return len(first) + len(second)
  places: dict[Hashable, int] = {}
  for i, symbol in enumerate(first):
    places[symbol] = places.get(symbol, 0) | 1 << i
  whole, last = (1 << len(first)) - 1, 1 << len(first) - 1
  increases, decreases, distance = whole, 0, len(first)   # of the distance, from each row of the column to the next
  for symbol in second:
    equal = places.get(symbol, 0)
    diagonal = (((equal & increases) + increases) ^ increases) | equal | decreases
    rise, fall = decreases | ~(diagonal | increases) & whole, increases & diagonal
    distance += bool(rise & last) - bool(fall & last)
    rise, fall = (rise << 1 | 1) & whole, fall << 1 & whole
    increases, decreases = fall | ~(diagonal | rise) & whole, rise & diagonal
  return distance


@dataclasses.dataclass(frozen=True)
class LengthRatio:
  """The words of all texts over the words of their references, of each the one that is nearest in length."""

  def __call__(self, candidates: Sequence[str], references: References | None) -> list[Measure]:
    rows = []
    for candidate, several in scored_pairs.pairs('length_ratio', candidates, references):
      length = len(words.split(candidate))
      lengths = (len(words.split(reference)) for reference in several)
      rows.append([length, min(lengths, key=lambda other: (abs(other - length), other))])
    return [Measure('length_ratio', np.float64(rows), ratio, '',
                    f'nrefs:{scored_pairs.count(references)}|multi:closest|tok:unicode')]
