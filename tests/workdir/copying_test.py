"""A copy has the bytes of the run, opens like it, and is never taken for a whole one before it is."""
import errno
import itertools
import json
import os

import jax
import numpy as np
import pytest
from etils.epath import testing
from helpers.faults import faults

from lm.workdir import checkpoint, copying

STATE = {'params': {'w': np.arange(1000.)}, 'count': np.int32(3)}
OTHERS = {'run.json': '[{"script": "a.py", "seed": 0}]', 'metrics.jsonl': '{"step": 1}\n', 'data/tokens.bin': 'abc'}


def contents(folder):
  return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def restored(folder):
  with checkpoint.Checkpoints(folder / 'checkpoints', create=False) as checkpoints:
    return checkpoints.restore(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), STATE))


@pytest.fixture(scope='module')
def original(tmp_path_factory):
  """Returns a workdir with checkpoints of the steps 1 and 2, and what a copy leaves out."""
  workdir = tmp_path_factory.mktemp('original') / 'run'
  with checkpoint.Checkpoints(workdir / 'checkpoints') as checkpoints:
    for step in 1, 2:
      checkpoints.save(step, STATE, {'step': step})
  for name, text in OTHERS.items():
    (workdir / name).parent.mkdir(exist_ok=True)
    (workdir / name).write_text(text)
  return workdir


@pytest.fixture
def run(original, tmp_path):
  copying.copy(original, tmp_path / 'run', progress=lambda line: None)
  return tmp_path / 'run'


@pytest.fixture(params=[True, False], ids=['renames', 'object store'])
def storage(request, monkeypatch):
  monkeypatch.setattr(copying, '_can_rename', lambda path: request.param)
  return request.param


def test_a_copy_has_the_same_files_and_opens(original, run, tmp_path, storage):
  for name in '.lock', 'checkpoints/3.orbax-checkpoint-tmp/x', 'checkpoints/1.damaged-1/x', 'run.json.7.new':
    (run / name).parent.mkdir(exist_ok=True)
    (run / name).write_text('')
  copying.copy(run, tmp_path / 'a' / 'copy')
  assert contents(tmp_path / 'a' / 'copy') == contents(original)
  again = restored(tmp_path / 'a' / 'copy')
  assert again.facts == {'step': 2} and np.array_equal(again.state['params']['w'], STATE['params']['w'])


def test_one_checkpoint_is_copied(original, tmp_path):
  copying.copy(original, tmp_path / 'copy', step=1)
  assert contents(tmp_path / 'copy') == {
      name: data for name, data in contents(original).items() if not name.startswith('checkpoints/2/')}
  with pytest.raises(FileNotFoundError, match=r'no checkpoint of step 7; its steps are \[1, 2\]'):
    copying.copy(original, tmp_path / 'other', step=7)


@pytest.mark.parametrize('opened', [0, 1, 20, 61, 80])
def test_a_copy_that_is_cut_short_is_continued(original, tmp_path, storage, opened):
  target, calls = tmp_path / 'copy', itertools.count()

  def fault():
    if next(calls) >= opened:
      raise OSError(errno.EIO, os.strerror(errno.EIO))

  with faults('open', f'{target}/(?!.unfinished)', fault), pytest.raises(OSError, match='Input/output'):
    copying.copy(original, target)
  assert not (target / 'run.json').exists()
  for step in copying._steps(target):   # what is there is whole
    name = f'checkpoints/{step}'
    assert contents(target / name) == contents(original / name)
  copying.copy(original, target)
  assert contents(target) == contents(original)


def test_files_that_are_there_are_not_copied_again_and_damaged_ones_are(original, run, capsys):
  copying.copy(original, run)
  assert capsys.readouterr().out.count(' files, 0 of them copied') == 3
  path = max((run / 'checkpoints' / '2' / 'params').rglob('d/*'), key=lambda path: path.stat().st_size)
  data = path.read_bytes()
  path.write_bytes(data[:50] + bytes([data[50] ^ 1]) + data[51:])
  copying.copy(original, run)
  assert path.read_bytes() == data


def test_a_damaged_checkpoint_is_named_and_not_copied(run, tmp_path):
  path = next(path for path in (run / 'checkpoints' / '2' / 'state').rglob('d/*') if path.is_file())
  path.write_bytes(path.read_bytes()[:-1] + b'x')
  with pytest.raises(ValueError, match=f'{path} is not as it was written; copy another checkpoint, by --step'):
    copying.copy(run, tmp_path / 'copy')
  assert not (tmp_path / 'copy' / 'checkpoints' / '2').exists()
  copying.copy(run, tmp_path / 'copy', step=1)
  assert restored(tmp_path / 'copy').facts == {'step': 1}
  path.unlink()
  with pytest.raises(ValueError, match=f'2 is damaged: state/.*{path.name} is missing'):
    copying.copy(run, tmp_path / 'copy')


def test_only_an_earlier_copy_is_written_over(original, run, tmp_path):
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'notes.txt').write_text('')
  for target in tmp_path / 'full', original, original / 'checkpoints', original.parent:
    with pytest.raises(ValueError, match=f'{target} .*; choose another folder'):
      copying.copy(original, target)
  (run / 'run.json').write_text(json.dumps([{'script': 'a.py', 'seed': 1}]))
  with pytest.raises(ValueError, match='no earlier copy of'):
    copying.copy(original, run)
  (run / 'run.json').write_text(json.dumps([{'script': 'a.py', 'seed': 0}] * 2))   # it has trained on since
  with pytest.raises(ValueError, match='no earlier copy of'):
    copying.copy(original, run)


def test_on_an_object_store_the_file_that_finishes_a_checkpoint_is_written_last(original, tmp_path, monkeypatch):
  """Without a cloud, etils writes gs://bucket/run into a local folder."""
  monkeypatch.chdir(tmp_path)
  opened = []

  def record(original_open, path, mode):
    opened.append((str(path), mode))
    return original_open(path, mode)

  with testing.mock_epath(open=record):
    copying.copy(original, 'gs://bucket/run')
  assert contents(tmp_path / 'gs:' / 'bucket' / 'run') == contents(original)
  written = [path.removeprefix('gs://bucket/run/') for path, mode in opened if 'w' in mode]
  for step in '1', '2':
    of_step = [path for path in written if path.startswith(f'checkpoints/{step}/')]
    assert of_step[-1] == f'checkpoints/{step}/commit_success.txt'
  assert written[-1] == 'run.json' and not any('.copying' in path for path in written)
