"""Training resumes after any stop as if uninterrupted, is the same on any mesh, and refuses what cannot work."""
import dataclasses
import itertools
import json
import signal

import jax
import numpy as np
import optax
import pytest
from helpers.meshes import mesh_of
from helpers.runs import RUN, Bigram, Data, V, go, logged, same, saved, steps_kept
from helpers.slow import slow

from lm import optim, train
from lm.models import transformer
from lm.objectives import objective
from lm.objectives.next_token import next_token
from lm.train import loop, validation
from lm.train.guard import Guard
from lm.train.interrupt import Interrupt
from lm.workdir import checkpoint, mismatch, records, track

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  """Returns the workdir of an uninterrupted run."""
  workdir = tmp_path_factory.mktemp('whole')
  result = go(workdir)
  assert result.finished and result.step == 6
  return workdir


@pytest.mark.parametrize('last_step, dead', [(3, False), (5, True)])
def test_resumed_is_uninterrupted(whole, stopped, last_step, dead, capsys):
  workdir = stopped(last_step, dead)
  assert go(workdir).finished
  assert f'going on from step {4 if dead else 3}' in capsys.readouterr().out
  (step, state), (_, expected) = saved(workdir), saved(whole)
  assert step == 6 and same(state, expected)
  assert logged(workdir) == logged(whole) and list(logged(workdir)) == [1, 2, 3, 4, 5, 6]
  assert logged(workdir, 'validation/loss') == logged(whole, 'validation/loss')
  assert list(logged(workdir, 'validation/loss')) == [3, 6]


@pytest.mark.slow
def test_a_run_goes_on_on_another_mesh(whole, stopped):
  workdir = stopped(3, mesh='fsdp:8')
  go(workdir, mesh='fsdp:4,tensor:2')
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-6), saved(workdir), saved(whole))
  np.testing.assert_allclose([*logged(workdir).values()], [*logged(whole).values()], rtol=1e-5)


def test_a_restored_state_is_laid_out_as_a_new_one(whole):
  for mesh in ('fsdp:8', 'fsdp:4,tensor:2'):
    with jax.set_mesh(mesh_of(mesh)):
      new = jax.eval_shape(lambda: train.init(RUN)).params
      laid_out = jax.jit(lambda: train.init(RUN))()
      with checkpoint.Checkpoints(whole / 'checkpoints', create=False) as checkpoints:
        restored = checkpoints.restore(train.abstract_state(RUN, mesh_of(mesh))).state
      alike = jax.tree.map(lambda a, b: a.sharding.is_equivalent_to(b.sharding, a.ndim), laid_out, restored)
      assert all(jax.tree.leaves(alike)) and not restored.params['head'].is_fully_replicated
      assert new['head'].sharding.spec == restored.params['head'].sharding.spec


@pytest.mark.parametrize('mesh', ['fsdp:4,tensor:2', *slow('fsdp:1', 'fsdp:8')])
def test_losses_are_the_same_on_any_mesh(whole, tmp_path, mesh):
  go(tmp_path, mesh=mesh)
  np.testing.assert_allclose([*logged(tmp_path).values()], [*logged(whole).values()], rtol=1e-5)
  actual, expected = logged(tmp_path, 'validation/loss'), logged(whole, 'validation/loss')
  np.testing.assert_allclose([*actual.values()], [*expected.values()], rtol=1e-5)


def explosive():
  """Returns an objective that is infinite where the text has a Z."""
  finite = next_token()

  def loss(apply, params, batch, key):
    loss_sum, weight_sum, sums = finite.loss(apply, params, batch, key)
    return loss_sum / (1 - (batch.tokens == ord('Z')).any()), weight_sum, sums
  return dataclasses.replace(finite, loss=loss)


@pytest.mark.parametrize('save_every, evaluate_every, saves', [(1, 100, True), (100, 100, False), (100, 1, False)])
def test_a_loss_that_is_not_finite_stops_the_run_and_is_never_saved(tmp_path, save_every, evaluate_every, saves):
  run = dataclasses.replace(RUN, batch=2, objective=explosive(), steps=20)
  batches = run.data.batches('train', run.objective, 2)
  step = next(step for step in range(20) if (batches(step).tokens == ord('Z')).any()) + 1
  assert step > 2
  changes = {'save_every': save_every, 'evaluate_every': evaluate_every, 'keep': 20}
  note = f'the checkpoint of step {step - 1} is good' if saves else 'no checkpoint was saved before'
  for _ in range(2):   # the second run resumes from the last checkpoint
    with pytest.raises(train.NotFinite, match=rf'step {step}: .*; {note}. Lower'):
      go(tmp_path, run, **changes)
  assert steps_kept(tmp_path) == (list(range(1, step)) if saves else [])
  if saves:
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(saved(tmp_path, run)[1]))
  assert [logged(tmp_path)[n] is None for n in range(1, step + 1)] == [False] * (step - 1) + [True]
  assert not {row['step'] for row in track.read_metrics(tmp_path / 'metrics.jsonl')} - set(range(1, step + 1))


