"""Tasks of the harness are measured in a suite, and by its command line."""
import json
import math
import os
import pathlib
import shutil
import types

import pytest

from lm.evaluate import evaluations, harness, stored_measures, suites

pytestmark = pytest.mark.filterwarnings('ignore')   # of the libraries that the harness imports
ROOT = pathlib.Path(__file__).parents[3]
TASKS = str(ROOT / 'experiments/tasks')


@pytest.fixture
def subject(library, parts):
  return evaluations.Subject(*parts, list)


def test_tasks_of_a_suite_have_the_numbers_of_the_harness_with_intervals(tmp_path, subject):
  file = tmp_path / 'suite.json'
  file.write_text(json.dumps({'harness': {
      'choice': {'tasks': ['lm_everyday'], 'include_path': TASKS, 'num_fewshot': 1},
      'both': {'tasks': ['lm_opposites', 'lm_paragraphs'], 'include_path': TASKS, 'limit': 3, 'max_tokens': 2}}}))
  results = suites.run(suites.read(file), subject, 'm', tmp_path)
  noted = {line.split(' of lm')[0]: line.split(': ')[1].split(',')[0] for result in results.values()
           for line in result['notes']}
  metrics = {name: numbers for result in results.values() for name, numbers in result['metrics'].items()}
  assert set(metrics) == set(noted) and {numbers['documents'] for numbers in metrics.values()} == {12, 3}
  for name, numbers in metrics.items():
    assert math.isclose(numbers['value'], float(noted[name]), rel_tol=1e-4), name
    assert numbers['low'] <= numbers['value'] <= numbers['high']
  assert 'fewshot:1' in metrics['lm_everyday/acc']['signature'] and metrics['lm_everyday/acc']['better'] == 'higher'
  assert metrics['lm_paragraphs/bits_per_byte']['better'] == 'lower'
  declared = [name for _, evaluation in suites.read(file).evaluations() for name in evaluation.metric_names()]
  assert sorted(declared) == sorted(metrics)
  stored = stored_measures.read(tmp_path)
  assert list(stored) == ['choice/lm_everyday/acc', 'choice/lm_everyday/acc_norm']
  assert len(set(stored['choice/lm_everyday/acc'].documents)) == 12


def test_the_harness_forks_no_process_that_has_threads(tmp_path, subject, monkeypatch):
  def refused(*args):
    raise AssertionError('a process was forked')
  for name in ('local_files.py', 'everyday.jsonl'):
    shutil.copy(f'{TASKS}/{name}', tmp_path)
  (tmp_path / 'words.yaml').write_text('''{task: lm_words, output_type: loglikelihood, test_split: test,
    custom_dataset: !function local_files.load, dataset_kwargs: {file: everyday.jsonl}, doc_to_text: "{{question}}",
    doc_to_target: " {{choices[answer]}}", metric_list: [{metric: perplexity}], metadata: {version: 1.0}}''')
  monkeypatch.setattr('multiprocessing.Pool', refused)
  result = harness.Harness(('lm_words',), str(tmp_path))(subject)
  assert [measure.name for measure in result.measures] == ['lm_words/perplexity']
  assert 'DISABLE_MULTIPROC' not in os.environ and 'standard error' in result.notes[0]


