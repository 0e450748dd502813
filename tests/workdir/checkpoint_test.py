"""Checkpoints restore the same bytes on any mesh, and cast nothing silently."""
import os
import re
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.checkpoint_states import State, abstract, fill, make_mesh, make_state, same_bytes
from helpers.clusters import Service
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm.sharding import hosts
from lm.workdir import checkpoint, mismatch
from lm.workdir.judge import Judge
from lm.workdir.storage import Storage


@pytest.mark.parametrize('shape', [(8, 1), (4, 2), (1, 8), (1, 1)])
def test_restores_the_same_bytes_onto_any_mesh(tmp_path, mesh, shape):
  facts = {'data': {'position': 7, 'fingerprint': 'a"é'}, 'sizes': [1, 2.5, None, True], 'empty': {}}
  state = make_state(mesh)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore(abstract(state, mesh)) is None
    checkpoints.save(1, state, facts)
    target = abstract(state, make_mesh(*shape))
    restored = checkpoints.restore(target)
  assert (restored.facts, restored.step) == (facts, 1)
  assert isinstance(restored.state, State)
  assert same_bytes(restored.state, state)
  assert [x.sharding for x in jax.tree.leaves(restored.state)] == [x.sharding for x in jax.tree.leaves(target)]


def test_restores_params_alone(tmp_path, mesh):
  checkpoints = fill(tmp_path, mesh)
  state = make_state(mesh, 10, 10)
  target = abstract(state, make_mesh(1, 1)).params
  restored = checkpoints.restore_params(target, step=10)
  assert same_bytes(restored.state, state.params)
  assert restored.facts == checkpoints.facts(10) == {'seen': 10}
  with pytest.raises(mismatch.Mismatch, match=r"params\.h\.b: 'bfloat16\[16\]' before, absent now"):
    checkpoints.restore_params({'w': target['w']})


def test_params_are_read_without_the_bytes_of_the_optimizer(tmp_path, mesh, warned):
  fill(tmp_path, mesh)
  shutil.rmtree(tmp_path / '20' / 'state')
  state = make_state(mesh, 20, 20)
  checkpoints, target = checkpoint.Checkpoints(tmp_path, create=False), abstract(state, mesh)
  assert same_bytes(checkpoints.restore_params(target.params).state, state.params) and not warned
  assert checkpoints.restore(target).step == 10   # the whole state is not to be had
  assert len(warned) == 1 and '20 is damaged' in warned[0]


def test_params_are_cast_on_request_alone(tmp_path, mesh):
  checkpoints, params = fill(tmp_path, mesh), make_state(mesh, 10, 10).params
  target = jax.tree.map(lambda x: x.update(dtype=jnp.float16), abstract(params, make_mesh(1, 1)))
  with pytest.raises(mismatch.Mismatch, match='bfloat16'):
    checkpoints.restore_params(target, step=10)
  assert same_bytes(checkpoints.restore_params(target, 10, lambda stored: stored).state, params)
  assert same_bytes(checkpoints.restore_params(target, 10, lambda stored: jnp.float32).state,
                    jax.tree.map(lambda x: x.astype(jnp.float32), params))
  target['w'] = target['w'].update(shape=(64, 255))
  with pytest.raises(mismatch.Mismatch, match=r'params\.w: .\[64, 256\]. before, .\[64, 255\]. now'):
    checkpoints.restore_params(target, 10, lambda stored: stored)


@pytest.mark.slow
def test_arrays_are_written_in_small_files(tmp_path):
  """Each file is held in memory before it is written."""
  x = np.random.default_rng(0).integers(0, 256, (6, 1 << 20, 12)).astype(np.uint8)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {'x': jnp.asarray(x)}, {})
    checkpoints.wait()
    assert np.array_equal(checkpoints.restore({'x': jax.ShapeDtypeStruct(x.shape, x.dtype)}).state['x'], x)
  sizes = [path.stat().st_size for path in tmp_path.rglob('*') if path.is_file()]
  assert sum(sizes) > 0.99 * x.size and max(sizes) < 1 << 25


