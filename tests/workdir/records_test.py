"""run.json records each run; a workdir belongs to one script, and to one process at a time."""
import os
import pathlib

import pytest

from lm.workdir import records


def claim(folder, script):
  with records.claim(folder, script):
    pass


def test_the_record_keeps_earlier_runs_and_adds_facts_to_the_last(tmp_path):
  claim(tmp_path / 'new', 'a.py')
  records.start(tmp_path / 'new', script='a.py', folder=pathlib.Path('x'))
  claim(tmp_path / 'new', 'a.py')
  records.start(tmp_path / 'new', script='a.py')
  records.add(tmp_path / 'new', data='f00d')
  assert records.read(tmp_path / 'new') == [{'script': 'a.py', 'folder': 'x'}, {'script': 'a.py', 'data': 'f00d'}]
  with pytest.raises(ValueError, match='a.py, not of b.py'):
    claim(tmp_path / 'new', 'b.py')


def test_a_workdir_that_cannot_be_written_is_named(tmp_path, monkeypatch):
  (tmp_path / 'file').write_text('')
  for folder in (tmp_path / 'file', tmp_path / 'file' / 'below'):
    with pytest.raises(OSError, match='cannot write to the workdir'):
      claim(folder, 'a.py')
  monkeypatch.setattr(os, 'access', lambda *_: False)
  with pytest.raises(OSError, match=r'permission denied.*--workdir'):
    claim(tmp_path, 'a.py')


def test_steps_that_were_fitted_to_a_time_stay_the_same():
  earlier = [{'steps': 5}, {'steps': 7}, {}]
  assert records.with_stored_steps({'lr': 1., 'steps': None}, earlier) == {'lr': 1., 'steps': 7}
  assert records.with_stored_steps({'steps': 9}, earlier) == {'steps': 9}
  assert records.with_stored_steps({'steps': None}, []) == {'steps': None}
  assert records.with_stored_steps({'lr': 1.}, earlier) == {'lr': 1.}


def test_a_workdir_is_one_process_at_a_time(tmp_path):
  with records.claim(tmp_path, 'a.py'), pytest.raises(OSError, match='another process is training in the workdir'):
    claim(tmp_path, 'a.py')
  claim(tmp_path, 'a.py')


@pytest.mark.parametrize('text', ['{}', '[3]', '{', ''])
def test_a_damaged_record_is_said_to_be_so(tmp_path, text):
  (tmp_path / 'run.json').write_text(text)
  with pytest.raises(ValueError, match=r'run\.json is damaged'):
    records.read(tmp_path)