def test_documents_without_a_value_add_nothing_and_the_others_keep_their_places(tmp_path, subject):
  for name in ('local_files.py', 'everyday.jsonl'):
    shutil.copy(f'{TASKS}/{name}', tmp_path)
  (tmp_path / 'skip.py').write_text('''def score(doc, results):
    return {'length': 0. + len(doc['question'])} if doc['answer'] else {}''')
  (tmp_path / 'skips.yaml').write_text('''{task: lm_skips, output_type: loglikelihood, test_split: test,
    custom_dataset: !function local_files.load, dataset_kwargs: {file: everyday.jsonl}, doc_to_text: "{{question}}",
    doc_to_target: " {{choices[answer]}}", process_results: !function skip.score, metadata: {version: 1.0},
    metric_list: [{metric: length, aggregation: mean, higher_is_better: true}]}''')
  result = harness.Harness(('lm_skips',), str(tmp_path))(subject)
  measure, = result.measures
  lines = [json.loads(line) for line in (tmp_path / 'everyday.jsonl').read_text().splitlines()]
  expected = [[len(line['question']), 1] if line['answer'] else [0, 0] for line in lines]
  assert measure.rows.tolist() == expected and 0 < sum(row == [0, 0] for row in expected) < 12
  assert len(result.documents) == 12 and math.isclose(measure.interval().value, float(
      result.notes[0].split(': ')[1].split(',')[0]), rel_tol=1e-5)
  assert 'of 12 documents no value' in result.notes[1]
  assert harness.Harness(('lm_skips',), str(tmp_path)).metric_names() == ['lm_skips/']


def test_what_does_not_exist_is_refused_before_anything_is_measured(tmp_path, subject, monkeypatch):
  def suite(**settings):
    file = tmp_path / 'suite.json'
    file.write_text(json.dumps({'harness': {'a': settings}}))
    return suites.read(file)
  names = ('lm_everyday', 'lm_paragraphs', 'lm_opposites')
  manager = types.SimpleNamespace(all_tasks=names)
  monkeypatch.setattr('lm_eval.tasks.TaskManager', lambda include_path, include_defaults=True: manager)
  with pytest.raises(ValueError, match="no task 'lm_everyda' .*; the nearest is 'lm_everyday'"):
    suites.run(suite(tasks=['lm_everyda'], include_path=TASKS), subject, 'm', tmp_path)
  with pytest.raises(ValueError, match='is no folder'):
    suites.run(suite(tasks=['x'], include_path=str(tmp_path / 'missing')), subject, 'm', tmp_path)
  for settings, message in (({'tasks': []}, 'has no task'), ({'tasks': ['a'], 'limit': 0}, 'limit=0'),
                            ({'tasks': ['a'], 'num_fewshot': -1}, 'num_fewshot=-1'), ({}, 'tasks')):
    with pytest.raises(ValueError, match=message):
      suite(**settings)


def test_a_missing_extra_is_named(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'lm_eval.tasks', None)
  with pytest.raises(ImportError, match=r"pip install 'lm\[eval\]'"):
    harness.task_manager(('another_task',))


def test_the_command_line_refuses_what_it_does_not_obey(library):
  from lm_eval.api import registry

  def opened(path: str | None = None, best: bool = False):
    return {'path': path}
  harness.register('lm-test', opened)
  cls = registry.get_model('lm-test')
  assert cls.create_from_arg_obj({'path': 'x'}, {'batch_size': 1, 'device': 'cuda:0'}) == {'path': 'x'}
  for name, value in (('batch_size', 8), ('device', 'cpu')):
    with pytest.raises(ValueError, match=f'--{name}={value} is not needed'):
      cls.create_from_arg_obj({'path': 'x'}, {name: value})
  with pytest.raises(ValueError, match='--model_args has dtype=float32, .* of --model lm-test; .* one of path, best'):
    cls.create_from_arg_obj({'path': 'x', 'dtype': 'float32'})
  for values, message in (({'path': 123}, 'path=123, and what is needed is .*; give text in quotes, \'"123"\''),
                          ({'best': 'yes'}, 'best=yes, and what is needed is bool; give True or False'),
                          ({'best': 1}, 'best=1')):
    with pytest.raises(ValueError, match=f'--model_args has {message}'):
      cls.create_from_arg_obj({'path': 'x', **values})
  for words in (['--device', 'cuda:0'], ['run', '--device=cuda:0'], ['--dev', 'cpu']):
    with pytest.raises(ValueError, match='--dev.* is not needed: the model is on all devices'):
      harness.register('lm-test', opened, words)
