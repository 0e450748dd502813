"""ROUGE by the package rouge-score: recall of the references' n-grams and longest common subsequences (Lin 2004)."""
import dataclasses
import importlib.metadata
from collections.abc import Sequence
from typing import Any

import numpy as np

from lm.data.text.source import require
from lm.evaluate import measures
from lm.evaluate.measures import Measure
from lm.evaluate.texts import scored_pairs, words
from lm.evaluate.texts.scored_pairs import References

KINDS = ('rouge1', 'rouge2', 'rougeL', 'rougeLsum')


def _modules() -> tuple[Any, Any]:
  return require('rouge_score.rouge_scorer', 'eval'), require('rouge_score.tokenizers', 'eval')


class _Words:
  """A tokenizer of rouge-score for any script; its own drops all that is not ASCII, so that Chinese text scores 0."""

  def __init__(self, stemmer: Any):
    self._stemmer = stemmer

  def tokenize(self, text: str) -> list[str]:
    tokens = [word for word in words.split(text.lower()) if word[0].isalnum()]
    if self._stemmer is None:
      return tokens
    return [self._stemmer.stem(token) if len(token) > 3 and token.isascii() else token for token in tokens]


@dataclasses.dataclass(frozen=True)
class Rouge:
  """The means over texts of ROUGE-1, -2, -L and -Lsum, 0 to 1: the F-measure, and precision and recall.

  Of several references, the one with the best F-measure counts. Lsum takes lines as sentences, and is the union over
  them. English is cut into words as rouge-score does; text in other letters into words of any script, of which each
  character of Chinese and Japanese is one.

  Args:
    stem: compare English words without their endings, by Porter's stemmer, as is usual for summaries.
    language: en for the words of rouge-score, another for words of any script; none for that of the references.
  """
  stem: bool = False
  language: str | None = None

  def check(self) -> None:
    """Raises ImportError, which says what to install, where the package is missing."""
    _modules()

  def __call__(self, candidates: Sequence[str], references: References | None) -> list[Measure]:
    scored_pairs.check('rouge', candidates, references)
    scorers, tokenizers = _modules()
    ascii_letters = (self.language or words.of_references(references)) == 'en'
    stemmer = tokenizers.porter.PorterStemmer() if self.stem else None
    tokenizer = tokenizers.DefaultTokenizer(self.stem) if ascii_letters else _Words(stemmer)
    scorer = scorers.RougeScorer(KINDS, tokenizer=tokenizer)
    scores = []
    for candidate, several in scored_pairs.pairs('rouge', candidates, references):
      best = scorer.score_multi(several, candidate)
      scores.append([(best[kind].fmeasure, best[kind].precision, best[kind].recall) for kind in KINDS])
    signature = (f'nrefs:{scored_pairs.count(references)}|stem:{"yes" if self.stem else "no"}|'
                 f'tok:{"rouge-score" if ascii_letters else "unicode"}|multi:best|'
                 f'version:{importlib.metadata.version("rouge-score")}')
    return [measures.mean(kind + part, column, 'higher', signature)
            for kind, of_kind in zip(KINDS, np.moveaxis(np.float64(scores), 0, 2))
            for part, column in zip(('', '_precision', '_recall'), of_kind)]
