"""Steps that spike are skipped and counted, too many of them end the run, and patience ends it at its best."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.runs import RUN, Bigram, go, logged, same, saved, steps_kept

from lm import optim, train
from lm.optim import schedules
from lm.train.guard import Guard

pytestmark = pytest.mark.usefixtures('compiled_once')


def by_hand(guard, losses, norms):
  """Returns whether each step is accepted, by OLMo-core's rule over the finite values of steps before."""
  accepted = []
  for i, pair in enumerate(zip(losses, norms)):
    past = list(zip(losses, norms))[max(0, i - guard.window):i]
    usual = all(new - np.mean(old) <= guard.sigma * np.std(old, ddof=1)
                for new, old in zip(pair, zip(*past))) if len(past) >= guard.window // 2 else True
    accepted.append(bool(np.isfinite(pair).all() and usual))
  return accepted


def judged(guard, losses, norms):
  """Returns (whether each step is accepted, the last state) of a guard."""
  def step(state, pair):
    accepted, state = guard.judge(state, *pair)
    return state, accepted
  state, accepted = jax.jit(lambda pairs: jax.lax.scan(step, guard.init(), pairs))(
      np.stack([losses, norms], axis=1).astype('f4'))
  return accepted.tolist(), state


def test_spikes_of_either_are_skipped_as_olmo_core_does():
  rng = np.random.default_rng(0)
  losses, norms = 3 + rng.normal(size=60), 1 + 0.1 * rng.normal(size=60)
  losses[3] = 60.          # before half a window has been seen
  losses[[20, 21]] = 40.
  norms[45] = 2.2
  guard = Guard(window=16, sigma=4., most=3)
  accepted, state = judged(guard, losses, norms)
  assert accepted == by_hand(guard, losses, norms)
  assert not accepted[20] and not accepted[45] and accepted[3] and int(state.total) == accepted.count(False)
  assert int(state.skipped.sum()) == accepted[-16:].count(False)


def test_the_threshold_is_that_of_olmo_core():
  """The threshold is low, so that noise lies on both sides: mean and deviation both count, also in a window that is not
  full.
  """
  losses, norms = np.random.default_rng(1).normal(size=(2, 300)).astype('f4')
  guard = Guard(window=16, sigma=1.2, most=15)
  accepted, state = judged(guard, losses, norms)
  assert accepted == by_hand(guard, losses, norms) and 50 < accepted.count(False) == int(state.total) < 100


@pytest.mark.parametrize('bad_step', [0, 2, 30])
def test_what_is_not_finite_is_skipped_and_not_remembered(bad_step):
  losses = np.linspace(3, 2, 60)
  for bad in (np.nan, np.inf):
    losses[bad_step] = bad
    accepted, state = judged(Guard(window=16, most=8), losses, np.ones(60))
    assert [i for i, ok in enumerate(accepted) if not ok] == [bad_step]
    assert np.isfinite(state.losses).all()


def test_a_loss_that_stays_higher_is_accepted():
  accepted, _ = judged(Guard(window=16, sigma=3., most=8), [1., 1.1] * 20 + [5., 5.1] * 20, np.ones(80))
  assert not accepted[40] and all(accepted[46:])


@pytest.mark.parametrize('settings', [{'most': 128}, {'most': 0}, {'window': 3, 'most': 1}, {'sigma': 0.}])
def test_a_guard_that_judges_nothing_is_refused_by_the_name_of_the_setting(settings):
  name, value = next(iter(settings.items()))
  with pytest.raises(ValueError, match=f'{name}={value} s'):
    Guard(**settings)


def test_steps_are_judged_from_half_a_window_on():
  losses = np.tile([1., 1.1], 10)
  for spike in range(5, 12):
    changed = losses.copy()
    changed[spike] = 50.
    accepted, _ = judged(Guard(window=16, sigma=4., most=8), changed, np.ones(20))
    assert accepted == by_hand(Guard(window=16, sigma=4., most=8), changed, np.ones(20))
    assert accepted[spike] == (spike < 8) and accepted.count(False) == (spike >= 8)


@pytest.mark.parametrize('bad_step', [3, 9, 40])
def test_values_that_are_not_finite_leave_the_threshold_unchanged(bad_step):
  """The earlier value stays in the window: neither a zero, which would raise the deviation, nor a gap."""
  guard = Guard(window=16, sigma=3., most=8)
  losses = 10 + np.random.default_rng(bad_step).normal(size=60)
  # 15 lies more than 3 deviations above the mean, unless a zero is in the window.
  losses[bad_step], losses[bad_step + 8] = np.nan, 15.
  accepted, state = judged(guard, losses, np.ones(60))
  remembered = losses.copy()
  remembered[bad_step] = losses[bad_step - guard.window] if bad_step >= guard.window else losses[bad_step - 1]
  expected = by_hand(guard, remembered, np.ones(60))
  expected[bad_step] = False
  assert accepted == expected and not accepted[bad_step + 8]
  np.testing.assert_allclose(np.sort(state.losses), np.sort(remembered[-16:]), rtol=1e-6)


