"""Programs with a hole that a model fills: functions of Python's library, and the problems of HumanEval and MBPP."""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from lm.data.text import library_functions
from lm.evaluate.texts import Problem, problem, text_files

_AFTER_A_FUNCTION = ('\ndef ', '\nclass ', '\nif ', '\nprint(', '\n#', '\n@', '\n```')
_AFTER_A_PROGRAM = ('\nassert ', '\n"""', '\nprint(', '\nif ', '\n```')


class Hole(NamedTuple):
  """A program with a hole.

  Attributes:
    name: of the problem.
    before: the text that a model reads before the hole.
    answer: what the author of the program wrote there.
    after: the text after the hole, which a model that fills in reads too.
    problem: what is executed is its prompt, what is written, and `after`; then its test.
    stop: strings that follow the hole, before which a model may stop.
    cut: returns the beginning of a text that belongs into the hole.
  """
  name: str
  before: str
  answer: str
  after: str
  problem: Problem
  stop: tuple[str, ...]
  cut: Callable[[str], str]


def bodies() -> list[Hole]:
  """Returns functions of Python's library without their bodies."""
  return [_of_library(library_functions.body(name), _AFTER_A_FUNCTION, indented) for name in library_functions.CALLS]


def lines() -> list[Hole]:
  """Returns functions of Python's library without one of their lines."""
  return [_of_library(library_functions.line(name), ('\n',), first_line) for name in library_functions.CALLS]


def of_record(record: Mapping[str, Any]) -> Hole:
  """Returns the hole of a record of HumanEval, which is the body of a function, or of MBPP, which is a whole program.

  The prompt of MBPP is a docstring with the task and all tests. Raises ValueError for a record of another form.
  """
  name = str(record.get('task_id', ''))
  match record:
    case {'prompt': str(before), 'test': str(), 'entry_point': str()}:
      return Hole(name, before, record.get('canonical_solution', ''), '', problem(record), _AFTER_A_FUNCTION, indented)
    case {'text': str(task), 'test_list': [*tests]} | {'prompt': str(task), 'test_list': [*tests]}:
      before = '\n'.join(['"""', task, *tests, '"""', ''])
      return Hole(name, before, record.get('code', ''), '', problem(record), _AFTER_A_PROGRAM, lambda text: text)
  raise ValueError('a problem has prompt, test and entry_point as those of HumanEval, or text and test_list as those '
                   f'of MBPP, and this has {", ".join(record) or "nothing"}')


def of_records(records: text_files.Records) -> list[Hole]:
  """Returns the holes of a file; see `of_record`. Raises ValueError, with the line, for a record of another form."""
  holes = []
  for i, record in enumerate(records.lines):
    try:
      holes.append(of_record(record))
    except ValueError as error:
      raise ValueError(f'{records.where(i)}: {error}') from None
  return holes


def first_line(text: str) -> str:
  """Returns a text up to the end of its first line."""
  return text.partition('\n')[0]


def indented(text: str) -> str:
  """Returns the lines of a text before the first one that is neither indented nor blank: the body of a function."""
  rows = text.splitlines(keepends=True)
  end = next((i for i, row in enumerate(rows) if row.strip() and row[0] not in ' \t'), len(rows))
  return ''.join(rows[:end])


def _of_library(case: library_functions.Case, stop: tuple[str, ...], cut: Callable[[str], str]) -> Hole:
  return Hole(case.name, case.before, case.middle, case.after, Problem(case.setup + case.before, case.test), stop, cut)
