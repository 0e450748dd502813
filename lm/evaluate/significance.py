"""Whether two systems differ, or chance explains the difference of their scores on the same documents.

Three answers, all of which need only what each document adds to the sums of a metric, so that they hold for corpus BLEU
as well as for means:

* the difference and its paired bootstrap interval: the same documents are drawn for both systems (Efron 1979; Koehn
  2004);
* the p-value of a paired permutation test: if the systems do not differ, the outputs of a document may be exchanged
  between them (Noreen 1989; Riezler and Maxwell 2005). All exchanges are enumerated where they are few; otherwise they
  are drawn at random;
* how many documents would show a difference of this size. A document's part in the difference is its jackknife
  pseudo-value: n d - (n - 1) d_i, where d is the difference over n documents, and d_i the one without document i. For a
  mean, that is the difference of the two scores of the document, and for a smooth function of sums its spread estimates
  the standard error (Efron and Stein 1981). So the count is that of a paired t-test of the pseudo-values.

The verdict follows the p-values, corrected for the number of comparisons by Holm's method (1979): with probability
`confidence`, no equal systems are told apart anywhere in a table. Intervals are of one comparison alone.
"""
import collections
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm import statistics
from lm.evaluate.measures import Measure

SAMPLES = 10_000   # random exchanges; as many or fewer possible ones are enumerated
MOST = 1_000_000   # documents needed, beyond which no count is given


class Comparison(NamedTuple):
  """A metric of a system against a baseline, on the same documents."""
  metric: str
  value: float                        # of the system
  baseline: float
  difference: statistics.Interval     # of the system minus the baseline
  p: float                            # of this comparison alone
  adjusted: float                     # p, corrected for the comparisons of a table
  deviation: float                    # of the parts of documents in the difference; nan for one document
  documents: int
  better: str                         # as in `Measure`
  confidence: float
  comparisons: int = 1
  signature: str = ''

  @property
  def word(self) -> str:
    """Returns 'better', 'worse', 'not distinguishable', or 'higher', 'lower' where neither is better."""
    if not self.adjusted <= 1 - self.confidence:   # nan too
      return 'not distinguishable'
    is_higher = self.difference.value > 0
    if not self.better:
      return 'higher' if is_higher else 'lower'
    return 'better' if is_higher == (self.better == 'higher') else 'worse'

  @property
  def needed(self) -> int | None:
    """How many documents would show this difference with probability 0.8; None where it is shown, or is none.

    The confidence is divided among the comparisons (Bonferroni), which is the strictest of Holm's steps. It is more
    than MOST where that many do not suffice.
    """
    difference = self.difference.value
    if self.word != 'not distinguishable' or not math.isfinite(self.deviation) or not difference:
      return None
    level = (1 - self.confidence) / self.comparisons
    needed = statistics.pairs_needed(difference, self.deviation, 1 - level, most=MOST)
    if needed is None:
      return MOST + 1
    least = math.ceil(1 + math.log2(1 / level))   # fewer have no two-sided permutation p-value this small
    return max(needed, least, self.documents + 1)

  def to_json(self) -> dict[str, Any]:
    """Returns the numbers and the verdict; null where a number is not finite."""
    numbers = {**self._asdict(), **self.difference._asdict(), 'needed': self.needed}
    del numbers['difference'], numbers['value']
    numbers = {'value': self.value, 'difference': self.difference.value, **numbers}
    return {**{name: None if isinstance(number, float) and not math.isfinite(number) else number
               for name, number in numbers.items()}, 'verdict': self.verdict}

  @property
  def verdict(self) -> str:
    if self.word != 'not distinguishable':
      return self.word
    if not math.isfinite(self.difference.value):
      return f'{self.word}; a value is not a finite number'
    if not self.difference.value:
      return f'{self.word}; the values are equal'
    if self.needed is None:
      return f'{self.word}; one document tells nothing about others'
    count = f'more than {MOST:,}' if self.needed > MOST else f'about {self.needed:,}'
    return f'{self.word}; a difference of this size would need {count} documents'


def compare(system: Measure, baseline: Measure, confidence: float = 0.95, samples: int = SAMPLES, seed: int = 0
            ) -> Comparison:
  """Compares two systems by a metric whose rows are of the same documents, in any order that both share.

  Raises ValueError where the measures are not of one metric, or not of the same number of documents.
  """
  if (system.name, system.better) != (baseline.name, baseline.better):
    raise ValueError(f'{system.name} and {baseline.name} are different metrics; compare two systems by the same one')
  if system.rows.shape != baseline.rows.shape or not len(system.rows):
    raise ValueError(f'{system.name} of one system is of {len(system.rows)} documents and of the other of '
                     f'{len(baseline.rows)}; pairs need the same documents, one at least')
  columns = system.rows.shape[1]
  rows = np.concatenate([system.rows, baseline.rows], 1).astype(float)
  rows = rows[np.lexsort(rows.T)]   # so that draws, and with them all numbers, do not depend on the order of documents

  def difference(sums: np.ndarray) -> np.ndarray:
    return system.value(sums[..., :columns]) - system.value(sums[..., columns:])

  sums = rows.sum(0)
  values = system.value(sums[:columns]), system.value(sums[columns:])
  p = _permutation(rows[:, :columns], rows[:, columns:], system.value, samples, seed)
  signature = system.signature
  if baseline.signature != signature:
    signature += f' against {baseline.signature}'
  return Comparison(system.name, *map(float, values), statistics.bootstrap(rows, difference, confidence, seed=seed),
                    p, p, _deviation(rows, difference), len(rows), system.better, confidence, signature=signature)


