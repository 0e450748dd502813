"""Docstrings of Python's own library as texts to summarise: the first line is the summary of the other lines."""
import ast
import collections
import inspect
import json
import warnings

from lm.data.text import corpora, source
from lm.data.text.source import Source


def summaries(code: str, least: int = 12) -> list[tuple[str, str]]:
  """Returns (what follows, first line) of each docstring of a module whose first line is a sentence of its own.

  What follows has `least` words or more. Text that is no Python code has no docstrings.
  """
  try:
    with warnings.catch_warnings():   # of escapes that are none, in text that is no code
      warnings.simplefilter('ignore')
      tree = ast.parse(code)
  except (SyntaxError, ValueError):
    return []
  pairs = []
  for node in ast.walk(tree):
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
      first, _, text = inspect.cleandoc(ast.get_docstring(node, clean=False) or '').partition('\n\n')
      if '\n' not in first and len(first.split()) > 2 and len(text.split()) >= least:
        pairs.append((text.strip(), first.strip()))
  return pairs


@source.deferred
def docstrings(validation: float = 0.05) -> Source:
  """Returns records {"prompt": what follows the first line of a docstring, "completion": the first line}.

  No record is in both splits. Of methods with the same first line and other texts, some may be held out and some not.
  """
  library, counts = corpora.python_library(0.), collections.Counter()
  files = library.splits['train']

  def load(i: int, counts: collections.Counter[str]) -> list[str]:
    return [json.dumps({'prompt': text, 'completion': first}) for text, first in summaries(files[i])]

  documents, read = source.shards(load, len(files), counts)
  return Source('docstrings', source.split(documents, read, validation, 'docstrings', counts, unique=True,
                                           divisible=False), f'docstrings {validation} {library.fingerprint}',
                library.license, counts)