def test_a_state_may_be_donated_after_save(tmp_path, mesh):
  x = jax.device_put(np.random.default_rng(0).normal(size=(2048, 2048)).astype('f4'), NamedSharding(mesh, P('data')))
  before, target = np.array(x), jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {'x': x}, {})
    for _ in range(5):
      x = step(x)
    restored = checkpoints.restore({'x': target}).state['x']
  np.testing.assert_array_equal(restored, before)


@pytest.mark.parametrize('keep_best', [True, False])
def test_keeps_the_last_and_the_best(tmp_path, mesh, keep_best):
  losses = [5, 1, None, float('nan'), 1.5, 2, 3]
  checkpoints = fill(tmp_path, mesh, range(1, 8), losses, keep=2, keep_best=keep_best)
  assert checkpoints.steps() == ([2, 6, 7] if keep_best else [6, 7])
  assert sorted(os.listdir(tmp_path)) == [str(n) for n in checkpoints.steps()]
  assert checkpoints.best_step() == (2 if keep_best else 6)
  checkpoints.save(8, make_state(mesh), {}, metric=0.5)  # a reopened folder knows the metrics of the earlier steps
  checkpoints.close()
  assert checkpoints.steps() == [7, 8]
  assert checkpoints.best_step() == 8


def test_a_damaged_step_that_cannot_be_renamed_is_an_error_in_all_processes(tmp_path, monkeypatch):
  """No process waits for process 0, which is the one that cannot rename it."""
  storage, service, errors = Storage(tmp_path, set, only_reads=True), Service(), []
  monkeypatch.setattr(hosts, '_client', lambda: service)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  for index in range(2):
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    monkeypatch.setattr(hosts, '_values', hosts.Channel('test'))
    with pytest.raises(OSError, match='of step 3 in .* cannot be renamed to 3.damaged-1: .*No such') as raised:
      storage.set_aside(3, '3.damaged-1')
    errors.append(str(raised.value))
  assert errors[0] == errors[1]


def test_processes_that_wait_for_one_that_failed_fail_too(tmp_path, monkeypatch):
  """The one that failed is at the end of the save, where it waits until the others have come too."""
  storage, (written, end) = Storage(tmp_path, set), ('async_write_complete.2', 'Holder:set_value_start')
  points = iter([[written, written], [end, written], [end, written], [end, end]])
  monkeypatch.setattr(storage, '_points', types.SimpleNamespace(from_all=lambda key: next(points)))
  storage._meet(written, 1)
  with pytest.raises(OSError, match='^process 0 could not write its part$'):
    storage._meet(written, 1)
  storage._meet(end, 1)
  assert next(points, None) is None


def test_a_checkpoint_that_only_some_processes_see_is_not_read(tmp_path, mesh, monkeypatch):
  checkpoints = fill(tmp_path, mesh, [1, 2, 3])
  monkeypatch.setattr(hosts, 'from_all', lambda value: [value, [1, 2]] if value == [1, 2, 3] else [value])
  assert checkpoints.restore(abstract(make_state(mesh), mesh)).step == 2
  monkeypatch.setattr(hosts, 'from_all', lambda value: [value, []])
  with pytest.raises(OSError, match=r'is seen by all processes, which see \[\[1, 2, 3\], \[\]\], in their order; give'):
    checkpoints.steps_of_all()


@pytest.mark.parametrize('damaged', [False, True])
def test_permanent_steps_stay_also_where_their_facts_cannot_be_read(tmp_path, mesh, damaged):
  with checkpoint.Checkpoints(tmp_path, keep=1) as checkpoints:
    for step in 1, 2, 3:
      checkpoints.save(step, make_state(mesh), {}, permanent=step == 2)
  if damaged:
    (tmp_path / '2' / 'facts' / 'metadata').write_text('{')
  assert fill(tmp_path, mesh, [4], keep=1).steps() == [2, 4]