def _permutation(one: np.ndarray, other: np.ndarray, value: Callable[[np.ndarray], np.ndarray], samples: int,
                 seed: int) -> float:
  """Returns the two-sided p-value: how often exchanges give an absolute difference at least as large as the actual one.

  Exchanging equal rows changes nothing, so only the documents that differ are exchanged. Drawn exchanges count the
  actual assignment once more, so that the test is never too liberal (Phipson and Smyth 2010).
  """
  sums = np.stack([one.sum(0), other.sum(0)])
  exchanged = (other - one)[(other != one).any(1)]   # what exchanging a document adds to the first sums
  actual, count = value(sums), len(exchanged)
  if not np.isfinite(actual).all():
    return math.nan
  is_exact = count < 60 and 2 ** count <= samples
  total = 2 ** count if is_exact else samples
  rng, extreme = np.random.default_rng(seed), 0
  threshold = abs(actual[0] - actual[1]) - 1e-9 * np.abs(actual).max()   # equal but for rounding counts as equal
  chunk = max(1, min(total, 5_000_000 // max(count, 1)))
  for first in range(0, total, chunk):
    size = min(chunk, total - first)
    if is_exact:
      signs = np.arange(first, first + size)[:, None] >> np.arange(count) & 1
    else:
      signs = rng.integers(2, size=(size, count), dtype=np.int8)
    shift = signs.astype(float) @ exchanged
    differences = np.abs(value(sums[0] + shift) - value(sums[1] - shift))
    extreme += int(np.sum(~(differences < threshold)))   # a value that is not defined counts against the difference
  return extreme / total if is_exact else (extreme + 1) / (total + 1)


def _deviation(rows: np.ndarray, difference: Callable[[np.ndarray], np.ndarray]) -> float:
  """Returns the standard deviation of the jackknife pseudo-values of documents; nan if it is not defined."""
  if len(rows) < 2:
    return math.nan
  sums = rows.sum(0)
  return float(np.std((len(rows) - 1) * (difference(sums) - difference(sums - rows)), ddof=1))


def holm(p: Sequence[float]) -> np.ndarray:
  """Returns p-values corrected for their number by Holm's step-down method: none is below its p, and order is kept."""
  p = np.asarray(p, float)
  order = np.argsort(p)
  steps = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1))
  adjusted = np.empty(len(p))
  adjusted[order] = np.minimum(steps, 1)
  return adjusted


def compare_all(systems: Mapping[str, Mapping[str, Measure]], baseline: str, confidence: float = 0.95
                ) -> dict[str, list[Comparison]]:
  """Compares each system with a baseline by each metric that both have, corrected over all comparisons.

  `systems` has measures by name, by system. Raises ValueError as `compare`, and where there is nothing to compare.
  """
  comparisons = {name: [compare(measures[metric], systems[baseline][metric], confidence)
                        for metric in systems[baseline] if metric in measures]
                 for name, measures in systems.items() if name != baseline}
  ps = [comparison.p for ones in comparisons.values() for comparison in ones]
  if not ps:
    raise ValueError(f'there is nothing to compare {baseline} with: no other system has a metric that it has')
  adjusted = iter(holm(ps).tolist())
  return {name: [comparison._replace(adjusted=next(adjusted), comparisons=len(ps)) for comparison in ones]
          for name, ones in comparisons.items()}


def table(comparisons: Mapping[str, Sequence[Comparison]], baseline: str) -> str:
  """Returns a table of comparisons with a baseline, and in words below it what is compared and corrected."""
  ones = [(name, comparison) for name, several in comparisons.items() for comparison in several]
  header = ('metric', 'system', 'value', baseline, 'difference', 'interval', 'p', 'corrected', 'verdict')
  cells = [(one.metric, name, _number(one.value), _number(one.baseline), _number(one.difference.value, '+'),
            f'[{_number(one.difference.low, "+")}, {_number(one.difference.high, "+")}]', f'{one.p:.4f}',
            f'{one.adjusted:.4f}', one.verdict) for name, one in ones]
  widths = [max(map(len, column)) for column in zip(header, *cells)]
  lines = ['  '.join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header, *cells]]
  first, plural = ones[0][1], 's' if len(ones) > 1 else ''
  lines += ['', f'Differences are of the system minus {baseline}. Intervals ({100 * first.confidence:g} %) are by '
            'paired bootstrap over documents, each of one comparison alone; p is of a paired permutation test. The '
            f"verdict follows p corrected for {len(ones)} comparison{plural} (Holm)."]
  metrics = collections.defaultdict(dict)   # names of metrics, each once, by what is said of them
  for _, one in ones:
    metrics[f'{one.documents:,} documents, {one.signature or "no settings"}'][one.metric] = None
  lines += [f'{", ".join(names)}: {text}' for text, names in metrics.items()]
  return '\n'.join(lines)


def _number(value: float, sign: str = '-') -> str:
  return f'{value:{sign},.0f}' if abs(value) >= 10_000 else f'{value:{sign}.4f}'
