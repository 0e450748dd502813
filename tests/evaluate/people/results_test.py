"""Results say what was voted: ratings, verdicts and agreement of known votes; checks count for no rating."""
import csv
import io
import math
import re

import numpy as np
import pytest
from helpers import human_studies

from lm import statistics
from lm.evaluate import people
from lm.evaluate.people import agreement, exports, ratings, results

ORDER = ('alpha', 'beta', 'gamma')


def table(summary, start):
  match, = (table for table in summary.tables if table.title.startswith(start))
  return {name: dict(zip(match.columns[1:], cells)) for name, *cells in match.rows}


def voted(store, rule):
  """Answers all tasks of all raters, and returns the results."""
  for rater in store.raters:
    human_studies.answer_all(store, rater, rule)
  return people.summarise(store)


def noisy(share, seed=0):
  """A rule: by `ORDER`, or, for a share of questions, the other way round or a tie."""
  rng = np.random.default_rng(seed)

  def answer(study, task):
    if task.check or rng.random() > share:
      return human_studies.preferred(ORDER)(study, task)
    if study.mode == 'pairwise' and rng.random() < 0.5:
      return {'choice': 'tie'}
    return human_studies.preferred(ORDER[::-1])(study, task)
  return answer


def test_pairwise_ratings_and_win_rates_are_those_of_the_votes(tmp_path):
  store = human_studies.new_study(tmp_path, ORDER, items=8, raters=2)
  summary = voted(store, noisy(0.5))
  wins = np.zeros((3, 3))
  for vote in store.votes():   # by the exported votes, one by one
    if not vote.task.check:
      first, second = (ORDER.index(system) for system in vote.task.shown)
      score = {0: 1, 1: 0, 'tie': 0.5}[vote.answer['choice']]
      wins[first, second] += score
      wins[second, first] += 1 - score
  assert wins.sum() == 2 * 8 * 3
  expected = ratings.scaled(ratings.bradley_terry(wins))
  rated, against = table(summary, 'Bradley-Terry'), table(summary, 'Win rates')
  for i, system in enumerate(ORDER):
    rating = rated[system]['rating']
    assert rating.value == pytest.approx(expected[i]) and rating.low < rating.value < rating.high
    assert rated[system]['won'] + rated[system]['tied'] / 2 == wins[i].sum()
    for j, other in enumerate(ORDER):
      if i == j:
        assert against[system][other] is None
      else:
        assert against[system][other].value == pytest.approx(wins[i, j] / (wins[i, j] + wins[j, i]))
        assert against[system][other].low == pytest.approx(1 - against[other][system].high)
  assert list(rated) == sorted(ORDER, key=lambda system: -rated[system]['rating'].value)


def test_answers_to_attention_checks_change_no_rating_and_failures_are_counted(tmp_path):
  (tmp_path / 'good').mkdir()
  (tmp_path / 'bad').mkdir()
  good, bad = (human_studies.new_study(tmp_path / name, ('alpha', 'beta')) for name in ('good', 'bad'))
  rule = human_studies.preferred(ORDER)

  def careless(study, task):
    answer = rule(study, task)
    return {'choice': 1 - answer['choice']} if task.check else answer
  summaries = voted(good, rule), voted(bad, careless)
  assert table(summaries[0], 'Bradley') == table(summaries[1], 'Bradley')
  assert table(summaries[0], 'Win rates') == table(summaries[1], 'Win rates')
  for summary, failed in zip(summaries, ('0 of 2', '2 of 2')):
    assert table(summary, 'Raters')['rater 1'] == {
        'answers': '10 of 10', 'median seconds': '2', 'failed scrambled': failed, 'failed repeated': failed}


def test_best_worst_scores_are_the_shares_of_best_less_worst(tmp_path):
  store = human_studies.new_study(tmp_path, ORDER, mode='best_worst', items=8)
  scores = table(voted(store, human_studies.preferred(ORDER)), 'Best-worst')
  assert {system: scores[system]['score'].value for system in ORDER} == {'alpha': 1, 'beta': 0, 'gamma': -1}
  assert (scores['alpha']['best'], scores['alpha']['worst'], scores['gamma']['worst']) == (16, 0, 16)


def test_likert_means_and_agreement_are_those_of_the_exported_votes(tmp_path):
  store = human_studies.new_study(tmp_path, ORDER, mode='likert', criteria=('fluency', 'relevance'), items=8, raters=3,
                                  votes_per_item=2)
  rng = np.random.default_rng(0)
  summary = voted(store, lambda study, task: {'ratings': rng.integers(1, 6, (3, 2)).tolist()})
  rows = [row for row in csv.DictReader(io.StringIO(people.votes_csv(store))) if not row['check']]
  assert len(rows) == 8 * 2 * 3
  means = table(summary, 'Mean ratings')
  for criterion in ('fluency', 'relevance'):
    for system in ORDER:
      values = [float(row[criterion]) for row in rows if row['system'] == system]
      assert means[system][criterion].value == pytest.approx(np.mean(values))
      by_item = [np.mean([float(row[criterion]) for row in rows if (row['system'], row['item']) == (system, f'i{i}')])
                 for i in range(8)]   # two votes each, so that items weigh the same
      expected = statistics.bootstrap(np.stack([by_item, np.ones(8)], 1), lambda sums: sums[..., 0] / sums[..., 1])
      assert means[system][criterion] == pytest.approx(expected)
    units = sorted({(row['item'], row['system']) for row in rows})
    values = np.full((3, len(units)), np.nan)
    for row in rows:
      values[int(row['rater']) - 1, units.index((row['item'], row['system']))] = float(row[criterion])
    agreed = table(summary, 'Agreement')
    assert agreed[f'{criterion}: all']["Krippendorff's alpha, ordinal"].value == pytest.approx(
        agreement.krippendorff_alpha(values, 'ordinal'))
    both = ~np.isnan(values[:2]).any(0)
    assert agreed[f'{criterion}: 1 and 2']['judged twice'] == both.sum()
    assert agreed[f'{criterion}: 1 and 2']["Cohen's kappa, quadratic weights"].value == pytest.approx(
        agreement.cohen_kappa(values[0, both], values[1, both], 'quadratic'))


