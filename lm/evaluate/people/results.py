"""What the votes of a study say: ratings of systems, agreement of raters, how many votes are still needed.

Every number that is a function of sums over items has its bootstrap interval over items, since votes on one item are
not independent. Attention checks count for raters alone.
"""
import collections
import functools
import itertools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from lm import statistics
from lm.evaluate import measures
from lm.evaluate.people import agreement, answers, ratings
from lm.evaluate.people.study import Study, questions
from lm.evaluate.people.vote_store import Vote, VoteStore

Cell = str | int | statistics.Interval | None


class Table(NamedTuple):
  """Rows of cells, the first of which is a name; `digits` are the decimals of intervals."""
  title: str
  columns: tuple[str, ...]
  rows: list[tuple[Cell, ...]]
  digits: int = 2


class Results(NamedTuple):
  sentences: list[str]
  tables: list[Table]


def summarise(store: VoteStore, without: Collection[int] = ()) -> Results:
  """Returns the results of a study so far; `without` are raters whose votes are left out."""
  study, votes = store.study, [vote for vote in store.votes() if vote.rater not in without]
  judged = [vote for vote in votes if not vote.task.check]
  planned = sum(len(tasks) for rater, tasks in store.tasks.items() if rater not in without)
  sentences = [f'{len(votes):,} of {planned:,} answers are in, {len(votes) - len(judged)} of them to attention checks, '
               'which count for no rating.']
  if equal := _equal_pairs(study):
    sentences.append(f'{equal:,} pairs of equal texts were not shown, and count for no rating.')
  if without:
    sentences.append(f'Left out: rater {", ".join(map(str, sorted(without)))}.')
  tables = []
  if judged:
    of_mode = {'pairwise': _pairwise, 'best_worst': _best_worst, 'likert': _likert}[study.mode]
    for part in of_mode(study, judged), _agreement(study, judged):
      sentences += part.sentences
      tables += part.tables
  return Results(sentences, [*tables, _raters(store)])


def _equal_pairs(study: Study) -> int:
  """Returns how many pairs of systems are not compared on an item, in mode pairwise, as their texts are equal."""
  pairs = len(study.items) * math.comb(len(study.systems), 2)
  return pairs - len(questions(study)) if study.mode == 'pairwise' else 0


def _pairwise(study: Study, votes: Sequence[Vote]) -> Results:
  names, count = study.systems, len(study.systems)
  wins = np.zeros((len(study.items), count, count))
  ties, first_won = np.zeros((count, count), int), np.zeros((len(study.items), 2))
  for vote in votes:
    one, other = (names.index(system) for system in vote.task.shown)
    if vote.answer['choice'] == 'tie':
      wins[vote.task.item, [one, other], [other, one]] += 0.5
      ties[[one, other], [other, one]] += 1
      continue
    winner, loser = (one, other) if vote.answer['choice'] == 0 else (other, one)
    wins[vote.task.item, winner, loser] += 1
    first_won[vote.task.item] += vote.answer['choice'] == 0, 1
  wins = wins[wins.any((1, 2))]
  total, flat = wins.sum(0), wins.reshape(len(wins), -1)
  square = lambda sums: sums.reshape(*sums.shape[:-1], count, count)
  shares = lambda sums: measures.ratio(np.stack([square(sums), square(sums) + square(sums).swapaxes(-1, -2)], -1)
                                       ).reshape(sums.shape)
  rated = statistics.bootstrap_each(flat, lambda sums: ratings.scaled(ratings.bradley_terry(square(sums))))
  matrix = np.array(statistics.bootstrap_each(flat, shares), object).reshape(count, count, 3)
  tied = ties.sum(1)
  won, lost = (total - ties / 2).sum(1).astype(int), (total - ties / 2).sum(0).astype(int)
  order = sorted(range(count), key=lambda i: -np.nan_to_num(rated[i].value, nan=-np.inf))
  table = Table('Bradley-Terry ratings', ('system', 'rating', 'won', 'tied', 'lost'),
                [(names[i], _if_defined(rated[i]), won[i], tied[i], lost[i]) for i in order], 0)
  cell = lambda i, j: None if i == j or not total[i, j] + total[j, i] else statistics.Interval(*matrix[i, j])
  against = Table('Win rates of the row against the column, ties as half a win', ('system', *(names[j] for j in order)),
                  [(names[i], *(cell(i, j) for j in order)) for i in order])
  caution = ratings.caution(total, names)
  sentences = [caution] if caution else []
  if not caution.startswith('No ratings'):
    best, second = order[:2]
    both = wins[:, best, second] + wins[:, second, best]
    differences = (wins[:, best, second] - wins[:, second, best])[both > 0] / both[both > 0]
    sentences.insert(0, verdict(names[best], names[second], differences, both.sum(), 'win rates'))
  if first_won.sum():
    side = statistics.bootstrap(first_won[first_won[:, 1] > 0], measures.ratio)
    sentences.append(f'The first text, on the left, won {_shown(side)} of the comparisons that were no tie; 0.50 is no '
                     'preference for a side.')
  return Results(sentences, [table, against])