@dataclasses.dataclass(frozen=True)
class Spiking(Bigram):
  """A model whose hidden states are huge for batches whose tokens have one of these sums."""
  size: float = 1e4
  sums: tuple[int, ...] = ()

  def apply(self, params, batch, *, key=None, cache=None):
    out = super().apply(params, batch, key=key, cache=cache)
    if key is None:
      return out
    spike = jnp.where(jnp.any(jnp.sum(batch.tokens) == jnp.array(self.sums)), self.size, 1.)
    return out._replace(hidden=out.hidden * spike)


# The sum of the batch of each step, in the order of the data.
SUMS = [int(RUN.data.batches('train', RUN.objective, RUN.batch, RUN.seed)(step).tokens.sum()) for step in range(30)]
SPIKES = [step + 1 for step in range(30) if SUMS[step] in (SUMS[9], SUMS[27])]
RATE = schedules.warmup_linear(0.1, 100, 2)
SPIKING = dataclasses.replace(RUN, model=Spiking(dropout=0., sums=(SUMS[9], SUMS[27])), steps=30, evaluate_every=30,
                              save_every=30,
                              optimizer=optim.sgd(RATE, momentum=0.9))


def test_a_skipped_step_leaves_the_state_alone_and_is_counted(tmp_path):
  guard = Guard(window=16, sigma=8., most=15)   # noise alone skips no step
  go(tmp_path, SPIKING, guard=guard)
  skipped, losses = (logged(tmp_path, name) for name in ('skipped', 'loss'))
  assert SPIKES == [10, 28] and [step for step in losses if losses[step] > 100] == SPIKES
  assert [step for step in range(2, 31) if skipped[step] > skipped[step - 1]] == SPIKES and skipped[30] == 2
  step, state = saved(tmp_path, SPIKING, guard=guard)
  assert step == 30 and int(state.seen.total) == 2
  assert int(optax.tree_utils.tree_get(state.opt_state, 'count')) == 30   # the schedule counts skipped steps
  rates = logged(tmp_path, 'learning_rate')
  np.testing.assert_allclose(list(rates.values()), [float(RATE(step - 1)) for step in rates], rtol=1e-6)


@pytest.mark.slow
def test_resumed_equals_uninterrupted_with_a_guard(tmp_path):
  guard = Guard(window=16, sigma=3., most=15)
  go(tmp_path / 'whole', SPIKING, guard=guard, save_every=13)
  go(tmp_path / 'parts', SPIKING, guard=guard, steps=13, evaluate_every=13)
  go(tmp_path / 'parts', SPIKING, guard=guard)
  whole, parts = (saved(tmp_path / name, SPIKING, guard=guard)[1] for name in ('whole', 'parts'))
  assert int(whole.seen.total) and same(whole, parts)


@pytest.mark.slow
def test_too_many_spikes_end_the_run(tmp_path):
  with pytest.raises(train.NotFinite, match=r'step \d+: 2 of the last 24 steps were skipped, more than 1'):
    go(tmp_path, SPIKING, guard=Guard(window=24, most=1), model=dataclasses.replace(SPIKING.model, size=np.inf))
  assert logged(tmp_path, 'skipped')


OVERFITTING = dataclasses.replace(RUN, steps=40, evaluate_every=2, save_every=5, keep=1, patience=3,
                                  optimizer=optim.adam(schedules.warmup_constant(0.3, 100, 1)))


def test_patience_ends_a_run_at_its_best_and_a_second_start_does_not_continue(tmp_path, capsys):
  result = go(tmp_path, OVERFITTING)
  losses = logged(tmp_path, 'validation/loss')
  best = min(losses, key=losses.get)
  assert result.finished and result.step == best + 6 == max(losses) < 40
  assert steps_kept(tmp_path) == [best, result.step]
  assert result.metrics['validation/loss'] == pytest.approx(losses[best], rel=1e-6)
  assert f'the best checkpoint, of step {best}, is the result' in capsys.readouterr().out
  again = go(tmp_path, OVERFITTING)
  assert again.finished and again.step == result.step and logged(tmp_path, 'validation/loss') == losses
  assert same(again.params, result.params) and again.metrics == result.metrics


@pytest.mark.slow
def test_patience_is_the_same_for_a_resumed_run(tmp_path):
  whole = go(tmp_path / 'whole', OVERFITTING)
  losses = []

  def stop(step, metrics):
    losses.append(metrics['validation/loss'])
    return step in (4, 8)

  for n in range(3):
    with jax.set_mesh(whole.mesh):
      result = train.train(OVERFITTING, tmp_path / 'parts', whole.mesh, watch=stop)
    assert result.finished == (n == 2)
  assert result.step == whole.step and same(result.params, whole.params)
  assert losses == list(logged(tmp_path / 'whole', 'validation/loss').values())


@pytest.mark.parametrize('patience', [0, -1, 20])
def test_patience_that_cannot_end_the_run_is_refused(patience):
  with pytest.raises(ValueError, match=f'patience={patience} evaluations, one every 2 steps'):
    dataclasses.replace(OVERFITTING, patience=patience)