@pytest.mark.parametrize('change, line', [
    (lambda s: s._replace(params={**s.params, 'w': s.params['w'].update(dtype=jnp.bfloat16)}),
     "params.w: 'float32[64, 256]' before, 'bfloat16[64, 256]' now"),
    (lambda s: s._replace(params={**s.params, 'w': s.params['w'].update(shape=(64, 128))}),
     "params.w: 'float32[64, 256]' before, 'float32[64, 128]' now"),
    (lambda s: s._replace(params={**s.params, 'new': s.params['w']}),
     "params.new: absent before, 'float32[64, 256]' now"),
    (lambda s: s._replace(opt_state=()), 'holds the state of another optimizer'),
], ids=['dtype', 'shape', 'new', 'another optimizer'])
def test_names_the_leaf_that_does_not_fit(tmp_path, mesh, warned, change, line):
  checkpoints = fill(tmp_path, mesh)
  with pytest.raises(mismatch.Mismatch, match=re.escape(line)):
    checkpoints.restore(change(abstract(make_state(mesh), mesh)))
  assert not warned  # a whole checkpoint of another model is not a damaged one


def test_other_files_in_the_folder_are_left_alone(tmp_path, mesh):
  for name in 'notes', 'my.orbax-checkpoint-tmp', '7.damaged-20250101-000000', '009', 'x1':
    (tmp_path / name).mkdir()
  (tmp_path / '3').write_text('a file')
  before = set(os.listdir(tmp_path))
  checkpoints = fill(tmp_path, mesh, range(10, 15), keep=1)
  assert checkpoints.steps() == [14]
  assert set(os.listdir(tmp_path)) == before | {'14'}


def test_unfinished_saves_are_ignored_and_removed_by_the_next_save(tmp_path, mesh):
  fill(tmp_path, mesh, [10])
  for name in '20.orbax-checkpoint-tmp', '7.orbax-checkpoint-tmp-1700000000000':
    shutil.copytree(tmp_path / '10', tmp_path / name)
  before = sorted(os.listdir(tmp_path))
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.steps() == [10] and checkpoints.restore(abstract(make_state(mesh), mesh)).step == 10
    assert sorted(os.listdir(tmp_path)) == before   # reading changes nothing
    checkpoints.save(20, make_state(mesh, 20, 20), {'seen': 20})
  assert sorted(os.listdir(tmp_path)) == ['10', '20']


def test_refuses_to_go_back_and_bad_arguments(tmp_path, mesh):
  checkpoints = fill(tmp_path, mesh)
  for step in 20, 15:
    with pytest.raises(ValueError, match=f'step {step} cannot be saved after step 20 '):
      checkpoints.save(step, make_state(mesh), {})
  with pytest.raises(TypeError, match='JSON'):
    checkpoints.save(30, make_state(mesh), {'a': object()})
  with pytest.raises(ValueError, match='keep=0'):
    checkpoint.Checkpoints(tmp_path, keep=0)
  with pytest.raises(FileNotFoundError, match='no folder .*absent'):
    checkpoint.Checkpoints(tmp_path / 'absent', create=False)
  assert not (tmp_path / 'absent').exists()
  (tmp_path / 'file').write_text('')
  for path in tmp_path / 'file', tmp_path / 'file' / 'in' / 'the way':
    with pytest.raises(OSError, match=f'checkpoints cannot be written to {path}'):
      checkpoint.Checkpoints(path)


def test_the_best_is_the_last_among_equals(tmp_path, mesh):
  checkpoints = fill(tmp_path, mesh, range(1, 6), [2., 1., 1., 3., 2.], keep=1)
  assert checkpoints.best_step() == 3 and checkpoints.steps() == [3, 5] and checkpoints.best_metric() == 1
  checkpoints.close()


def test_metrics_stored_without_a_name_are_validation_losses(tmp_path, mesh):
  with checkpoint.Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, make_state(mesh), {'objective': 'a'})
  (tmp_path / '1' / 'metric.json').write_text('[0.5, "a"]')
  assert Judge.of({'facts': {'objective': 'a'}, 'metric': 0.5}) == Judge('a')
  for judge, metric in ((Judge('a'), 0.5), (Judge('b'), None), (Judge('a', 'validation/accuracy', 'higher'), None)):
    assert checkpoint.Checkpoints(tmp_path, judged_by=judge).best_metric() == metric