@pytest.mark.slow
@pytest.mark.parametrize('guard', [None, *slow(Guard(window=8, most=4))])
def test_parameters_that_an_update_ruins_are_never_saved(tmp_path, guard):
  """The loss of the step is finite, and the parameters after it are not."""
  optimizer = optim.sgd(lambda step: jax.numpy.where(step == 2, 1e38, 1.))   # finite, but every later loss is not
  changes = {'optimizer': optimizer, 'save_every': 1, 'keep': 9, 'guard': guard}
  for _ in range(2):   # the second run resumes from the last checkpoint
    with pytest.raises(train.NotFinite, match='step 3: the update .* the checkpoint of step 2 is good'):
      go(tmp_path, **changes)
    assert steps_kept(tmp_path) == [1, 2] and not logged(tmp_path, 'validation/loss')
  with pytest.raises(train.NotFinite, match='step 1: the update .* no checkpoint was saved before'):
    go(tmp_path / 'at once', **{**changes, 'optimizer': optim.sgd(lambda step: 1e38)})


def test_a_run_goes_back_from_a_checkpoint_that_is_not_finite(whole, stopped, capsys):
  workdir = stopped(2)
  with jax.set_mesh(mesh_of('fsdp:2')), checkpoint.Checkpoints(workdir / 'checkpoints') as checkpoints:
    restored = checkpoints.restore(train.abstract_state(RUN, mesh_of('fsdp:2')))
    ruined = jax.tree.map(lambda x: x * np.float32(np.nan), restored.state.params)
    checkpoints.save(4, restored.state._replace(params=ruined), restored.facts)
  assert go(workdir).finished and 'going on from step 2' in capsys.readouterr().out
  assert same(saved(workdir)[1], saved(whole)[1]) and logged(workdir) == logged(whole)
  assert len([path for path in (workdir / 'checkpoints').iterdir() if path.name.startswith('4.damaged')]) == 1


def stop_in_validation(monkeypatch, last_step):
  """Sends a signal when the second batch of the validation at a step is read."""
  calls = []

  def stop_requested(self, step):
    calls.append(step)
    return calls.count(last_step) == 3
  monkeypatch.setattr(Interrupt, 'should_stop', stop_requested)


@pytest.mark.parametrize('last_step', [3, 6])
def test_a_validation_that_a_signal_interrupts_is_repeated(whole, tmp_path, monkeypatch, last_step, capsys):
  with monkeypatch.context() as patch:
    stop_in_validation(patch, last_step)
    result = go(tmp_path)
  assert (result.step, result.finished, result.signal) == (last_step, False, signal.SIGTERM)
  assert f'stopped at step {last_step} of 6: the same command goes on' in capsys.readouterr().out
  assert steps_kept(tmp_path)[-1] == last_step and last_step not in logged(tmp_path, 'validation/loss')
  result = go(tmp_path)
  assert result.finished and 'finished' not in capsys.readouterr().out
  assert result.metrics['validation/loss'] == logged(tmp_path, 'validation/loss')[6]
  assert [track.read_metrics(folder / 'metrics.jsonl')[-1].keys() for folder in (tmp_path, whole)][0] >= {
      'validation/loss'}
  assert logged(tmp_path) == logged(whole) and same(saved(tmp_path)[1], saved(whole)[1])
  assert logged(tmp_path, 'validation/loss') == logged(whole, 'validation/loss')
  best = [checkpoint.Checkpoints(folder / 'checkpoints', create=False).best_metric() for folder in (tmp_path, whole)]
  assert best[0] == best[1]


def test_a_damaged_log_is_repaired_from_what_the_checkpoint_knows(whole, stopped, capsys):
  workdir = stopped(4)
  path = workdir / 'metrics.jsonl'
  lines = path.read_bytes().splitlines(keepends=True)
  assert json.loads(lines[-1])['step'] == 4
  path.write_bytes(lines[0] + b'{"step": 9, "loss": \xff}\n12\n' + b''.join(lines[1:-1]) + lines[-1][:20])
  assert go(workdir).finished
  assert f'{path}: 3 lines could not be read' in capsys.readouterr().out
  assert logged(workdir) == logged(whole) and list(logged(workdir)) == [1, 2, 3, 4, 5, 6]
  assert logged(workdir, 'validation/loss') == logged(whole, 'validation/loss')


def test_records_that_are_deleted_while_a_run_trains_are_written_again(tmp_path, capsys):
  records.start(tmp_path, script='a.py', knobs={'lr': 1})
  mesh = mesh_of('fsdp:2')
  with jax.set_mesh(mesh):
    train.train(RUN, tmp_path, mesh, lambda step, metrics: (tmp_path / 'run.json').unlink(missing_ok=True))
  assert 'run.json was deleted' in capsys.readouterr().err
  assert records.read(tmp_path) == [{'script': 'a.py', 'knobs': {'lr': 1}, 'data': 'fingerprint', 'steps': 6,
                                     'minutes': None}]


