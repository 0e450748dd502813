"""Functions of Python's own library as programming problems: a model writes their bodies, or single lines of them.

A program is right if it returns what the function of the library returns for the same arguments.
"""
import ast
import pathlib
import sysconfig
from typing import NamedTuple

# Arguments of each function, as they are written in a call.
CALLS = {
    'calendar.isleap': ('2000', '1900', '2024', '2023'),
    'calendar.leapdays': ('1900, 2001', '2000, 2001', '1996, 2000'),
    'calendar.monthrange': ('2024, 2', '2023, 12'),
    'colorsys.hls_to_rgb': ('0.2, 0.4, 0.6', '0.9, 0.8, 0.1', '0.5, 0.5, 0.0'),
    'colorsys.hsv_to_rgb': ('0.2, 0.4, 0.6', '0.9, 0.8, 0.1', '0.5, 0.0, 0.5', '1.0, 0.8, 0.1'),
    'colorsys.rgb_to_hls': ('0.2, 0.4, 0.6', '0.9, 0.8, 0.1', '0.5, 0.5, 0.5'),
    'colorsys.rgb_to_hsv': ('0.2, 0.4, 0.6', '0.9, 0.8, 0.1', '0.5, 0.5, 0.5'),
    'colorsys.rgb_to_yiq': ('0.2, 0.4, 0.6', '0.9, 0.8, 0.1'),
    'colorsys.yiq_to_rgb': ('0.2, 0.4, 0.6', '0.1, 0.9, 0.0', '0.1, 0.0, 0.9', '0.9, 0.5, 0.5'),
    'difflib.get_close_matches': ('"appel", ["ape", "apple", "peach"]', '"x", ["a"]'),
    'email.utils.unquote': ("""'"a b"'""", '"<a@b>"', '"plain"'),
    'encodings.normalize_encoding': ('"utf-8"', '"ISO 8859 (1)"'),
    'fnmatch.filter': ('["a.py", "b.txt", "c.py"], "*.py"', '["a"], "b"'),
    'fnmatch.fnmatchcase': ('"a.py", "*.py"', '"a.PY", "*.py"'),
    'genericpath.commonprefix': ('["abc", "abd", "ab"]', '[]', '["x", "y"]'),
    'html.escape': ('"<a> & \'b\'"', '"<a href=\\"b\\">"', '"<a href=\\"b\\">", False'),
    'inspect.cleandoc': ('"a\\n    b\\n      c\\n"', '"  one"'),
    'inspect.indentsize': ('"   a"', '"\\tb"'),
    'posixpath.basename': ('"/a/b.c"', '"/a/"'),
    'posixpath.commonpath': ('["/a/b", "/a/c"]', '["a/b/c", "a/b"]'),
    'posixpath.dirname': ('"/a/b.c"', '"a"', '"//a"'),
    'posixpath.isabs': ('"/a"', '"a"', 'b"/a"'),
    'posixpath.join': ('"a", "b"', '"a/", "b", "/c"', '"", "b"'),
    'posixpath.split': ('"/a/b"', '"a"', '"/a"'),
    'shlex.quote': ('"a b"', '"ab"', '""', '"it\'s"'),
    'statistics.median': ('[3, 1, 2]', '[4, 1, 2, 3]'),
    'statistics.median_high': ('[3, 1, 2]', '[4, 1, 2, 3]'),
    'statistics.median_low': ('[3, 1, 2]', '[4, 1, 2, 3]'),
    'string.capwords': ('"a bc  DEF"', '"a-bc-d", "-"'),
    'textwrap.indent': ('"a\\n\\nb\\n", "> "', '"a\\n b", "  "'),
    'textwrap.shorten': ('"one two three four", 12', '"one", 5'),
    'xml.sax.saxutils.escape': ('"<a> & b"', '"a", {"a": "b"}'),
    'xml.sax.saxutils.unescape': ('"&lt;a&gt; &amp; b"', '"b", {"b": "a"}'),
    'xml.sax.saxutils.quoteattr': ("""'a "b"'""", '"it\'s"', '"\\n"')}


class Case(NamedTuple):
  """A hole in the source of a function."""
  name: str
  before: str     # the source up to the hole
  middle: str     # what the library has there
  after: str      # the source from the end of the hole on
  setup: str      # makes the names of the module known, as the function needs them
  test: str       # raises AssertionError where the function returns something else than that of the library


def body(name: str) -> Case:
  """Returns the function without its body, up to its docstring if it has one."""
  lines, node = _parsed(name)
  first = node.body[ast.get_docstring(node) is not None].lineno - 1
  return _case(name, ''.join(lines[:first]), ''.join(lines[first:]), '')


def line(name: str) -> Case:
  """Returns the function without one line: the middle one of its statements that have a line of their own."""
  lines, node = _parsed(name)
  start = ast.get_docstring(node) is not None
  places = sorted({part.lineno - 1 for statement in node.body[start:] for part in ast.walk(statement)
                   if isinstance(part, ast.Assign | ast.AugAssign | ast.Return | ast.Expr)
                   and part.lineno == part.end_lineno and not lines[part.lineno - 1][:part.col_offset].strip()})
  place = places[len(places) // 2]
  indent = len(lines[place]) - len(lines[place].lstrip())
  return _case(name, ''.join(lines[:place]) + lines[place][:indent], lines[place][indent:].rstrip('\n'),
               '\n' + ''.join(lines[place + 1:]))


def _parsed(name: str) -> tuple[list[str], ast.FunctionDef]:
  """Returns the lines of a function, and its syntax tree, from the file of its module."""
  module, _, function = name.rpartition('.')
  path = pathlib.Path(sysconfig.get_paths()['stdlib'], *module.split('.'))
  text = (path / '__init__.py' if path.is_dir() else path.with_suffix('.py')).read_text(encoding='utf-8')
  nodes = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef) and node.name == function)
  source = ast.get_source_segment(text, next(nodes)) + '\n'
  node, = ast.parse(source).body
  return source.splitlines(keepends=True), node


def _case(name: str, before: str, middle: str, after: str) -> Case:
  module, _, function = name.rpartition('.')
  setup = f'import {module} as _library\nglobals().update({{**vars(_library), "__name__": "program"}})\n\n\n'
  test = f'import {module} as _library\n' + '\n'.join(
      f'assert {function}({call}) == _library.{function}({call})' for call in CALLS[name])
  return Case(name, before, middle, after, setup, test)
