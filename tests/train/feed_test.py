"""A feed gives the batch of a step: here, text that the policy itself writes, in the same loop and through a kill."""
import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.meshes import mesh_of
from helpers.runs import RUN, Bigram, Data, go, logged, same, saved, steps_kept

from lm import optim, seeds, sharding, train
from lm.data import Example, Form, batches
from lm.data.batch import Batch
from lm.data.rows.augment import Shuffle
from lm.objectives import Objective, objective
from lm.train import feed
from lm.train.interrupt import Interrupt

pytestmark = pytest.mark.usefixtures('compiled_once')
ROWS, TIME = 32, 8


def reward(tokens_BT):
  """Returns for each text the share of its tokens that are odd."""
  return jnp.mean(tokens_BT % 2, axis=1)


def example(tokens, rng, special):
  weights = np.ones(len(tokens) - 1, np.float32)
  return Example(tokens[:-1], tokens[1:], weights, columns={'advantage': weights})


def policy_gradient():
  """The loss is -sum of advantage times log p(token), whose gradient is that of the expected reward (Williams 1992)."""
  def loss(apply, params, batch, key):
    outputs = apply(params, batch, key=key)
    scores, correct = objective.target_scores(outputs.hidden, outputs.head, batch.targets)
    total = -jnp.sum(scores * batch.weights * batch.columns['advantage'])
    sums = {'nll': -jnp.sum(scores * batch.weights), 'tokens': jnp.sum(batch.weights), 'correct': jnp.sum(correct),
            'reward': (jnp.sum(reward(batch.targets)), jnp.float32(len(batch.tokens)))}
    return total, jnp.sum(batch.weights), sums
  return Objective((Form(example, ahead=True),), loss)


@dataclasses.dataclass(frozen=True)
class Written(train.Feed):
  """Texts that the model of a run writes, each with its reward minus the mean reward of the batch."""
  run: train.Run
  data: object
  mesh: jax.sharding.Mesh

  @functools.cached_property
  def write(self):
    def write(params, key):
      def token(before_B, key):
        outputs = self.run.model.apply(params, Batch(before_B[:, None]))
        logits = sharding.constrain(outputs.head(outputs.hidden), '---')[:, 0]
        after_B = jnp.argmax(logits + jax.random.gumbel(key, logits.shape), axis=-1).astype(jnp.int32)
        return after_B, (before_B, after_B)

      first = jnp.full(ROWS, self.data.tokenizer.bos_id, jnp.int32)
      tokens, targets = (x.T for x in jax.lax.scan(token, first, jax.random.split(key, TIME))[1])
      ones, advantage = jnp.ones((ROWS, TIME)), reward(targets) - jnp.mean(reward(targets))
      positions = jnp.broadcast_to(jnp.arange(TIME), (ROWS, TIME))
      batch = Batch(tokens, targets, ones, positions, ones.astype(jnp.int32),
                    columns={'advantage': advantage[:, None] * ones})
      return jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)
    return jax.jit(write)

  def __call__(self, step, state):
    assert int(state.step) == step
    return self.write(state.params, jax.random.fold_in(seeds.key(self.run.seed), step))


POLICY = dataclasses.replace(
    RUN, model=Bigram(dropout=0.), objective=policy_gradient(), data=Data(length=TIME), feed=Written, batch=ROWS,
    optimizer=optim.adam(lambda step: 0.3), steps=20, save_every=4, evaluate_every=10)


@pytest.fixture(scope='module')
def whole(tmp_path_factory):
  workdir = tmp_path_factory.mktemp('whole')
  assert go(workdir, POLICY).finished
  return workdir


@pytest.mark.slow
def test_a_policy_learns_from_what_it_writes(whole):
  rewards = list(logged(whole, 'reward').values())
  assert np.mean(rewards[:3]) < 0.65 and np.mean(rewards[-3:]) > 0.9
  _, state = saved(whole, POLICY)
  with jax.set_mesh(mesh_of('fsdp:2')):
    written = Written(POLICY, POLICY.data, mesh_of('fsdp:2')).write(jax.device_put(state.params, jax.tree.map(
        lambda s: s.sharding, train.abstract_state(POLICY, mesh_of('fsdp:2')).params)), jax.random.key(3))
  assert np.asarray(reward(written.targets)).mean() > 0.9   # it samples from the given parameters


def test_a_policy_that_is_killed_goes_on_bit_for_bit(whole, tmp_path, monkeypatch):
  def stop_requested(self, step):
    if step == 7:
      raise InterruptedError('as if killed')
  with monkeypatch.context() as patch, pytest.raises(InterruptedError):
    patch.setattr(Interrupt, 'should_stop', stop_requested)
    go(tmp_path, POLICY)
  assert steps_kept(tmp_path) == [4]
  result = go(tmp_path, POLICY)
  assert (result.start, result.step) == (4, 20)
  assert same(saved(tmp_path, POLICY)[1], saved(whole, POLICY)[1])
  assert logged(tmp_path) == logged(whole) and logged(tmp_path, 'reward') == logged(whole, 'reward')


def test_a_checkpoint_of_another_feed_is_refused(whole):
  with pytest.raises(ValueError, match='of another run.*\n.*feed'):
    go(whole, POLICY, feed=None)


class Short(Written):
  def __call__(self, step, state):
    return jax.tree.map(lambda x: x[:, :-1], super().__call__(step, state))


@pytest.mark.parametrize('changes, named', [
    ({'feed': Short}, r'a batch of other arrays .*\n.*tokens.*int32\[32, 8\].*int32\[32, 7\]'),
    ({'augment': (Shuffle(0.5),)}, 'augment=.* leave one of them out')])
def test_what_does_not_fit_a_feed_is_refused(tmp_path, changes, named):
  with pytest.raises(ValueError, match=f'(?s){named}'):
    go(tmp_path, POLICY, **changes)
  assert not list(tmp_path.glob('checkpoints/[0-9]*'))


def test_data_is_read_one_step_ahead_and_from_any_step():
  """In any order of steps, the rows are those that the data has for the step."""
  run, mesh, reads = RUN, mesh_of('fsdp:2'), []
  data = run.data.open(None)
  data_feed = feed.DataFeed(run, data, mesh)
  read = data_feed._read
  data_feed._read = lambda step: reads.append(step) or read(step)
  for step in (3, 4, 5, 9, 2):
    assert same(data_feed(step, None), data.batches('train', run.objective, run.batch, run.seed)(step))
  data_feed.close()
  assert reads == [3, 4, 5, 6, 9, 10, 2, 3]


def test_each_process_reads_its_own_rows_and_no_others(monkeypatch):
  """Of two processes with four rows of a batch each; the rows are those of the whole batch."""
  run, places = RUN, []
  compose = batches.Batches.compose
  monkeypatch.setattr(batches.Batches, 'compose', lambda self, rows: places.append(len(rows)) or compose(self, rows))
  monkeypatch.setattr(sharding, 'shard_rows', lambda batch, mesh: batch)
  whole = run.data.batches('train', run.objective, run.batch, run.seed)
  for rows in (range(4), range(4, 8)):
    monkeypatch.setattr(sharding, 'local_rows', lambda count, mesh, rows=rows: rows)
    with contextlib.closing(train.DataFeed(run, run.data, None)) as own:
      places.clear()
      batch = own(3, None)
    assert set(places) == {4} and len(places) == 2   # this step and the next one, which is read ahead
    assert same(batch, jax.tree.map(lambda x, rows=rows: x[rows.start:rows.stop], whole(3)))