def test_raters_who_always_agree_have_an_alpha_of_one_and_where_nothing_differs_it_is_not_defined(tmp_path):
  store = human_studies.new_study(tmp_path, ORDER, items=8)
  agreed = table(voted(store, human_studies.preferred(ORDER)), 'Agreement')['preference: all']
  assert agreed["Krippendorff's alpha, nominal"] == 'all the same'   # the first of the pair always won
  (tmp_path / 'both').mkdir()
  store = human_studies.new_study(tmp_path / 'both', ORDER, items=8)
  agreed = table(voted(store, lambda study, task: {'choice': task.shown.index(max(task.shown) if task.item % 2 else
                                                                              min(task.shown))}), 'Agreement')
  assert agreed['preference: all']["Krippendorff's alpha, nominal"].value == 1
  assert agreed['preference: 1 and 2']["Cohen's kappa, equal weights"].value == 1


@pytest.mark.parametrize('differences,words', [
    ([1., 1, 1], 'not distinguishable yet: .* over 3 items, all equal; at least 6 items are needed'),
    ([1.] * 6, 'a is better than b: difference of win rates 1.00 .1.00, 1.00. over 6 items. More votes are not needed'),
    ([1., -1, 1, 1, -1, 1], 'not distinguishable: .* would need about [0-9]+ items, [0-9]+ more than now, or'),
    ([-1., -1, -1, -1, 0, -1, -1], 'b is better than a where the two are compared, although a comes first'),
    ([1., -1], 'no difference is seen so far'), ([0., 0, 0], 'no difference is seen so far'),
    ([1.], 'over 1 item; one item says nothing'), ([], 'were never compared with each other')])
def test_the_verdict_says_whether_more_votes_are_needed(differences, words):
  assert re.search(words, results.verdict('a', 'b', np.array(differences), 2 * len(differences), 'win rates'))


def test_so_many_items_as_the_verdict_says_show_the_difference_in_four_of_five_studies():
  rng = np.random.default_rng(0)
  draw = lambda items: rng.choice([1., -1, 0], p=[0.45, 0.25, 0.3], size=items)
  differences = draw(100_000)
  needed = statistics.pairs_needed(differences.mean(), differences.std())
  shown = np.mean(['is better' in results.verdict('a', 'b', draw(needed), needed, 'x') for _ in range(500)])
  assert abs(shown - 0.8) < 3 * math.sqrt(0.8 * 0.2 / 500)
  text = results.verdict('a', 'b', np.tile([1., -1, 1, 0], 8), 64, 'win rates')
  count = statistics.pairs_needed(0.25, np.std(np.tile([1., -1, 1, 0], 8), ddof=1))
  assert f'would need about {count} items, {count - 32} more than now, or {2 * (count - 32)} more votes' in text


def test_a_study_without_votes_and_one_with_a_single_vote_have_results(tmp_path):
  store = human_studies.new_study(tmp_path)
  assert [table.title for table in people.summarise(store).tables] == ['Raters']
  number = next(number for number, task in enumerate(store.tasks[1]) if not task.check)
  store.add('vote-one', 1, number, {'choice': 0})
  summary = people.summarise(store)
  assert 'one item says nothing' in summary.sentences[1] and 'infinite' in summary.sentences[2]
  cell = exports.as_json(summary)['tables'][0]['rows'][0][1]
  assert cell['low'] is None and cell['high'] is None and cell['value'] > 1000
  assert 'Bradley-Terry ratings' in people.as_text(summary)


def test_a_text_on_the_left_that_always_wins_is_noticed(tmp_path):
  store = human_studies.new_study(tmp_path, items=8)
  summary = voted(store, lambda study, task: {'choice': 0})
  assert any('on the left, won 1.00 [1.00, 1.00] of' in sentence for sentence in summary.sentences)


def test_exports_have_a_row_for_each_vote_and_number_and_no_formulas(tmp_path):
  store = human_studies.new_study(tmp_path, checks=0)
  store.add('vote-one', 1, 0, {'choice': 'tie'}, '=HYPERLINK("x")', 2.5)
  store.add('vote-two', 1, 1, {'choice': 1}, 'first line\nsecond, "quoted"')
  first, second = csv.DictReader(io.StringIO(people.votes_csv(store)))
  assert (first['preferred'], first['comment'], first['seconds']) == ('tie', '\'=HYPERLINK("x")', '2.5')
  assert second['preferred'] == second['shown'].split('|')[1] and second['comment'] == 'first line\nsecond, "quoted"'
  summary = people.summarise(store)
  rows = list(csv.DictReader(io.StringIO(people.results_csv(summary))))
  assert len(rows) == sum(len(table.rows) * (len(table.columns) - 1) for table in summary.tables)
