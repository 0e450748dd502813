"""Measures on disk give the numbers of those in memory, and name their documents."""
import json

import numpy as np
import pytest

from lm.evaluate import likelihood, measures, report, stored_measures
from lm.evaluate.measures import Measure

ROWS = np.random.default_rng(0).uniform(1, 5, (20, likelihood.COLUMNS))
DOCUMENTS = [f'document {i}' for i in range(20)]


def written(folder, **results):
  """A folder of results, of evaluations by name."""
  folder.mkdir(exist_ok=True)
  for name, result in results.items():
    stored_measures.write(stored_measures.file_of(folder, name), result, {'evaluation': name, 'model': 'm'})
  settings = {'evaluations': {name: name for name in results}, 'model': 'm'}
  report.write(folder, settings, {name: report.to_json(result) for name, result in results.items()})
  return folder


def test_every_measure_of_likelihood_is_read_as_it_was_written(tmp_path):
  result = report.Result(likelihood.measures(ROWS, 'settings'), documents=DOCUMENTS)
  written(tmp_path, books=result)
  stored = stored_measures.read(tmp_path)
  assert list(stored) == [f'books/{measure.name}' for measure in result.measures] and len(stored) == 6
  for before, (after, documents) in zip(result.measures, stored.values()):
    assert after.interval() == before.interval() and documents == DOCUMENTS
    assert (after.name, after.better, after.signature) == (before.name, before.better, before.signature)


def test_what_has_no_rows_of_documents_or_another_function_is_left_out(tmp_path):
  good = measures.mean('good', range(20), 'higher')
  others = [measures.mean('few', range(3), 'higher'), Measure('own', ROWS, lambda sums: sums[..., 0], 'higher')]
  written(tmp_path, a=report.Result([*others, good], documents=DOCUMENTS))
  assert list(stored_measures.read(tmp_path)) == ['a/good']


def test_a_folder_without_rows_and_a_function_that_may_not_be_called_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='has no results with what each document adds'):
    stored_measures.read(tmp_path)
  (tmp_path / 'results.json').write_text('{"results": {"a": {}, "b": {}}, "settings": {"evaluations": {"a": 1}}}')
  description = {**measures.mean('m', [1.], '')._asdict(), 'rows': None, 'value': {'function': 'os:system'}}
  np.savez(stored_measures.file_of(tmp_path, 'a'), descriptions=json.dumps([description]), documents='["x"]',
           rows0=np.ones((1, 2)), key='{"evaluation": 1, "model": null}')
  with pytest.raises(ValueError, match='os:system is not a class or function of this package'):
    stored_measures.read(tmp_path)


def test_an_evaluation_that_results_do_not_have_any_longer_is_not_read(tmp_path):
  written(tmp_path, old=report.Result([measures.mean('m', range(20), '')], documents=DOCUMENTS))
  written(tmp_path, new=report.Result([measures.mean('m', range(20), '')], documents=DOCUMENTS))
  assert list(stored_measures.read(tmp_path)) == ['new/m']


def test_rows_of_other_settings_than_the_results_are_refused(tmp_path):
  result = report.Result([measures.mean('m', range(20), '')], documents=DOCUMENTS)
  written(tmp_path, a=result)
  for key in ({'evaluation': 'other', 'model': 'm'}, {'evaluation': 'a', 'model': 'other'}, None):   # as after a kill
    stored_measures.write(stored_measures.file_of(tmp_path, 'a'), result, key)
    with pytest.raises(ValueError, match='is not of the settings in results.json'):
      stored_measures.read(tmp_path)


def test_documents_are_paired_in_any_order(tmp_path):
  """Of equal documents too. The second system has 1 more on each document, in another order."""
  scores, documents = np.arange(6.), ['a', 'b', 'c', 'c', 'd', 'e']
  one = report.Result([measures.mean('m', scores, '')], documents=documents)
  order = [5, 4, 2, 3, 1, 0]
  other = report.Result([measures.mean('m', scores[order] + 1, '')], documents=[documents[i] for i in order])
  systems = {name: stored_measures.read(written(tmp_path / name, x=result))
             for name, result in {'one': one, 'other': other}.items()}
  first, second = (measured['x/m'] for measured in stored_measures.paired(systems).values())
  assert first.name == 'x/m' and (second.rows - first.rows == [1, 0]).all()
  lacking = stored_measures.read(written(tmp_path / 'z', x=other._replace(documents=[*'abcde', 'f'])))
  with pytest.raises(ValueError, match='x/m: 1 of 6 documents of one are not in z, which has 1 others'):
    stored_measures.paired({'one': systems['one'], 'z': lacking})
  with pytest.raises(ValueError, match='no evaluation in common; one has x/m'):
    stored_measures.paired({'one': systems['one'], 'z': stored_measures.read(written(tmp_path / 'y', y=other))})
