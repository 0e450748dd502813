"""Damage of a checkpoint is noticed, named with its file, and passed over for the step before."""
import errno
import json
import os
import pathlib
import shutil

import jax
import numpy as np
import pytest
from helpers.checkpoint_states import abstract, fill, make_state, same_bytes
from helpers.faults import failing, faults

from lm.workdir import arrays, checkpoint

# The files of a step, by kind, without files of Orbax that nothing reads.
ARRAY_FILES = '_METADATA', 'array_metadatas/*', 'manifest.ocdbt', 'd/*', 'ocdbt.process_0/d/*'
KINDS = {'facts/metadata', *(f'{part}/{name}' for part in ('params', 'state') for name in ARRAY_FILES)}


def halve(path):
  path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


@pytest.mark.parametrize('damage', [halve, lambda path: path.write_bytes(b''), pathlib.Path.unlink],
                         ids=['halved', 'empty', 'missing'])
def test_falls_back_from_a_damaged_step_and_says_so(tmp_path, mesh, warned, damage, capfd):
  fill(tmp_path / 'whole', mesh)
  target, older, newer = abstract(make_state(mesh), mesh), make_state(mesh, 10, 10), make_state(mesh, 20, 20)
  fallen = set()
  for kind in sorted(KINDS):
    shutil.copytree(tmp_path / 'whole', tmp_path / 'run')
    for path in (tmp_path / 'run' / '20').glob(kind):
      damage(path)
    restored = checkpoint.Checkpoints(tmp_path / 'run').restore(target)
    assert same_bytes(restored.state, {10: older, 20: newer}[restored.step])
    assert len(warned) == (restored.step == 10)  # one line
    if warned:
      assert f'{tmp_path}/run/20 is damaged: ' in warned.pop()
      fallen.add(kind)
    shutil.rmtree(tmp_path / 'run')
  assert fallen == KINDS
  assert 'Traceback' not in capfd.readouterr().err


def test_a_flipped_bit_in_any_file_is_noticed(tmp_path, mesh, warned):
  fill(tmp_path / 'whole', mesh)
  target, older = abstract(make_state(mesh), mesh), make_state(mesh, 10, 10)
  rng = np.random.default_rng(0)
  for kind in sorted(KINDS):
    shutil.copytree(tmp_path / 'whole', tmp_path / 'run')
    for path in (tmp_path / 'run' / '20').glob(kind):
      data = bytearray(path.read_bytes())
      data[rng.integers(len(data))] ^= 1 << rng.integers(8)
      path.write_bytes(data)
      restored = checkpoint.Checkpoints(tmp_path / 'run').restore(target)
      assert restored.step == 10 and same_bytes(restored.state, older)
      name = path.relative_to(tmp_path / 'run' / '20')
      assert len(warned) == 1 and 'as it was written' in warned[0].replace('they were', 'it was')
      assert str(name) in warned.pop()
      assert checkpoint.Checkpoints(tmp_path / 'run').facts() == {'seen': 10 if kind.startswith('facts') else 20}
      warned.clear()
      path.write_bytes((tmp_path / 'whole' / '20' / name).read_bytes())
    shutil.rmtree(tmp_path / 'run')


def test_a_flipped_bit_among_checksums_or_in_a_later_metric_is_noticed(tmp_path, mesh, warned):
  """The file of checksums is named, and a metric that may be another one chooses no checkpoint."""
  with fill(tmp_path, mesh) as checkpoints:
    checkpoints.set_metric(20, 0.5)
  assert checkpoint.Checkpoints(tmp_path).best_step() == 20
  for name in 'checksums.json', 'metric.json':
    path = tmp_path / '20' / name
    data = path.read_bytes()
    for place in (0, data.index(b'0.5') if name == 'metric.json' else data.index(b'"params')):
      path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
      checkpoints = checkpoint.Checkpoints(tmp_path)
      assert checkpoints.best_step() is None
      if name == 'checksums.json':
        assert checkpoints.restore(abstract(make_state(mesh), mesh)).step == 10
        assert f'20 is damaged: {path} cannot be read as JSON' in warned.pop()
    path.write_bytes(data)


def test_a_checkpoint_without_checksums_is_read(tmp_path, mesh, warned):
  fill(tmp_path, mesh)
  (tmp_path / '20' / 'checksums.json').unlink()
  restored = checkpoint.Checkpoints(tmp_path).restore(abstract(make_state(mesh), mesh))
  assert restored.step == 20 and same_bytes(restored.state, make_state(mesh, 20, 20)) and not warned