def _best_worst(study: Study, votes: Sequence[Vote]) -> Results:
  names = study.systems
  counts = np.zeros((len(study.items), len(names), 3))   # best, worst, shown
  for vote in votes:
    for position, system in enumerate(vote.task.shown):
      chosen = (vote.answer['best'] == position, vote.answer['worst'] == position, 1)
      counts[vote.task.item, names.index(system)] += chosen
  rows = np.stack([counts[..., 0] - counts[..., 1], counts[..., 2]], -1)
  best, worst, _ = counts.sum(0).astype(int).T
  scores = _ratios(rows)
  order = sorted(range(len(names)), key=lambda i: -scores[i].value)
  table = Table('Best-worst scores: how often best less how often worst, from -1 to 1',
                ('system', 'score', 'best', 'worst'), [(names[i], scores[i], best[i], worst[i]) for i in order])
  return Results([_first_two(names, order, rows, len(votes), 'scores')], [table])


def _likert(study: Study, votes: Sequence[Vote]) -> Results:
  names, criteria = study.systems, study.criteria
  rows = np.zeros((len(study.items), len(names), len(criteria), 2))
  for vote in votes:
    for system, scores in zip(vote.task.shown, vote.answer['ratings']):
      rows[vote.task.item, names.index(system)] += np.stack([scores, np.ones(len(criteria))], -1)
  means = [_ratios(rows[:, :, c]) for c in range(len(criteria))]
  sentences = []
  for criterion, mean, of_criterion in zip(criteria, means, np.moveaxis(rows, 2, 0)):
    order = sorted(range(len(names)), key=lambda i: -mean[i].value)
    if len(names) > 1:
      sentences.append(f'{criterion}: {_first_two(names, order, of_criterion, len(votes), "mean ratings")}')
  order = sorted(range(len(names)), key=lambda i: -sum(mean[i].value for mean in means))
  table = Table(f'Mean ratings, from 1 to {study.scale}', ('system', *criteria),
                [(names[i], *(mean[i] for mean in means)) for i in order])
  return Results(sentences, [table])


def _ratios(rows: np.ndarray) -> list[statistics.Interval]:
  """Returns the ratio of two sums for each system; rows are [items, systems, 2]."""
  rows = rows[rows[..., 1].any(1)]
  return statistics.bootstrap_each(rows.reshape(len(rows), -1),
                                   lambda sums: measures.ratio(sums.reshape(*sums.shape[:-1], -1, 2)))


def _first_two(names: Sequence[str], order: Sequence[int], rows: np.ndarray, votes: int, what: str) -> str:
  of_items = measures.ratio(rows)
  differences = of_items[:, order[0]] - of_items[:, order[1]]
  return verdict(names[order[0]], names[order[1]], differences[~np.isnan(differences)], votes, what)


def verdict(first: str, second: str, differences: np.ndarray, votes: float, what: str) -> str:
  """Returns whether the first system is better than the second, in words, and how many items would tell if not.

  `differences` are those of items, [items], which `votes` votes were given on.
  """
  count = len(differences)
  if not count:
    return f'{first} and {second} come first, and were never compared with each other.'
  interval, deviation = statistics.interval(differences), float(np.std(differences, ddof=1)) if count > 1 else np.nan
  shown = f'difference of {what} {_shown(interval)} over {count:,} item{"s" if count > 1 else ""}'
  unanimous = count > 1 and deviation == 0
  if unanimous and count < 6 and interval.value:   # by the sign test, five equal signs are no evidence at 95 %
    return f'{first} and {second} are not distinguishable yet: {shown}, all equal; at least 6 items are needed.'
  judged = statistics.Verdict(interval, deviation, 0.95, 'items')
  if judged.word != 'not distinguishable':
    if interval.value < 0:   # the overall order, which other systems have a part in, is not that of the two
      return f'{second} is better than {first} where the two are compared, although {first} comes first: {shown}.'
    return f'{first} is better than {second}: {shown}. More votes are not needed for that.'
  if judged.needed is None:
    why = 'no difference is seen so far' if count > 1 else 'one item says nothing'
    return f'{first} and {second} are not distinguishable: {shown}; {why}.'
  further = max(1, judged.needed - count)
  return (f'{first} and {second} are not distinguishable: {shown}. A difference of this size would need about '
          f'{judged.needed:,} items, {further:,} more than now, or {round(further * votes / count):,} more votes.')


