"""Holes of records in the forms of HumanEval and MBPP: what their authors wrote passes, what is cut does not count."""
import pathlib

import pytest

from lm.evaluate import code_holes
from lm.evaluate.texts import text_files

FUNCTION = {
    'task_id': 'HumanEval/0', 'entry_point': 'double', 'prompt': 'def double(x):\n  """Returns 2 * x.\n  """\n',
    'canonical_solution': '  return 2 * x\n', 'test': 'def check(candidate):\n  assert candidate(4) == 8\n'}
PROGRAM = {
    'task_id': 2, 'text': 'Write a function to add one.', 'code': 'def add_one(x):\r\n  return x + 1',
    'test_setup_code': 'two = 2', 'test_list': ['assert add_one(1) == two', 'assert add_one(two) == 3'],
    'challenge_test_list': []}


def passes(hole, written):
  names = {}
  try:
    exec(f'{hole.problem.prompt}{hole.cut(written)}{hole.after}\n', names)
    exec(hole.problem.test, names)
  except AssertionError:
    return False
  return True


def test_functions_and_programs_are_those_of_their_records():
  function, program = map(code_holes.of_record, (FUNCTION, PROGRAM))
  assert (function.name, function.before, program.name) == ('HumanEval/0', FUNCTION['prompt'], '2')
  assert program.before == ('"""\nWrite a function to add one.\nassert add_one(1) == two\nassert add_one(two) == 3\n'
                            '"""\n')
  for hole, wrong in ((function, '  return 3 * x\n'), (program, 'def add_one(x):\n  return 2')):
    assert passes(hole, hole.answer) and not passes(hole, wrong)
  assert passes(function, f'{function.answer}\nraise AssertionError\n')   # is after the function
  sanitised = {'task_id': 2, 'prompt': PROGRAM['text'], 'test_list': ['assert math.isnan(nan())'],
               'test_imports': ['import math']}
  assert passes(code_holes.of_record(sanitised), 'def nan():\n  return float("nan")')
  lines = text_files.Records(pathlib.Path('a.jsonl'), [FUNCTION, {'question': '', 'answer': ''}], [1, 3])
  with pytest.raises(ValueError, match='a.jsonl line 3: .*, and this has question, answer'):
    code_holes.of_records(lines)


def test_texts_are_cut_where_a_line_or_a_body_ends():
  assert code_holes.first_line('a = 1\n  b\n') == 'a = 1' and code_holes.first_line('') == ''
  assert code_holes.indented('  a\n\n  b\ndef c():\n  d') == '  a\n\n  b\n' and code_holes.indented('x\n  y') == ''
