"""A suite is read strictly, resumes where it was stopped, and gives the same numbers during training."""
import json
import threading
import types

import jax
import numpy as np
import pytest

from lm.data.text import source
from lm.data.tokenizers.folder import Bytes
from lm.evaluate import evaluations, report, stored_measures, suites
from lm.models import transformer
from lm.objectives import next_token

TEXTS = [f'document {i} has some words, ' * (1 + i % 3) for i in range(150)]


@pytest.fixture(scope='module')
def subject():
  tokenizer = Bytes()
  model = transformer.llama(tokenizer.vocab_size, 16, 1, 2, max_length=48)
  return evaluations.Subject(model, jax.jit(model.init)(jax.random.key(0)), tokenizer, lambda: TEXTS)


def written(tmp_path, content):
  file = tmp_path / 'suite.json'
  file.write_text(content if isinstance(content, str) else json.dumps(content))
  return file


@pytest.mark.parametrize('content,message', [
    ('{', 'cannot be read as JSON'), ('[]', 'holds no JSON object'), ({}, 'has no evaluation'),
    ({'likelyhood': {}}, "'likelyhood', which is not known here; the nearest is 'likelihood'"),
    ({'likelihood': {'a': {'windw': 3}}}, "likelihood/a has 'windw', which is not known here; the nearest is 'window'"),
    ({'likelihood': {'a': {'limit': '3'}}}, 'limit="3", and what is needed is int | null'),
    ({'likelihood': {'a': {'limit': True}}}, 'limit=true'), ({'likelihood': {'a': {'limit': 1}}}, 'one document gives'),
    ({'likelihood': {'a': {'contexts': [8, 'x']}}}, 'contexts='), ({'likelihood': {'a/b': {}}}, "'a/b'"),
    ({'likelihood': {'a': {'text': 'x', 'jsonl': 'y'}}}, 'both name documents'),
    ({'likelihood': {'a': {'separator': 'x'}}}, 'text is not given'),
    ({'likelihood': {'a': {'key': 'x'}}}, 'jsonl is not given'),
    ({'likelihood': {'results': {}}}, "is called 'results'"),
    ('{"likelihood": {"a": {}, "a": {"limit": 3}}}', "has 'a' twice")])
def test_a_suite_that_is_none_is_refused_with_its_place(tmp_path, content, message):
  with pytest.raises(ValueError, match=message.replace('|', r'\|')):
    suites.read(written(tmp_path, content))


def test_documents_come_from_files_and_windows_are_obeyed(tmp_path, subject):
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'t': text}) + '\n' for text in TEXTS[:5]))
  file = written(tmp_path, {'likelihood': {'files': {'jsonl': str(tmp_path / 'a.jsonl'), 'key': 't', 'window': 32,
                                                     'stride': 8, 'contexts': [16, 32]}}})
  evaluation, = dict(suites.read(file).evaluations()).values()
  result = evaluation(subject)
  assert result.measures[0].rows.shape[0] == 5
  assert 'window:32|stride:8' in result.measures[0].signature
  by_context, = (curve for curve in result.curves if curve.name == 'loss_by_context')
  losses = {x: measure.interval().value for x, measure in by_context.points}
  assert list(losses) == [16, 32] and losses[32] == result.measures[0].interval().value != losses[16]


def test_a_suite_that_is_stopped_goes_on_and_gives_the_same_results(tmp_path, subject, monkeypatch, capsys):
  suite = suites.Suite({'a': evaluations.Likelihood(), 'b': evaluations.Likelihood(limit=3)})
  whole = suites.run(suite, subject, 'model 1', tmp_path / 'whole')
  scored, calls = evaluations.text_scores.scored, []

  def stopping(subject, texts, *args):
    calls.append(len(texts))
    if len(calls) == 3:
      raise KeyboardInterrupt
    return scored(subject, texts, *args)
  monkeypatch.setattr(evaluations.text_scores, 'scored', stopping)
  with pytest.raises(KeyboardInterrupt):
    suites.run(suite, subject, 'model 1', tmp_path / 'stopped')
  calls.clear()
  calls += [0] * 10
  assert suites.run(suite, subject, 'model 1', tmp_path / 'stopped') == whole
  assert calls[10:] == [22, 3]   # of 150 documents, 128 were measured before
  assert (tmp_path / 'stopped/results.json').read_text() == (tmp_path / 'whole/results.json').read_text()
  suites.run(suite, subject, 'model 1', tmp_path / 'stopped')
  assert calls[12:] == [] and 'measured before' in capsys.readouterr().out
  suites.run(suite, subject, 'model 2', tmp_path / 'stopped')
  assert calls[12:] == [64, 64, 22, 3]   # of another model, nothing is known


def test_a_kill_between_two_files_leaves_no_result_with_the_rows_of_other_settings(tmp_path, subject, monkeypatch):
  short, long = (suites.Suite({'a': evaluations.Likelihood(limit=limit)}) for limit in (3, 4))
  suites.run(short, subject, 'm', tmp_path)
  with monkeypatch.context() as patch:
    patch.setattr(suites.report, 'to_json', lambda result: 1 / 0)   # the rows are on disk then, and the result is not
    with pytest.raises(ZeroDivisionError):
      suites.run(long, subject, 'm', tmp_path)
  with pytest.raises(ValueError, match='run the same evaluation again'):
    stored_measures.read(tmp_path)
  suites.run(short, subject, 'm', tmp_path)
  assert {len(documents) for _, documents in stored_measures.read(tmp_path).values()} == {3}