def test_nothing_is_compiled_twice(tmp_path, monkeypatch):
  compiled = []
  for module in (loop, validation):
    original = module.make_step
    monkeypatch.setattr(module, 'make_step', lambda *args, f=original: compiled.append(f(*args)) or compiled[-1])
  for steps in (4, 8):   # a new run, and a resumed one
    compiled.clear()
    go(tmp_path, steps=steps, evaluate_every=1, save_every=1)
    counts = sorted(step._cache_size() for step in compiled)
    assert counts[-2:] == [1, 1] and sum(counts) == 2


@pytest.mark.parametrize('changes, named', [
    ({'model': Bigram(width=16)}, r'model\.width: 8 before, 16 now'), ({'batch': 16}, 'batch: 8 before, 16 now'),
    ({'seed': 1}, 'seed: 0 before, 1 now'),
    ({'objective': next_token(objective.sequence_mean)}, 'objective.*token_mean.* before, .*sequence_mean.* now'),
    ({'data': Data(fingerprint='other')}, "data: 'fingerprint' before, 'other' now"),
    ({'data': Data(length=8)}, 'length: 16 before, 8 now'),
    ({'optimizer': optim.sgd(lambda step: 1.)}, 'another optimizer')])
def test_a_changed_run_is_refused_by_what_has_changed(whole, monkeypatch, changes, named):
  files = {path: path.read_bytes() for path in whole.rglob('*') if path.is_file() and path.name != 'run.json'}
  monkeypatch.setattr(loop.Loop, 'train', None)   # nothing is trained
  with pytest.raises(mismatch.Mismatch, match=named):
    go(whole, steps=10, **changes)
  assert files == {path: path.read_bytes() for path in whole.rglob('*') if path.is_file() and path.name != 'run.json'}


@pytest.mark.parametrize('changes, named', [
    ({'batch': 6, 'accumulate': 2}, 'batch=6 is not a multiple of 4: .*; choose 4 or 8, or another'),
    ({'model': Bigram(vocab=256)}, '260 tokens.*256'), ({'steps': 0}, 'steps=0'),
    ({'evaluate_every': 0}, 'evaluate_every=0'), ({'accumulate': -1}, 'accumulate=-1'),
    ({'model': transformer.llama(V, 8, 1, 2, max_length=8)}, '16 positions .* --length=8 or less')])
def test_what_does_not_fit_together_is_refused_before_anything_is_compiled(tmp_path, monkeypatch, changes, named):
  monkeypatch.setattr('lm.train.start._restore', None)
  with pytest.raises(ValueError, match=named):
    go(tmp_path, **changes)
  assert not (tmp_path / 'checkpoints').exists()


def test_a_finished_run_says_so_and_continues_with_more_steps(tmp_path, capsys, whole):
  go(tmp_path, steps=4)
  capsys.readouterr()
  again = go(tmp_path, steps=4)
  assert 'finished' in (text := capsys.readouterr().out) and '--steps' in text
  assert again.finished and again.step == 4 and steps_kept(tmp_path) == [2, 4]
  # The file has each evaluation once, though one is repeated.
  assert again.metrics['validation/loss'] == logged(tmp_path, 'validation/loss')[4]
  go(tmp_path)
  assert same(saved(tmp_path)[1], saved(whole)[1]) and logged(tmp_path) == logged(whole)
  assert go(tmp_path, steps=3).finished   # fewer steps than before: finished as well


def test_validation_is_over_the_same_text_every_time(stopped):
  """With constant parameters the loss is constant: dropout is off, and a limit selects the same text each time."""
  changes = {'optimizer': optax.set_to_zero(), 'evaluate_every': 1, 'evaluate_batches': 1}
  workdir = stopped(3, **changes)
  go(workdir, steps=8, **changes)
  losses = logged(workdir, 'validation/loss')
  assert len(losses) == 8 and len(set(losses.values())) == 1
  assert RUN.data.batches('validation', RUN.objective, 8).steps_per_epoch > 1
  assert not any('learning_rate' in row for row in track.read_metrics(workdir / 'metrics.jsonl'))


def test_the_best_checkpoint_stays_beside_the_last(tmp_path, monkeypatch):
  losses = itertools.chain([3., 1., 2., 4., 2., 5.])
  monkeypatch.setattr(validation, 'evaluate', lambda *args: {'loss': next(losses)})
  go(tmp_path, evaluate_every=1, save_every=1, keep=1)
  assert steps_kept(tmp_path) == [2, 6]


def test_the_schedule_and_the_key_follow_the_step(whole):
  rates = logged(whole, 'learning_rate')
  np.testing.assert_allclose([rates[n] for n in range(1, 7)], [0.05 / 3, 0.1 / 3] + [0.05] * 4, rtol=1e-6)
