"""Docstrings are those that Python itself gives to the objects of a module, and their first lines are the summaries."""
import inspect
import json
import textwrap

from lm.data.text import corpora, docstrings, source


def test_pairs_are_the_docstrings_that_objects_have():
  pairs = dict(docstrings.summaries(inspect.getsource(textwrap)))
  for thing in (textwrap.wrap, textwrap.fill, textwrap.dedent, textwrap.TextWrapper._wrap_chunks):
    first, text = inspect.getdoc(thing).split('\n\n', 1) if '\n\n' in inspect.getdoc(thing) else ('', '')
    if '\n' not in first and first:
      assert pairs[text.strip()] == first
  assert len(pairs) >= 4
  assert docstrings.summaries('no code, but \\d text') == []
  assert docstrings.summaries('def f():\n  """Too short."""\n\nclass A:\n  """One that\n  goes on.\n\n  ' + 'w ' * 20
                              + '"""\n') == []


def test_records_of_a_library_are_all_of_its_docstrings(monkeypatch):
  code = [f'def f{i}():\n  """Returns the number {i}.\n\n  {"It counts. " * 8}{i}\n  """\n' for i in range(40)]
  monkeypatch.setattr(corpora, 'python_library', lambda validation: source.texts(code, validation))
  splits = docstrings.docstrings(0.2).splits
  records = [json.loads(text) for split in splits.values() for text in split]
  assert {record['completion'] for record in records} == {f'Returns the number {i}.' for i in range(40)}
  assert all(record['prompt'] == f'{"It counts. " * 8}{record["completion"][19:-1]}' for record in records)
  assert 2 <= len(splits['validation']) <= 16
