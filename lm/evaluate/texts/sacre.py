"""BLEU, chrF and TER of a corpus, by the package sacrebleu (Post 2018, https://aclanthology.org/W18-6319).

The numbers and the signatures are those that sacrebleu prints. What each text adds to the sums gives the intervals.
"""
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from lm.data.text.source import require
from lm.evaluate.measures import Measure
from lm.evaluate.texts import scored_pairs, words
from lm.evaluate.texts.scored_pairs import References

Tokenizer = Literal['13a', 'intl', 'zh', 'ja-mecab', 'ko-mecab', 'char', 'flores200']
_BY_LANGUAGE = {'zh': 'zh', 'ja': 'ja-mecab', 'ko': 'ko-mecab'}


def _package() -> Any:
  return require('sacrebleu.metrics', 'eval')


def corpus_score(kind: Literal['BLEU', 'CHRF', 'TER'], order: int, sums: np.ndarray) -> np.ndarray:
  """Returns the score of sums of sacrebleu's statistics, [..., k] -> [...], as sacrebleu computes it from them.

  `order` is the word order of chrF; for BLEU it is 1 where the order is the effective one, and otherwise 0.
  """
  package = _package()
  metric = {'BLEU': lambda: package.BLEU(effective_order=bool(order)),
            'CHRF': lambda: package.CHRF(word_order=order), 'TER': package.TER}[kind]()
  scores = [metric._compute_score_from_stats(row.tolist()).score for row in sums.reshape(-1, sums.shape[-1])]
  return np.reshape(scores, sums.shape[:-1])


def _measure(name: str, metric: Any, better: Literal['higher', 'lower'], candidates: Sequence[str],
             references: References) -> Measure:
  """Returns the measure of a metric of sacrebleu."""
  # These members of sacrebleu's metrics are what its own significance tests use (sacrebleu/significance.py).
  rows = [metric._extract_corpus_statistics([candidate], [[reference] for reference in several])[0]
          for candidate, several in scored_pairs.pairs(name, candidates, references)]
  count = scored_pairs.count(references)
  metric.num_refs = -1 if count == 'var' else int(count)
  order = getattr(metric, 'word_order', 0) or int(getattr(metric, 'effective_order', False))
  value = functools.partial(corpus_score, type(metric).__name__, order)
  return Measure(name, np.asarray(rows, float), value, better, metric.get_signature().format())


@dataclasses.dataclass(frozen=True)
class Bleu:
  """Corpus BLEU, 0 to 100.

  Args:
    tokenize: one of sacrebleu's tokenizers; none for the one of the language.
    language: zh, ja or ko choose the tokenizer; none for the language of the references, by their script.
    lowercase: compare in lower case.
    effective_order: n-grams for which there are too few words do not count, as is usual for BLEU of single texts.
  """
  tokenize: Tokenizer | None = None
  language: str | None = None
  lowercase: bool = False
  effective_order: bool = False

  def check(self) -> None:
    """Raises ImportError, which says what to install, where a package is missing that these settings need."""
    self._metric(self.language)

  def __call__(self, candidates: Sequence[str], references: References | None) -> list[Measure]:
    scored_pairs.check('bleu', candidates, references)
    metric = self._metric(self.language or words.of_references(references))
    return [_measure('bleu', metric, 'higher', candidates, references)]

  def _metric(self, language: str | None) -> Any:
    """Returns sacrebleu's metric for a language."""
    tokenize = self.tokenize or _BY_LANGUAGE.get(language, '13a')
    try:
      return _package().BLEU(lowercase=self.lowercase, tokenize=tokenize, force=True,
                             effective_order=self.effective_order)
    except RuntimeError as error:
      if not tokenize.endswith('-mecab'):
        raise
      name, extra = ('Japanese', 'ja') if tokenize == 'ja-mecab' else ('Korean', 'ko')
      raise ImportError(f"BLEU of {name} text needs MeCab: pip install 'sacrebleu[{extra}]', or compare characters "
                        f'with tokenize=char ({str(error).strip().splitlines()[0]})') from None


@dataclasses.dataclass(frozen=True)
class Chrf:
  """chrF2 of characters, 0 to 100; chrF2++ with word_order=2.

  Args:
    word_order: n-grams of up to so many words count too.
    lowercase: compare in lower case.
  """
  word_order: int = 0
  lowercase: bool = False

  def check(self) -> None:
    """Raises ImportError, which says what to install, where the package is missing."""
    _package()

  def __call__(self, candidates: Sequence[str], references: References | None) -> list[Measure]:
    metric = _package().CHRF(word_order=self.word_order, lowercase=self.lowercase)
    return [_measure('chrf' + '+' * self.word_order, metric, 'higher', candidates, references)]


@dataclasses.dataclass(frozen=True)
class Ter:
  """Translation edit rate: edits, with moves of blocks, for 100 words of the references.

  Args:
    language: the characters of zh and ja are words; none for the language of the references, by their script.
    case_sensitive: whether capital letters differ from small ones.
  """
  language: str | None = None
  case_sensitive: bool = False

  def check(self) -> None:
    """Raises ImportError, which says what to install, where the package is missing."""
    _package()

  def __call__(self, candidates: Sequence[str], references: References | None) -> list[Measure]:
    scored_pairs.check('ter', candidates, references)
    asian = (self.language or words.of_references(references)) in ('zh', 'ja')
    metric = _package().TER(normalized=asian, asian_support=asian, case_sensitive=self.case_sensitive)
    return [_measure('ter', metric, 'lower', candidates, references)]
