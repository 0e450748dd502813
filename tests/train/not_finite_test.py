"""A step that is not finite: its state and batch are kept, and the run stops, skips it or goes back."""
import dataclasses
import errno
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.clusters import Service
from helpers.meshes import mesh_of
from helpers.runs import RUN, Bigram, go, logged, same, saved
from helpers.slow import slow

from lm import seeds, train
from lm.launch import policy as policy_of_flag
from lm.sharding import hosts
from lm.train import not_finite, replay
from lm.train.guard import Guard
from lm.train.run import advance
from lm.workdir import checkpoint, records

pytestmark = pytest.mark.usefixtures('compiled_once')


@dataclasses.dataclass(frozen=True)
class Spoilt(Bigram):
  """A model whose hidden states are not finite for training batches whose tokens have one of these sums."""
  sums: tuple[int, ...] = ()
  dropout: float = 0.1

  def apply(self, params, batch, *, key=None, cache=None):
    out = super().apply(params, batch, key=key, cache=cache)
    if key is None:
      return out
    is_bad = jnp.any(jnp.sum(batch.tokens) == jnp.array(self.sums or (-1,)))
    return out._replace(hidden=out.hidden * jnp.where(is_bad, jnp.nan, 1.))


BATCHES = RUN.data.batches('train', RUN.objective, RUN.batch, RUN.seed)
SUMS = [int(BATCHES(step).tokens.sum()) for step in range(12)]
BAD = dataclasses.replace(RUN, model=Spoilt(sums=(SUMS[4],)), steps=8, evaluate_every=8, save_every=2)
GOOD = dataclasses.replace(BAD, model=Spoilt())
SKIPPING = dataclasses.replace(GOOD, not_finite=train.Skip())   # runs that select the state differ in rounding


def plain_steps(order, skipped=(), run=GOOD):
  """Returns the state after steps on the batches of these numbers, by a plain loop that knows which to leave out."""
  mesh = mesh_of('fsdp:2')
  with jax.set_mesh(mesh):
    state = jax.jit(lambda: train.init(run))()
    step = train.make_step(run)
    feed = train.DataFeed(GOOD, GOOD.data, mesh)
    for number in order:
      if number in skipped:
        state = advance(state, 1)
      else:   # the same program as that of the loop
        state, _ = step(state, feed(number, state), {}, seeds.key(run.seed), np.int32(state.step))
    feed.close()
    return jax.tree.map(np.asarray, state)


def test_a_run_stops_and_keeps_the_batch_and_the_step_is_computed_again_from_the_checkpoint(tmp_path):
  with pytest.raises(train.NotFinite, match=r'step 5: the loss is nan.*checkpoint of step 4 is good.*--replay=5'):
    go(tmp_path, BAD)
  mesh = mesh_of('fsdp:2')
  with jax.set_mesh(mesh):
    state, batch = not_finite.load(BAD, tmp_path, mesh, 5)
    line, = replay.replay(BAD, tmp_path, mesh, 5)
  assert state is None and same(batch, jax.tree.map(np.asarray, BATCHES(4)))
  assert line.startswith('step 5 in float32: the first that is not finite is the normalised output of the last layer')
  assert json.loads((tmp_path / 'failures/step-5/failure.json').read_text())['metrics']['loss'] == 'nan'


def test_a_step_that_is_not_the_next_one_changes_nothing():
  """The host starts a step before it knows whether the last one was finite."""
  mesh = mesh_of('fsdp:2')
  with jax.set_mesh(mesh):
    state = jax.jit(lambda: train.init(BAD))()
    run = dataclasses.replace(BAD, not_finite=train.Skip())
    step, feed = jax.jit(train.step_function(run)), train.DataFeed(BAD, BAD.data, mesh)
    key = jax.random.key(0)
    bad, metrics = step(state, feed(4, state), {}, key, np.int32(0))
    assert not np.isfinite(metrics['loss']) and same(*jax.tree.map(np.asarray, (state, bad)))
    late, metrics = step(bad, feed(5, state), {}, key, np.int32(1))
    assert np.isfinite(metrics['loss']) and same(*jax.tree.map(np.asarray, (state, late)))
    new, _ = step(bad, feed(5, state), {}, key, np.int32(0))
    assert int(new.step) == 1 and not same(*jax.tree.map(np.asarray, (state.params, new.params)))
    feed.close()


