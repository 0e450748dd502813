"""Files of texts and references are matched by id or line by line, and what does not fit together is refused."""
import gzip
import json

import pytest

from lm.evaluate import texts
from lm.evaluate.texts import text_files


def written(path, lines):
  """Writes JSON lines, or lines of plain text."""
  content = ''.join((line if isinstance(line, str) else json.dumps(line)) + '\n' for line in lines)
  if path.suffix == '.gz':
    path.write_bytes(gzip.compress(content.encode()))
  else:
    path.write_text(content)
  return text_files.read(path)


def test_ids_are_matched_in_any_order_and_all_files_give_references(tmp_path):
  candidates = written(tmp_path / 'c.jsonl', [{'id': 1, 'text': 'a'}, {'id': 'x', 'candidate': 'b'}])
  first = written(tmp_path / 'r.jsonl.gz', [{'id': 'x', 'references': ['B', 'BB']}, {'id': '1', 'reference': 'A'}])
  second = written(tmp_path / 's.jsonl', [{'id': 'x', 'text': 'b2'}, {'id': 1, 'text': 'a2'}])
  assert text_files.texts(candidates) == ['a', 'b']
  assert text_files.matched(candidates, [first, second]) == [['A', 'a2'], ['B', 'BB', 'b2']]


def test_plain_text_is_matched_line_by_line(tmp_path):
  candidates = written(tmp_path / 'c.txt', ['a', '', 'c'])
  first, second = written(tmp_path / 'r.txt', ['A', 'B', '']), written(tmp_path / 's.txt', ['', 'b', 'c'])
  assert text_files.texts(candidates) == ['a', '', 'c']
  assert text_files.matched(candidates, [first, second]) == [['A'], ['B', 'b'], ['', 'c']]
  windows = tmp_path / 'w.txt'
  windows.write_bytes(b'\xef\xbb\xbfa\r\nb\r\nc\r\n')
  assert text_files.texts(text_files.read(windows)) == ['a', 'b', 'c']


def test_candidates_may_have_their_references_with_them(tmp_path):
  candidates = written(tmp_path / 'c.jsonl', [{'text': 'a', 'references': ['A']}, {'text': 'b', 'reference': 'B'}])
  assert text_files.matched(candidates, []) == [['A'], ['B']]
  with pytest.raises(ValueError, match='has lines without references; give a file'):
    text_files.matched(written(tmp_path / 'd.jsonl', [{'text': 'a'}]), [])


@pytest.mark.parametrize('candidates,references,message', [
    ([{'id': 1, 'text': 'a'}], [{'id': 1, 'text': 'a'}, {'id': 2, 'text': 'b'}], 'c.jsonl lacks 1 of the 2 ids .*: 2;'),
    ([{'id': 1, 'text': 'a'}, {'id': 2, 'text': 'b'}], [{'id': 1, 'text': 'a'}], 'r.jsonl lacks 1 of the 2 ids .*: 2;'),
    ([{'id': 1, 'text': 'a'}] * 2, [{'id': 1, 'text': 'a'}] * 2, 'has the id 1 on two lines, 1 and 2'),
    ([{'text': 'a'}], [{'id': 1, 'text': 'a'}, {'id': 2, 'text': 'b'}], 'has 1 texts and .* has 2; without ids'),
    ([{'id': 1, 'text': 'a'}, {'text': 'a'}], [], 'c.jsonl line 2 has the id null, and others have one'),
    ([{'id': 1, 'out': 'a'}], [], r'line 1 \(id 1\) has none of the fields text, candidate, completion, and'),
    ([{'text': 3}], [], 'has a text that is 3; one string'), ([{'text': ' '}], [], 'all 1 texts of .* are empty'),
    (['{'], [], 'c.jsonl line 1 is not JSON'), (['[' * 100_000], [], 'nested too deep'),
    (['[]'], [], r'line 1 is \[\], and what is needed'),
    ([], [], 'is empty'),
    ([{'text': 'a'}], [{'references': []}], r'has the references \[\]'),
    ([{'text': 'a'}], [{'references': [1]}], r'has the references \[1\]')])
def test_what_does_not_fit_together_is_refused(tmp_path, candidates, references, message):
  with pytest.raises(ValueError, match=message):
    records = written(tmp_path / 'c.jsonl', candidates)
    text_files.texts(records)
    text_files.matched(records, [written(tmp_path / 'r.jsonl', references)])


def test_files_that_are_no_text_are_refused(tmp_path):
  path = tmp_path / 'x.txt'
  path.write_bytes(b'\xff\xfe')
  with pytest.raises(ValueError, match='x.txt is no text in UTF-8'):
    text_files.read(path)
  path.write_text('{"text": "a"}\n')
  with pytest.raises(ValueError, match='x.txt has JSON, and the name of a file of JSON lines ends in .jsonl'):
    text_files.read(path)
  (tmp_path / 'x.jsonl').write_text('\n\n')
  with pytest.raises(ValueError, match='x.jsonl is empty'):
    text_files.read(tmp_path / 'x.jsonl')


def test_damaged_gzip_files_are_refused(tmp_path):
  whole = gzip.compress(b'{"text": "a b c"}\n' * 9)
  for data in b'abc', whole[:-9], whole[:12] + bytes([whole[12] ^ 255]) * 9 + whole[21:]:
    (tmp_path / 'x.jsonl.gz').write_bytes(data)
    with pytest.raises(ValueError, match='cannot be decompressed'):
      text_files.read(tmp_path / 'x.jsonl.gz')


def test_several_programs_of_a_problem_are_its_lines(tmp_path):
  problems = written(tmp_path / 'p.jsonl', [{'task_id': 'A', 'test': ''}, {'task_id': 'B', 'test': ''}])
  lines = [{'task_id': name, 'completion': program} for name, program in (('B', 'b'), ('A', 'a'), ('B', 'c'))]
  assert text_files.by_problem(written(tmp_path / 'c.jsonl', lines), problems) == [['a'], ['b', 'c']]
  with pytest.raises(ValueError, match='has no program for 1 of the 2 problems of .*: B'):
    text_files.by_problem(written(tmp_path / 'c.jsonl', lines[1:2]), problems)
  with pytest.raises(ValueError, match='has a program for C, which'):
    text_files.by_problem(written(tmp_path / 'c.jsonl', [{'id': 'C', 'text': 'x'}]), problems)


def test_metrics_by_name_and_settings_that_have_no_effect():
  for name in texts.NAMES:
    if name not in ('bleu', 'chrf', 'chrf++', 'ter', 'rouge'):   # which need packages
      assert texts.Settings().scores(name, ['a b', 'c'], [['a'], ['c']])
  for names, message in (['blue'], "'blue', which is none; the nearest is 'bleu'"), (['ter', 'ter'], 'twice'), (
      [], 'empty'):
    with pytest.raises(ValueError, match=message):
      texts.check_names(names)
  with pytest.raises(ValueError, match='stem=True is for rouge, and metrics has none of these'):
    texts.Settings(stem=True).check(['bleu'])
  texts.Settings(stem=True, lowercase=True).check(['rouge', 'chrf'])
  assert 'Chinese' in texts.Settings().note([['今天']]) and texts.Settings(language='zh').note([['今天']]) is None
