"""Tasks of raters are shared evenly, blind, balanced and reproducible; attention checks are what they say."""
import collections

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lm.evaluate.people import answers, study
from lm.evaluate.people.study import Study, Task
from lm.evaluate.people.system_outputs import Item

TEXT = 'one two three four five six seven eight'


def make(items=12, systems=3, **settings):
  names = tuple('abcdefgh'[:systems])
  return Study(names, tuple(Item(str(i), '', tuple(f'{name}{i} {TEXT}' for name in names)) for i in range(items)),
               **settings)


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 5))
def test_each_question_goes_to_as_many_raters_as_asked_for_and_all_have_as_much_to_do(raters, votes, seed):
  votes = min(raters, votes)
  a_study = make(seed=seed, checks=0)
  tasks = study.assign(a_study, raters, votes, {})
  counts = collections.Counter((task.item, frozenset(task.shown)) for own in tasks.values() for task in own)
  assert len(counts) == 12 * 3 and set(counts.values()) == {votes}
  loads = [len(own) for own in tasks.values()]
  assert max(loads) - min(loads) <= 1
  assert all(len({(task.item, frozenset(task.shown)) for task in own}) == len(own) for own in tasks.values())


def test_orders_depend_on_seed_and_rater_alone():
  tasks = study.assign(make(), 2, 2, {})
  assert tasks == study.assign(make(), 2, 2, {})
  assert tasks[1] != tasks[2] and tasks[1] != study.assign(make(seed=1), 2, 2, {})[1]


def test_each_system_is_as_often_left_as_right():
  tasks = study.assign(make(400, 2, checks=0), 1, 1, {})[1]
  first = sum(task.shown[0] == 'a' for task in tasks)
  assert abs(first - 200) < 3 * 10   # three standard deviations of a fair coin
  first_half = sum(task.item < 200 for task in tasks[:200])
  assert abs(first_half - 100) < 3 * 10


@pytest.mark.parametrize('mode,criteria', [('pairwise', ()), ('best_worst', ()), ('likert', ('fluency',))])
def test_half_of_the_checks_show_a_scrambled_text_and_half_repeat_a_question_mirrored(mode, criteria):
  a_study = make(mode=mode, criteria=criteria, checks=6)
  for own in study.assign(a_study, 3, 2, {}).values():
    scrambled = [task for task in own if task.check == 'scrambled']
    assert len(scrambled) == 3 and sum(task.check == 'repeat' for task in own) == 3
    for task in scrambled:
      texts = study.texts(a_study, task)
      system = task.shown[task.scrambled]
      intact = a_study.items[task.item].texts[a_study.systems.index(system)]
      assert task.shown.count(system) == 2 and intact in texts and texts[task.scrambled] != intact
      assert sorted(texts[task.scrambled].split()) == sorted(intact.split())
      assert len(texts) == (2 if mode == 'pairwise' else 3)
    for number, task in enumerate(own):
      if task.check == 'repeat':
        first = own[task.repeats]
        assert task.repeats < number and not first.check
        assert (first.item, first.shown) == (task.item, task.shown[::-1])


def test_a_repeat_comes_after_what_it_repeats_even_among_few_tasks():
  for seed in range(50):
    for own in study.assign(make(2, 2, seed=seed), 1, 1, {}).values():
      assert all(task.repeats < number and not own[task.repeats].check for number, task in enumerate(own)
                 if task.check == 'repeat')


def test_a_text_without_spaces_is_scrambled_by_characters():
  text = '今天天气很好我们去公园'
  assert study.scrambled(text, 0) != text and sorted(study.scrambled(text, 0)) == sorted(text)


def test_more_raters_and_votes_are_added_to_what_is_there():
  a_study = make()
  before = study.assign(a_study, 2, 1, {})
  new = study.assign(a_study, 3, 2, before)
  both = {rater: [*before.get(rater, ()), *new[rater]] for rater in new}
  counts = collections.Counter((task.item, frozenset(task.shown)) for own in both.values() for task in own
                               if not task.check)
  assert set(counts.values()) == {2} and len(counts) == 36
  assert [sum(bool(task.check) for task in both[rater]) for rater in (1, 2, 3)] == [4, 4, 4]
  assert not any(study.assign(a_study, 3, 2, both).values())   # nothing is new the second time


@pytest.mark.parametrize('settings,message', [
    ({'systems': 1}, 'pairwise needs the outputs of at least 2 systems, and there are 1'),
    ({'systems': 2, 'mode': 'best_worst'}, 'at least 3 systems, and there are 2'),
    ({'mode': 'likert'}, 'needs --criteria'), ({'criteria': ('x',)}, '--criteria is for --mode=likert'),
    ({'mode': 'likert', 'criteria': ('x',), 'scale': 12}, '--scale=12'), ({'checks': -1}, '--checks=-1'),
    ({'mode': 'likert', 'criteria': ('x', 'x')}, '--criteria=x,x'),
    ({'scale': 3}, '--scale=3 is for --mode=likert, and --mode=pairwise has no ratings')])
