"""Which metrics score texts, by name: what flags and suites of evaluations say."""
import dataclasses
import difflib
from collections.abc import Sequence
from typing import Any

from lm.evaluate.measures import Measure
from lm.evaluate.texts import words
from lm.evaluate.texts.diversity import Distinct, Repetition, SelfBleu
from lm.evaluate.texts.exact import EditDistance, ExactMatch, LengthRatio
from lm.evaluate.texts.rouge import Rouge
from lm.evaluate.texts.sacre import Bleu, Chrf, Ter, Tokenizer
from lm.evaluate.texts.scored_pairs import References

WITHOUT_REFERENCES = ('distinct', 'repetition', 'self_bleu')
NAMES = ('bleu', 'chrf', 'chrf++', 'ter', 'rouge', 'exact_match', 'edit_distance', 'length_ratio', *WITHOUT_REFERENCES)
# The settings of each metric that has some.
_SETTINGS = {'bleu': ('tokenize', 'language', 'lowercase'), 'chrf': ('lowercase',), 'chrf++': ('lowercase',),
             'ter': ('language',), 'rouge': ('stem', 'language'), 'exact_match': ('squad',), 'self_bleu': ('seed',)}


def check_names(names: Sequence[str]) -> None:
  """Raises ValueError, which names the nearest, where a name is of no metric, is there twice, or none is given."""
  for i, name in enumerate(names):
    if name not in NAMES:
      nearest = difflib.get_close_matches(name, NAMES, n=1, cutoff=0)[0]
      raise ValueError(f'metrics has {name!r}, which is none; the nearest is {nearest!r}, and all are '
                       f'{", ".join(NAMES)}')
    if name in names[:i]:
      raise ValueError(f'metrics has {name!r} twice')
  if not names:
    raise ValueError(f'metrics is empty; give some of {", ".join(NAMES)}')


@dataclasses.dataclass(frozen=True)
class Settings:
  """Settings of the metrics.

  Args:
    language: of the texts, such as en, zh or ja; none for what the script of the references tells.
    tokenize: the tokenizer of BLEU; none for that of the language.
    lowercase: BLEU and chrF compare in lower case.
    stem: ROUGE compares English words without their endings.
    squad: exact match is without case, punctuation and articles.
    seed: of the texts that self-BLEU draws from more than 1,000.
  """
  language: str | None = None
  tokenize: Tokenizer | None = None
  lowercase: bool = False
  stem: bool = False
  squad: bool = False
  seed: int = 0

  def check(self, names: Sequence[str]) -> None:
    """Raises ValueError where a setting is given and none of the metrics has it."""
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      users = [name for name, settings in _SETTINGS.items() if field.name in settings]
      if value != field.default and not set(users) & set(names):
        raise ValueError(f'{field.name}={value} is for {", ".join(users)}, and metrics has none of these; add one, or '
                         f'leave out {field.name}')

  def check_packages(self, names: Sequence[str]) -> None:
    """Raises ImportError, which says what to install, where a package of a metric is missing."""
    for metric in map(self._metric, names):
      if isinstance(metric, Bleu | Chrf | Ter | Rouge):   # the others need none
        metric.check()

  def scores(self, name: str, candidates: Sequence[str], references: References | None) -> list[Measure]:
    """Returns the measures of the metric of this name, one of NAMES."""
    return self._metric(name)(candidates, references)

  def _metric(self, name: str) -> Any:
    match name:
      case 'bleu':
        return Bleu(self.tokenize, self.language, self.lowercase)
      case 'chrf' | 'chrf++':
        return Chrf(2 if name == 'chrf++' else 0, self.lowercase)
      case 'ter':
        return Ter(self.language)
      case 'rouge':
        return Rouge(self.stem, self.language)
      case 'exact_match':
        return ExactMatch(self.squad)
      case 'self_bleu':
        return SelfBleu(seed=self.seed)
    return {'edit_distance': EditDistance, 'length_ratio': LengthRatio, 'distinct': Distinct,
            'repetition': Repetition}[name]()

  def note(self, references: References) -> str | None:
    """Returns a line that says which language the script of the references tells, where it changes the metrics."""
    language = words.of_references(references)
    if self.language is not None or language == 'en':
      return None
    name = {'zh': 'Chinese', 'ja': 'Japanese', 'ko': 'Korean'}.get(language, 'in letters other than ASCII')
    return (f'the references are {name}, by their script: BLEU, TER and ROUGE take words accordingly; give the '
            'language if that is wrong')