@pytest.mark.parametrize('save_every', [8, *slow(5)])   # the failure is noticed one step later, or at the step
def test_a_step_is_skipped_as_if_its_update_were_none(tmp_path, capsys, save_every):
  result = go(tmp_path, BAD, not_finite=train.Skip(), save_every=save_every)
  assert result.finished and 'step 5: the loss is nan' in (out := capsys.readouterr().out) and 'left out' in out
  step, state = saved(tmp_path, BAD)
  assert step == 8 and same(state, plain_steps(range(8), skipped=[4], run=SKIPPING))
  mesh = mesh_of('fsdp:2')
  with jax.set_mesh(mesh):
    before, _ = not_finite.load(BAD, tmp_path, mesh, 5)
  assert same(jax.tree.map(np.asarray, before), plain_steps(range(4), run=SKIPPING))   # not the one after step 5 or 6
  assert [step for step, loss in logged(tmp_path).items() if loss is None] == [5]


def test_too_many_skipped_steps_end_the_run(tmp_path):
  with pytest.raises(train.NotFinite, match='of the last 5 steps, 2 were left out, more than 1'):
    go(tmp_path, BAD, model=Spoilt(sums=(SUMS[1], SUMS[4])), not_finite=train.Skip(most=1, window=5))


def test_steps_that_were_skipped_before_a_restart_count(stopped):
  changes = {'model': Spoilt(sums=(SUMS[1], SUMS[4])), 'not_finite': train.Skip(most=1, window=5), 'steps': 8}
  workdir = stopped(3, **changes)
  with pytest.raises(train.NotFinite, match='of the last 5 steps, 2 were left out, more than 1'):
    go(workdir, **changes)


def test_of_steps_that_fail_one_after_the_other_the_first_is_kept(tmp_path, capsys):
  go(tmp_path, BAD, model=Spoilt(sums=(*SUMS[1:4], SUMS[6])), not_finite=train.Skip())
  assert not_finite.steps_kept(tmp_path) == [2, 7]
  out = capsys.readouterr().out
  assert [out.count(f'--replay={step},') for step in range(1, 9)] == [0, 3, 0, 0, 0, 0, 1, 0]


def test_a_guard_skips_it_too_and_counts_it(tmp_path):
  guard = Guard(window=8, most=4)
  result = go(tmp_path, BAD, guard=guard)
  _, state = saved(tmp_path, BAD, guard=guard)
  assert result.finished and state.seen.skipped.tolist() == [False] * 4 + [True] + [False] * 3
  expected = plain_steps(range(8), skipped=[4], run=dataclasses.replace(GOOD, guard=guard))
  assert same(state._replace(seen=None), expected._replace(seen=None))


def test_a_run_goes_back_and_leaves_out_the_batches_in_between_also_when_it_is_resumed(tmp_path, capsys):
  policy = train.GoBack(further=1)
  changes = {'not_finite': policy, 'save_every': 3, 'evaluate_every': 3, 'steps': 6}
  assert go(tmp_path / 'whole', BAD, **changes).finished
  assert 'going back to step 3: the next 3 batches, up to the one of step 5 and 1 more' in capsys.readouterr().out
  expected = plain_steps([0, 1, 2, 6, 7, 8], run=SKIPPING)
  assert same(saved(tmp_path / 'whole', BAD)[1], expected)
  assert list(logged(tmp_path / 'whole')) == list(range(1, 7)) and None not in logged(tmp_path / 'whole').values()

  with pytest.MonkeyPatch.context() as patch:   # stopped after it went back, and resumed
    patch.setattr('lm.train.interrupt.Interrupt.should_stop',
                  lambda self, step: step == 4 and not_finite.LeftOutBatches(tmp_path / 'parts').total == 3)
    assert go(tmp_path / 'parts', BAD, **changes).step == 4
  assert go(tmp_path / 'parts', BAD, **changes).finished
  assert same(saved(tmp_path / 'parts', BAD)[1], expected)
  assert records.read(tmp_path / 'parts')[-1]['left_out_batches'] == [[3, 3]]