def test_one_evaluation_after_another_writes_into_a_folder(tmp_path, subject, monkeypatch, capsys):
  suite = suites.Suite({'a': evaluations.Likelihood(limit=3)})
  scored, calls, waits = evaluations.text_scores.scored, [], threading.Event()

  def counted(*args):
    calls.append(args)
    second.start()
    assert waits.wait(20)
    return scored(*args)

  def shown(line, **settings):
    if line.startswith(f'waiting for the process that evaluates into {tmp_path}'):
      waits.set()
    print(line, **settings)
  monkeypatch.setattr(suites, 'print', shown, raising=False)
  monkeypatch.setattr(evaluations.text_scores, 'scored', counted)
  second = threading.Thread(target=suites.run, args=(suite, subject, 'm', tmp_path))
  suites.run(suite, subject, 'm', tmp_path)
  second.join()
  assert 'measured before' in capsys.readouterr().out and len(calls) == 1


def test_tables_and_json_have_every_number_with_its_interval(tmp_path, subject):
  results = suites.run(suites.Suite({'held': evaluations.Likelihood(limit=9)}), subject, 'm', tmp_path)
  stored = json.loads((tmp_path / 'results.json').read_text())
  for name, numbers in stored['results']['held']['metrics'].items():
    assert numbers['low'] < numbers['value'] < numbers['high'] and numbers['documents'] == 9
    line, = (line for line in (tmp_path / 'results.txt').read_text().splitlines() if f'held/{name} ' in line)
    assert all(report.number(numbers[key]) in line for key in ('low', 'value', 'high'))
  assert stored['versions']['jax'] == jax.__version__ and results['held']['curves']['reliability']['points']
  stored_rows = stored_measures.read(tmp_path)
  again = report.to_json(report.Result([measure for measure, _ in stored_rows.values()]))['metrics']
  assert again == results['held']['metrics'] and list(stored_rows) == [f'held/{name}' for name in again]
  for _, documents in stored_rows.values():
    assert documents == [source.digest(text).hex() for text in TEXTS[:9]]
  assert {file.name for file in tmp_path.glob('*.png')} == {'reliability.png', 'loss_by_position.png'}


def test_an_evaluator_in_training_gives_the_numbers_of_the_command(tmp_path, subject):
  class Data:
    tokenizer = subject.tokenizer
    documents = staticmethod(lambda split: TEXTS if split == 'validation' else 1 / 0)

  class Run:
    model, objective, data = subject.model, next_token.next_token(), types.SimpleNamespace(template=None)

  evaluate = suites.Evaluator(written(tmp_path, {'likelihood': {'held': {'limit': 9}}}))(Run, Data, None)
  metrics = evaluate(subject.params, 7)
  results = suites.run(suites.Suite({'held': evaluations.Likelihood(limit=9)}), subject, 'm', tmp_path / 'out')
  for name, numbers in results['held']['metrics'].items():
    assert metrics[f'held/{name}'] == numbers['value'] and metrics[f'held/{name}/low'] == numbers['low']
  assert np.isfinite(list(metrics.values())).all()
  assert evaluate.metric_names() == list(metrics)


def test_documents_that_were_changed_are_measured_again_and_faults_are_seen_before_anything_is_measured(
    tmp_path, subject, capsys):
  file = tmp_path / 'a.jsonl'
  file.write_text('{"text": "one text"}\n{"text": "two"}\n')
  suite = suites.Suite({'a': evaluations.Likelihood(jsonl=str(file))})
  first = suites.run(suite, subject, 'm', tmp_path / 'out')
  file.write_text('{"text": "one text"}\n{"text": "TWO"}\n')
  assert suites.run(suite, subject, 'm', tmp_path / 'out') != first
  assert 'measured before' not in capsys.readouterr().out
  for wrong in ({'text': str(tmp_path / 'absent')}, {'window': 1000}, {'contexts': (8, 0)}, {'stride': 60}):
    both = suites.Suite({'first': evaluations.Likelihood(), 'wrong': evaluations.Likelihood(**wrong)})
    with pytest.raises(ValueError, match='wrong: '):
      suites.run(both, subject, 'm', tmp_path / 'never')
  assert 'first' not in capsys.readouterr().out and not (tmp_path / 'never').exists()


def test_progress_writes_each_row_once_and_reads_the_rows_of_its_own_key_alone(tmp_path):
  rows = np.arange(20.).reshape(10, 2)
  first = suites._progress('a', tmp_path / 'a.partial', 'key 1')
  for count in (4, 8, 10):
    first.save(rows[:count])
  sizes = {file.name: len(np.load(file)['rows']) for file in (tmp_path / 'a.partial').iterdir()}
  assert sizes == {'0.npz': 4, '4.npz': 4, '8.npz': 2}
  np.testing.assert_array_equal(suites._progress('a', tmp_path / 'a.partial', 'key 1').load(), rows)
  other = suites._progress('a', tmp_path / 'a.partial', 'key 2')
  assert other.load() is None
  other.save(rows[:4] + 1)   # what the first one wrote behind these rows stays, and is not read
  resumed = suites._progress('a', tmp_path / 'a.partial', 'key 2')
  np.testing.assert_array_equal(resumed.load(), rows[:4] + 1)
  resumed.save(rows + 1)
  np.testing.assert_array_equal(suites._progress('a', tmp_path / 'a.partial', 'key 2').load(), rows + 1)


def test_text_that_is_no_unicode_is_refused_with_its_number_before_anything_is_measured(tmp_path, subject):
  subject = subject._replace(held_out=lambda: ['a', '', 'b\ud800'])
  with pytest.raises(ValueError, match=r'a: document 2 with text has .* at character 1'):
    suites.run(suites.Suite({'a': evaluations.Likelihood()}), subject, 'm', tmp_path)
