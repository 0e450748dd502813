"""pass@k is the share of the draws of k programs with one that passes, and programs are executed for it."""
import gzip
import itertools
import json

import pytest
from helpers import shared_data
from helpers.slow import slow

from lm.evaluate import texts
from lm.evaluate.texts import pass_at_k


@pytest.mark.parametrize('samples,passed,k', [(5, 2, 1), (5, 2, 3), (6, 1, 2), (4, 0, 2), (4, 4, 4), (5, 3, 3)])
def test_the_estimate_is_the_share_of_all_draws(samples, passed, k):
  draws = list(itertools.combinations([True] * passed + [False] * (samples - passed), k))
  assert pass_at_k.probability(samples, passed, k) == pytest.approx(sum(map(any, draws)) / len(draws), 1e-15)


def test_too_few_programs_are_refused():
  with pytest.raises(ValueError, match='pass@3 needs at least 3 programs of a problem, and there are 2'):
    pass_at_k.probability(2, 1, 3)
  with pytest.raises(ValueError, match='one has 1'):
    texts.PassAtK((2,))([['a', 'b'], ['a']], [texts.Problem('', '')] * 2)
  with pytest.raises(ValueError, match='2 problems and programs of 1'):
    texts.PassAtK()([['a']], [texts.Problem('', '')] * 2)


@pytest.mark.parametrize('orders', [(), (0,), (1, 1), (-1, 2)])
def test_orders_are_different_and_above_zero(orders):
  with pytest.raises(ValueError, match='of pass@k is not one or more different numbers'):
    texts.PassAtK(orders)


def isolated():
  try:
    texts.Sandbox().check()
  except OSError as error:
    pytest.skip(str(error))


def test_programs_of_several_problems():
  isolated()
  humaneval = texts.problem({'prompt': 'def f(x):\n', 'test': 'def check(g):\n  assert g(2) == 4', 'entry_point': 'f'})
  mbpp = texts.problem({'text': 'Add.', 'test_list': ['assert add(1, y) == 3', 'assert add(0, 0) == 0'],
                        'test_setup_code': 'y = 2'})
  completions = [['  return 2 * x', '  return x', '  return x ** 2', '  return'],
                 ['def add(a, b): return 3', 'x', 'def add(a, b): return b', 'y']]
  attempts = texts.PassAtK((1, 2))(completions, [humaneval, mbpp])
  one, two = attempts.measures
  assert one.name == 'pass@1' and one.scores().tolist() == [0.5, 0]
  assert two.scores().tolist() == pytest.approx([5 / 6, 0]) and 'samples:4' in two.signature
  assert attempts.results[0] == ['passed', 'AssertionError: ', 'passed', 'AssertionError: ']
  with pytest.raises(ValueError, match='and this has prompt, answer'):
    texts.problem({'prompt': '', 'answer': ''})


@pytest.mark.parametrize('solved', slow(True, False))
def test_humaneval(solved):
  isolated()
  with gzip.open(shared_data.folder('humaneval') / 'HumanEval.jsonl.gz', 'rt') as lines:
    records = [json.loads(line) for line in lines]
  completions = [[record['canonical_solution'] if solved else ''] for record in records]
  measure, = texts.PassAtK(sandbox=texts.Sandbox(seconds=60))(completions, list(map(texts.problem, records))).measures
  assert len(measure.rows) == 164 and measure.interval().value == solved