def test_settings_that_make_no_study_are_refused(settings, message):
  with pytest.raises(ValueError, match=message):
    make(**settings)


@pytest.mark.parametrize('raters,votes,items,message', [
    (1, 2, 5, '--votes_per_item=2 needs as many raters, and --raters=1'),
    (4, 1, 1, '--checks=4 is too many for rater')])
def test_raters_that_are_too_few_or_have_too_little_to_do_are_refused(raters, votes, items, message):
  with pytest.raises(ValueError, match=message):
    study.assign(make(items, 2 if items == 1 else 3), raters, votes, {})


def test_pairs_of_equal_texts_are_not_asked():
  items = [Item(str(i), '', ('the same', 'the same' if i % 2 else 'others', f'third {i}')) for i in range(6)]
  a_study = Study(('a', 'b', 'c'), tuple(items), checks=0)
  questions = {(task.item, frozenset(task.shown)) for task in study.assign(a_study, 1, 1, {})[1]}
  assert len(questions) == 6 * 3 - 3 and not any((item, frozenset('ab')) in questions for item in (1, 3, 5))
  equal = Study(('a', 'b'), (Item('1', '', ('same', 'same')),))
  with pytest.raises(ValueError, match='equal texts for every item: there is nothing to judge'):
    study.assign(equal, 1, 1, {})


def test_texts_too_short_to_scramble_are_refused():
  short = Study(('a', 'b'), (Item('1', '', ('yes', 'no')),) * 9)
  with pytest.raises(ValueError, match='--checks=4 needs a text with 6 different words'):
    study.assign(short, 1, 1, {})


PAIR, TRIPLE = Task(0, ('a', 'b')), Task(0, ('a', 'b', 'c'))


@pytest.mark.parametrize('mode,task,answer', [
    ('pairwise', PAIR, {'choice': 2}), ('pairwise', PAIR, {'choice': True}),
    ('pairwise', PAIR, {'best': 1, 'worst': 0}), ('pairwise', PAIR, None), ('pairwise', PAIR, []),
    ('best_worst', TRIPLE, {'best': 1, 'worst': 1}), ('best_worst', TRIPLE, {'best': 1}),
    ('likert', PAIR, {'ratings': [[1]]}), ('likert', PAIR, {'ratings': [[1], [6]]}),
    ('likert', PAIR, {'ratings': [[1], [2, 3]]}), ('likert', PAIR, {'ratings': [[1], [2.5]]}),
    ('likert', PAIR, {'ratings': [[1], None]})])
def test_answers_that_do_not_fit_the_task_are_refused(mode, task, answer):
  a_study = make(mode=mode, criteria=('x',) if mode == 'likert' else ())
  with pytest.raises(ValueError, match='does not fit a task with'):
    answers.check(a_study, task, answer)


SCRAMBLED_PAIR, SCRAMBLED_TRIPLE = Task(0, ('a', 'a'), scrambled=0), Task(0, ('b', 'a', 'a'), scrambled=2)


@pytest.mark.parametrize('mode,task,answer,first,fails', [
    ('pairwise', SCRAMBLED_PAIR, {'choice': 1}, None, False), ('pairwise', SCRAMBLED_PAIR, {'choice': 0}, None, True),
    ('pairwise', SCRAMBLED_PAIR, {'choice': 'tie'}, None, True),
    ('pairwise', PAIR._replace(repeats=0), {'choice': 0}, {'choice': 1}, False),
    ('pairwise', PAIR._replace(repeats=0), {'choice': 0}, {'choice': 0}, True),
    ('pairwise', PAIR._replace(repeats=0), {'choice': 'tie'}, {'choice': 0}, False),
    ('pairwise', PAIR._replace(repeats=0), {'choice': 1}, None, None),
    ('best_worst', SCRAMBLED_TRIPLE, {'best': 1, 'worst': 0}, None, False),
    ('best_worst', SCRAMBLED_TRIPLE, {'best': 2, 'worst': 0}, None, True),
    ('best_worst', SCRAMBLED_TRIPLE, {'best': 0, 'worst': 1}, None, True),
    ('best_worst', TRIPLE._replace(repeats=0), {'best': 0, 'worst': 1}, {'best': 2, 'worst': 1}, False),
    ('best_worst', TRIPLE._replace(repeats=0), {'best': 0, 'worst': 1}, {'best': 1, 'worst': 2}, True),
    ('likert', SCRAMBLED_PAIR, {'ratings': [[1], [4]]}, None, False),
    ('likert', SCRAMBLED_PAIR, {'ratings': [[4], [4]]}, None, True),
    ('likert', PAIR._replace(repeats=0), {'ratings': [[1], [4]]}, {'ratings': [[5], [2]]}, False),
    ('likert', PAIR._replace(repeats=0), {'ratings': [[1], [4]]}, {'ratings': [[1], [4]]}, True)])
def test_what_fails_an_attention_check(mode, task, answer, first, fails):
  a_study = make(mode=mode, criteria=('x',) if mode == 'likert' else ())
  assert answers.fails(a_study, task, answer, first) is fails