def test_a_checkpoint_of_one_part_is_read(tmp_path, mesh, monkeypatch):
  """Earlier versions stored the parameters among the other arrays."""
  with monkeypatch.context() as patch:
    patch.setattr(arrays, 'parts', lambda state: {'state': state._asdict()})
    fill(tmp_path, mesh)
  for step in '10', '20':
    path = tmp_path / step / 'facts' / 'metadata'
    document = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in document.items() if name not in ('parts', 'permanent')}))
    (tmp_path / step / 'checksums.json').unlink()
  checkpoints, state = checkpoint.Checkpoints(tmp_path), make_state(mesh, 20, 20)
  assert same_bytes(checkpoints.restore(abstract(state, mesh)).state, state)
  assert same_bytes(checkpoints.restore_params(abstract(state, mesh).params).state, state.params)


@pytest.mark.parametrize('times, step', [(1, 20), (2, 10)])
def test_a_read_that_fails_once_is_repeated(tmp_path, mesh, warned, times, step):
  fill(tmp_path, mesh)
  with faults('open', r'/20/state/manifest', failing(errno.EIO, times)):
    restored = checkpoint.Checkpoints(tmp_path).restore(abstract(make_state(mesh), mesh))
  assert restored.step == step and len(warned) == (step == 10)


@pytest.mark.parametrize('number', [np.inf, np.nan, 1e30])
def test_parameters_that_are_not_finite_are_never_restored(tmp_path, mesh, warned, number):
  state = make_state(mesh, 20, 20)
  w = np.array(state.params['w'])
  w[63, 255] = number
  ruined = state._replace(params={**state.params, 'w': jax.device_put(w, state.params['w'].sharding)})
  # The state of an optimizer may hold infinities, parameters may not.
  infinite = state._replace(step=state.step * np.inf)
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    checkpoints.save(5, infinite, {})
    checkpoints.save(20, ruined._replace(step=infinite.step), {})
  target = abstract(infinite, mesh)
  assert checkpoint.Checkpoints(tmp_path).restore(target).step == 5
  assert checkpoint.Checkpoints(tmp_path).restore_params(target.params).step == 5
  assert len(warned) == 2 and '20 is damaged: the norm of its parameters is not finite' in warned[0]


def test_goes_on_over_a_damaged_step(tmp_path, mesh, warned):
  fill(tmp_path, mesh, [10, 20, 30], keep=3)
  for step, path in (20, 'state/_METADATA'), (30, 'facts/metadata'):
    (tmp_path / str(step) / path).write_text('{')
  with checkpoint.Checkpoints(tmp_path, keep=3) as checkpoints:
    assert checkpoints.facts() == {'seen': 20}
    assert checkpoints.restore(abstract(make_state(mesh), mesh)).step == 10
    assert [line.split(' is ')[0].rsplit('/')[-1] for line in warned] == ['30', '20']  # each is named once
    assert sorted(os.listdir(tmp_path)) == ['10', '20', '30']  # reading changes nothing
    checkpoints.save(20, make_state(mesh), {'seen': 'anew'})
  names = sorted(os.listdir(tmp_path))
  assert [name.split('-')[0] for name in names] == ['10', '20', '20.damaged', '30.damaged']
  assert checkpoint.Checkpoints(tmp_path).facts() == {'seen': 'anew'}


def test_never_starts_from_scratch_when_all_are_damaged(tmp_path, mesh):
  fill(tmp_path, mesh)
  for step in '10', '20':
    shutil.rmtree(tmp_path / step / 'state')
  checkpoints = checkpoint.Checkpoints(tmp_path)
  target = abstract(make_state(mesh), mesh)
  for _ in range(2):
    with pytest.raises(OSError, match='step 20 is damaged: .*step 10 is damaged: .*nothing was deleted.*from a copy'):
      checkpoints.restore(target)
  assert sorted(os.listdir(tmp_path)) == ['10', '20']
  with pytest.raises(FileNotFoundError, match=r'no step 15 in .*\[10, 20\]'):
    checkpoints.restore(target, step=15)


def test_a_damaged_step_that_is_named_is_not_replaced_by_another(tmp_path, mesh):
  checkpoints = fill(tmp_path, mesh)
  (tmp_path / '20/facts/metadata').unlink()
  with pytest.raises(OSError, match='step 20 is damaged'):
    checkpoints.facts(20)