def _agreement(study: Study, votes: Sequence[Vote]) -> Results:
  """Krippendorff's alpha of all raters, and Cohen's kappa of each two who judged the same."""
  level, weights = ('ordinal', 'quadratic') if study.mode == 'likert' else ('nominal', 'equal')
  rows: list[tuple[Cell, ...]] = []
  for aspect, units in _judgements(study, votes).items():
    raters = sorted({rater for unit in units.values() for rater in unit})
    values = np.array([[unit.get(rater, np.nan) for unit in units.values()] for rater in raters])
    items = [item for item, _ in units]
    coincidences, categories = agreement.coincidences(values)
    judged_twice = int(((~np.isnan(values)).sum(0) > 1).sum())
    rows.append((f'{aspect}: all', judged_twice, _interval_by_item(
        coincidences, items, functools.partial(agreement.alpha, categories=categories, level=level)), None))
    for one, other in itertools.combinations(range(len(raters)), 2):
      common = ~np.isnan(values[[one, other]]).any(0)
      if common.any():
        table = agreement.confusions(values[one, common], values[other, common])
        rows.append((f'{aspect}: {raters[one]} and {raters[other]}', int(common.sum()), None, _interval_by_item(
            table, np.array(items)[common], functools.partial(agreement.kappa, weights=weights))))
  columns = ('raters', 'judged twice', f"Krippendorff's alpha, {level}", f"Cohen's kappa, {weights} weights")
  return Results([], [Table('Agreement: 1 is perfect, 0 is that of chance', columns, rows)])


def _judgements(study: Study, votes: Sequence[Vote]) -> dict[str, dict[tuple[int, Any], dict[int, float]]]:
  """Returns the values that raters gave: by aspect, by unit (item, what of it is judged), by rater."""
  judgements: dict[str, dict] = collections.defaultdict(lambda: collections.defaultdict(dict))
  for vote in votes:
    item, shown = vote.task.item, vote.task.shown
    match vote.answer:
      case {'choice': choice}:
        pair = tuple(sorted(shown))
        judgements['preference'][item, pair][vote.rater] = 2 if choice == 'tie' else pair.index(shown[choice])
      case {'best': best, 'worst': worst}:
        for aspect, position in ('best', best), ('worst', worst):
          judgements[aspect][item, ''][vote.rater] = study.systems.index(shown[position])
      case {'ratings': scores}:
        for system, of_system in zip(shown, scores):
          for criterion, value in zip(study.criteria, of_system):
            judgements[criterion][item, system][vote.rater] = value
  return judgements


def _interval_by_item(rows: np.ndarray, items: Sequence[int], value: Callable[[np.ndarray], np.ndarray]
                      ) -> Cell:
  """Returns the interval over items of a function of summed matrices [C, C]; rows are those of units, [units, C, C].

  None without judgements. Agreement is not defined where all judgements are the same; the text says so.
  """
  if not rows.any():
    return None
  _, of_unit = np.unique(items, return_inverse=True)
  sums = np.zeros((of_unit.max() + 1, *rows.shape[1:]))
  np.add.at(sums, of_unit, rows)
  flat, categories = sums.reshape(len(sums), -1), rows.shape[-1]
  interval = statistics.bootstrap(flat, lambda sums: value(sums.reshape(*sums.shape[:-1], categories, categories)))
  return 'all the same' if np.isnan(interval.value) else interval


def _raters(store: VoteStore) -> Table:
  """How far each rater is, how fast, and how many attention checks they failed."""
  votes: Mapping[int, dict[int, Vote]] = {rater: {} for rater in store.raters}
  for vote in store.votes():
    votes[vote.rater][vote.number] = vote
  rows = []
  for rater, own in votes.items():
    failures = collections.defaultdict(list)
    for vote in own.values():
      if vote.task.check:
        first = own.get(vote.task.repeats)
        failures[vote.task.check].append(answers.fails(store.study, vote.task, vote.answer, first and first.answer))
    failed = []
    for check in ('scrambled', 'repeat'):
      outcomes = [failure for failure in failures[check] if failure is not None]
      failed.append(f'{sum(outcomes)} of {len(outcomes)}' if outcomes else '')
    seconds = [vote.seconds for vote in own.values() if vote.seconds is not None]
    rows.append((f'rater {rater}', f'{len(own)} of {len(store.tasks[rater])}',
                 f'{np.median(seconds):.0f}' if seconds else '', *failed))
  columns = ('rater', 'answers', 'median seconds', 'failed scrambled', 'failed repeated')
  return Table('Raters', columns, rows)


def _if_defined(interval: statistics.Interval) -> statistics.Interval | None:
  return None if np.isnan(interval.value) else interval


def _shown(interval: statistics.Interval) -> str:
  limits = f' [{interval.low:.2f}, {interval.high:.2f}]' if np.isfinite(interval.low) else ''   # of one item, none
  return f'{interval.value:.2f}{limits}'
