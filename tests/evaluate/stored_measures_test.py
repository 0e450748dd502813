"""Measures on disk give the numbers of those in memory, and name their documents."""
import json

import numpy as np
import pytest

from lm.evaluate import likelihood, measures, report, stored_measures
from lm.evaluate.measures import Measure

ROWS = np.random.default_rng(0).uniform(1, 5, (20, likelihood.COLUMNS))
DOCUMENTS = [f'document {i}' for i in range(20)]


def test_every_measure_of_likelihood_is_read_as_it_was_written(tmp_path):
  result = report.Result(likelihood.measures(ROWS, 'settings'), documents=DOCUMENTS)
  stored_measures.write(stored_measures.file_of(tmp_path, 'books'), result)
  stored = stored_measures.read(tmp_path)
  assert list(stored) == [f'books/{measure.name}' for measure in result.measures] and len(stored) == 6
  for before, (after, documents) in zip(result.measures, stored.values()):
    assert after.interval() == before.interval() and documents == DOCUMENTS
    assert (after.name, after.better, after.signature) == (before.name, before.better, before.signature)


def test_what_has_no_rows_of_documents_or_another_function_is_left_out(tmp_path):
  good = measures.mean('good', range(20), 'higher')
  others = [measures.mean('few', range(3), 'higher'), Measure('own', ROWS, lambda sums: sums[..., 0], 'higher')]
  stored_measures.write(stored_measures.file_of(tmp_path, 'a'), report.Result([*others, good], documents=DOCUMENTS))
  assert list(stored_measures.read(tmp_path)) == ['a/good']


def test_a_folder_without_rows_and_a_function_that_may_not_be_called_are_refused(tmp_path):
  with pytest.raises(FileNotFoundError, match='has no results with what each document adds'):
    stored_measures.read(tmp_path)
  description = {**measures.mean('m', [1.], '')._asdict(), 'rows': None, 'value': {'function': 'os:system'}}
  np.savez(stored_measures.file_of(tmp_path, 'a'), descriptions=json.dumps([description]), documents='["x"]',
           rows0=np.ones((1, 2)))
  with pytest.raises(ValueError, match='os:system is not a class or function of this package'):
    stored_measures.read(tmp_path)
