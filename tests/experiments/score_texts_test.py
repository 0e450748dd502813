"""The command that scores files of texts: its table, its files, and bad flags."""
import json
import sys

import pytest
import score_texts

from lm import signature


def run(**flags):
  return signature.call(score_texts.score_texts, flags)


def lines(path, records):
  path.write_text(''.join(json.dumps(record) + '\n' for record in records))
  return path


def test_a_table_and_json_of_two_systems(tmp_path, capsys):
  sacrebleu = pytest.importorskip('sacrebleu')
  texts = [f'the cat number {i} sat on the mat' for i in range(5)]
  references = lines(tmp_path / 'r.jsonl', [{'id': i, 'references': [texts[i], texts[i] + '!']} for i in range(5)])
  one = lines(tmp_path / 'one.jsonl', [{'id': i, 'text': texts[i][4:]} for i in reversed(range(5))])
  two = lines(tmp_path / 'two.jsonl', [{'id': i, 'text': '' if i == 3 else texts[i]} for i in range(5)])
  run(candidates=(one, two), references=(references,), metrics=('bleu', 'distinct'), out=tmp_path / 'out')
  results = json.loads((tmp_path / 'out/results.json').read_text())
  expected = sacrebleu.corpus_bleu([text[4:] for text in texts], [texts, [text + '!' for text in texts]]).score
  bleu = results['results']['one']['metrics']['bleu']
  assert bleu['value'] == expected and bleu['low'] <= expected <= bleu['high'] and bleu['documents'] == 5
  assert list(results['results']['one']['metrics']) == ['bleu', 'distinct_1', 'distinct_2', 'distinct_3']
  assert results['settings']['metrics'] == ['bleu', 'distinct'] and results['versions']['sacrebleu']
  output = capsys.readouterr()
  assert f'one/bleu {expected:.4f}' in ' '.join(output.out.split()) and 'two: 1 of 5 texts are empty' in output.out
  assert output.err.count('bleu: 5 texts in ') == 2


def test_files_of_one_name_are_told_apart_and_a_file_is_given_once(tmp_path, capsys):
  for folder in 'a', 'b':
    (tmp_path / folder).mkdir()
    lines(tmp_path / folder / 'x.jsonl', [{'text': f'a b {folder}'}])
  files = tmp_path / 'a/x.jsonl', tmp_path / 'b/x.jsonl'
  run(candidates=files, metrics=('distinct',), out=tmp_path / 'out')
  results = json.loads((tmp_path / 'out/results.json').read_text())['results']
  assert len(results) == 2 and not any('/' in name for name in results)   # a name is one of files in the folder, too
  with pytest.raises(ValueError, match='has a file twice'):
    run(candidates=files[:1] * 2, metrics=('distinct',))


def test_a_folder_that_cannot_be_written_is_refused_before_work(tmp_path, capsys):
  (tmp_path / 'file').touch()
  with pytest.raises(OSError, match='file'):
    run(candidates=(lines(tmp_path / 'c.jsonl', [{'text': 'a'}]),), metrics=('distinct',), out=tmp_path / 'file/out')
  assert not capsys.readouterr().err


def test_the_language_of_the_references_is_printed(tmp_path, capsys):
  pytest.importorskip('sacrebleu')
  (tmp_path / 'c.txt').write_text('猫坐在垫子上。今天天气很好。\n')
  (tmp_path / 'r.txt').write_text('猫坐在垫子上面。今天天气不错。\n')
  run(candidates=(tmp_path / 'c.txt',), references=(tmp_path / 'r.txt',), metrics=('bleu',))
  output = capsys.readouterr().out
  assert 'the references are Chinese, by their script' in output and '58.6395' in output and 'tok:zh' in output


@pytest.mark.parametrize('flags,message', [
    ({'metrics': ('blue',)}, "nearest is 'bleu'"), ({'stem': True, 'metrics': ('bleu',)}, 'stem=True is for rouge'),
    ({'metrics': ('exact_match',)}, 'lines without references'), ({'execute_code': True}, 'which is not given'),
    ({'metrics': ('distinct',), 'references': ('c',)}, 'not read'), ({'problems': 'c'}, '--execute_code allows it'),
    ({'problems': 'c', 'metrics': ('bleu',)}, 'pass@k alone')])
def test_flags_that_do_not_fit_together_are_refused(tmp_path, flags, message):
  file = lines(tmp_path / 'c.jsonl', [{'text': 'a', 'test': ''}])
  flags = {name: file if value == 'c' else (file,) if value == ('c',) else value for name, value in flags.items()}
  with pytest.raises(ValueError, match=message):
    run(candidates=(file,), **flags)


def test_an_absent_package_is_named_with_its_extra(tmp_path, monkeypatch, capsys):
  (tmp_path / 'c.txt').write_text('a\n')
  for name in [name for name in sys.modules if name.split('.')[0] in ('sacrebleu', 'rouge_score')]:
    monkeypatch.delitem(sys.modules, name)
  monkeypatch.setitem(sys.modules, 'sacrebleu', None)
  monkeypatch.setitem(sys.modules, 'rouge_score', None)
  for metric in 'bleu', 'rouge':
    with pytest.raises(ImportError, match=r"pip install 'lm\[eval\]'"):
      run(candidates=(tmp_path / 'c.txt',), references=(tmp_path / 'c.txt',), metrics=(metric,))


def test_pass_at_k_of_files(tmp_path, capsys):
  from lm.evaluate import texts
  try:
    texts.Sandbox().check()
  except OSError as error:
    pytest.skip(str(error))
  problems = lines(tmp_path / 'p.jsonl', [{'id': 'double', 'prompt': 'def f(x):\n', 'test': 'assert f(2) == 4'}])
  bodies = '2 * x', 'x', '1/0'
  samples = lines(tmp_path / 's.jsonl', [{'id': 'double', 'text': f'  return {body}'} for body in bodies])
  run(candidates=(samples,), problems=problems, execute_code=True, k=(1, 2), out=tmp_path / 'out')
  output = ' '.join(capsys.readouterr().out.split())
  assert 's/pass@1 0.3333' in output and 's/pass@2 0.6667' in output
  assert 's: passed: 1, AssertionError: 1, ZeroDivisionError: 1' in output
  record, = map(json.loads, (tmp_path / 'out/s.jsonl').read_text().splitlines())
  assert record == {'id': 'double', 'results': ['passed', 'AssertionError: ', 'ZeroDivisionError: division by zero']}
