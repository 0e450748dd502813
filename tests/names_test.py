"""Names are nouns for values and verbs for functions: see the words that no name may be."""
import ast
import pathlib
from collections.abc import Iterator

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FOLDERS = ['lm', 'experiments', 'tests']
# Participles, adverbs and prepositions, which leave open what the value is.
WORDS = {
    'asked', 'at', 'begun', 'done', 'found', 'given', 'gone', 'held', 'here', 'how', 'kept', 'known', 'left', 'made',
    'many', 'meant', 'more', 'much', 'ready', 'rest', 'said', 'seen', 'taken', 'there', 'told', 'wanted'}
STORED = {('lm/train/run.py', 'seen')}   # checkpoints have the history of the guard under this name


def names_of(source: str) -> Iterator[tuple[int, str]]:
  """Yields (line, name) of all variables, attributes, parameters, functions and classes that a source defines."""
  for node in ast.walk(ast.parse(source)):
    match node:
      case ast.Name(id=name, ctx=ast.Store()) | ast.Attribute(attr=name, ctx=ast.Store()):
        yield node.lineno, name
      case ast.arg(arg=name) | ast.alias(asname=str(name)):
        yield node.lineno, name
      case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name) | ast.ClassDef(name=name):
        yield node.lineno, name
      case ast.ExceptHandler(name=str(name)) | ast.MatchAs(name=str(name)) | ast.MatchStar(name=str(name)):
        yield node.lineno, name


@pytest.mark.parametrize('folder', FOLDERS)
def test_no_name_is_a_word_that_does_not_say_what_the_value_is(folder):
  faults = []
  for path in sorted((ROOT / folder).rglob('*.py')):
    file = path.relative_to(ROOT).as_posix()
    faults += [f'{file}:{line}: {name}' for line, name in names_of(path.read_text())
               if name.strip('_').lower() in WORDS and (file, name) not in STORED]
  assert not faults, 'say in the name what the value is:\n' + '\n'.join(faults)


def test_every_kind_of_name_is_checked():
  source = '''
import a as at
class Found:
  kept: int = 1
  def told(self, asked, *more, how=lambda rest: rest, **left):
    self.made = begun = 1
    for known, (taken, _) in []:
      pass
    with open(said) as there:
      pass
    try:
      pass
    except OSError as gone:
      pass
    match asked:
      case [seen, *here]:
        pass
    if (much := 1):
      return [many for many in []]
'''
  assert sorted(name.lower() for _, name in names_of(source) if name.lower() in WORDS) == sorted([
      'at', 'found', 'kept', 'told', 'asked', 'more', 'how', 'rest', 'left', 'made', 'begun', 'known', 'taken', 'there',
      'gone', 'seen', 'here', 'much', 'many'])