def test_processes_leave_out_the_batches_that_process_0_does(tmp_path, monkeypatch):
  """The workdir of process 1 may be on another disk, or be seen late."""
  service = Service()
  monkeypatch.setattr(hosts, '_client', lambda: service)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  batches = []
  for index, entries in ((0, [[3, 2]]), (1, [])):
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    monkeypatch.setattr(hosts, '_values', hosts.Channel('test'))
    monkeypatch.setattr(records, 'read', lambda _, entries=entries: [{'left_out_batches': entries}])
    batches.append([not_finite.LeftOutBatches(tmp_path).index(step) for step in range(5)])
  assert batches == 2 * [[0, 1, 2, 5, 6]]


class Ending(train.DataFeed):
  """A feed whose batches end after eight steps."""

  def __call__(self, step, state):
    assert step < 8
    return super().__call__(step, state)

  def steps(self, planned):
    return min(planned, 8)


def test_a_run_that_goes_back_ends_where_its_batches_end(tmp_path):
  result = go(tmp_path, BAD, not_finite=train.GoBack(), save_every=3, feed=Ending)
  assert result.finished and result.step == 6
  assert same(saved(tmp_path, BAD)[1], plain_steps([0, 1, 2, 5, 6, 7], run=SKIPPING))


def test_a_step_that_fails_again_with_another_batch_is_kept_with_that(tmp_path):
  go(tmp_path, BAD, model=Spoilt(sums=(SUMS[4], SUMS[6])), not_finite=train.GoBack(), save_every=3, steps=6)
  mesh = mesh_of('fsdp:2')
  with jax.set_mesh(mesh):
    state, batch = not_finite.load(BAD, tmp_path, mesh, 5)
    path = tmp_path / 'failures/step-5/batch.npz'
    data = path.read_bytes()
    path.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    with pytest.raises(ValueError, match=r'batch\.npz is damaged \(.*\); remove .*step-5, and the step is computed'):
      not_finite.load(BAD, tmp_path, mesh, 5)
  assert records.read(tmp_path)[-1]['left_out_batches'] == [[3, 2], [3, 2]]
  assert int(batch.tokens.sum()) == SUMS[6] and int(state.step) == 4


def test_a_run_without_a_checkpoint_goes_back_to_its_start_and_not_for_ever(tmp_path):
  with pytest.raises(train.NotFinite, match='step 2: .*gone back 1 times'):
    go(tmp_path, BAD, model=Spoilt(sums=(SUMS[1], SUMS[3])), not_finite=train.GoBack(most=1), save_every=8)
  assert records.read(tmp_path)[-1]['left_out_batches'] == [[0, 2]]
  assert not_finite.steps_kept(tmp_path) == [2]


def test_only_the_newest_failures_are_kept(tmp_path):
  go(tmp_path, BAD, model=Spoilt(sums=tuple(SUMS[1:8:2])), not_finite=train.Skip())
  assert not_finite.steps_kept(tmp_path) == [6, 8]


@pytest.mark.parametrize('part', ['batch', 'state'])
def test_a_full_disk_neither_ends_a_run_that_skips_nor_is_filled_further(tmp_path, capsys, monkeypatch, part):
  save = checkpoint.Checkpoints.save

  def fails(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
  if part == 'batch':
    monkeypatch.setattr(np, 'savez', fails)
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', lambda self, *args, **kwargs: (
      fails if 'failures' in self.folder.parts else save)(self, *args, **kwargs))
  assert go(tmp_path, BAD, not_finite=train.Skip()).finished
  assert 'step 5 is not kept for a replay: ' in capsys.readouterr().out
  assert not list((tmp_path / 'failures').iterdir())


@pytest.mark.parametrize('flag, guard, expected', [
    ('skip', None, train.Skip()), ('skip', Guard(), None), ('go_back', Guard(), train.GoBack()),
    ('go_back', None, train.GoBack()), ('stop', None, None)])
def test_a_flag_has_its_way_whatever_the_experiment_says(flag, guard, expected):
  for policy in None, train.Skip(most=2), train.GoBack(most=2):
    run = policy_of_flag.with_policy(dataclasses.replace(RUN, guard=guard, not_finite=policy), flag)
    assert (run.guard, run.not_finite) == (guard, expected)


@pytest.mark.parametrize('make, named', [
    (lambda: train.Skip(most=0), 'most=0'), (lambda: train.GoBack(most=0), 'most=0'),
    (lambda: train.GoBack(further=-1), 'further=-1')])
def test_a_policy_that_does_nothing_is_refused(make, named):
  with pytest.raises(ValueError, match=named):
    make()
