"""Schedules have values worked out by hand, and those of PyTorch."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lm.optim import schedules

POINTS = {
    'cosine': (schedules.warmup_cosine(1., 14, 4), {9: 0.1 + 0.9 / 2, 14: 0.1, 99: 0.1, 4 + 10 / 3: 0.1 + 0.9 * 0.75}),
    'cosine_to_zero': (schedules.warmup_cosine(1., 14, 4, final=0.), {9: 0.5, 14: 0.}),
    'linear': (schedules.warmup_linear(1., 14, 4), {5: 0.9, 9: 0.5, 14: 0., 99: 0.}),
    'linear_to_half': (schedules.warmup_linear(1., 14, 4, final=0.5), {9: 0.75, 14: 0.5}),
    'constant': (schedules.warmup_constant(1., 14, 4), {5: 1., 99: 1.}),
    'inverse_sqrt': (schedules.warmup_inverse_sqrt(1., 14, 4), {9: 2 / 3, 16: 0.5, 64: 0.25}),
    'stable_decay': (schedules.warmup_stable_decay(1., 30, 4, 16, final=0.2),
                     {5: 1., 14: 1., 15: 0.2 + 0.8 * 0.75, 18: 0.2 + 0.8 * 0.5, 23: 0.2 + 0.8 * 0.25, 99: 0.2}),
    'stable_decay_of_all': (schedules.warmup_stable_decay(1., 8, 4, 4), {5: 0.5, 8: 0.}),
    'piecewise': (schedules.warmup_piecewise(1., 14, 4, (6, 10), 0.5), {5: 1., 6: 0.5, 9: 0.5, 10: 0.25, 99: 0.25}),
}


@pytest.mark.parametrize('name', POINTS)
def test_schedules_at_known_points(name):
  rate, points = POINTS[name]
  # The first step moves already, by a fifth of the peak; the fifth is at the peak.
  for step, expected in ({0: 0.2, 1: 0.4, 3: 0.8, 4: 1.} | points).items():
    assert float(rate(jnp.float32(step))) == pytest.approx(expected, abs=1e-6), step


SCHEDULES = [schedules.warmup_cosine, schedules.warmup_linear, schedules.warmup_constant, schedules.warmup_inverse_sqrt]


@pytest.mark.parametrize('decay', [1, 6, 7])
def test_one_cycle_goes_up_and_down_and_away(decay):
  rate = schedules.one_cycle(2., 26, decay, start=0.1, final=0.01)
  half = (26 - decay) / 2
  values = np.asarray(jax.vmap(rate)(np.arange(27)))
  assert values[0] == pytest.approx(0.2) and values[int(half)] == pytest.approx(2.)
  assert values[26 - decay] == pytest.approx(0.2) and values[26] == pytest.approx(0.02)
  assert (np.diff(values[:int(half) + 1]) > 0).all() and (np.diff(values[int(half):]) < 0).all()


def test_one_cycle_and_piecewise_are_those_of_pytorch():
  torch = pytest.importorskip('torch')

  def of_torch(make, steps):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    scheduler, rates = make(optimizer), []
    for _ in range(steps):
      rates.append(scheduler.get_last_lr()[0])
      optimizer.step()
      scheduler.step()
    return rates

  steps = of_torch(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [3, 7], 0.3), 12)
  np.testing.assert_allclose(jax.vmap(schedules.warmup_piecewise(0.5, 12, 0, (3, 7), 0.3))(np.arange(12)), steps, 1e-6)
  # PyTorch's phases end a step before ours, so that its last step is at the end.
  cycle = of_torch(lambda o: torch.optim.lr_scheduler.OneCycleLR(
      o, 0.5, 21, pct_start=9 / 21, anneal_strategy='linear', three_phase=True, cycle_momentum=False), 21)
  np.testing.assert_allclose(jax.vmap(schedules.one_cycle(0.5, 20, 4))(np.arange(21)), cycle, 1e-5, atol=1e-6)


@pytest.mark.parametrize('make,arguments,message', [
    (schedules.warmup_stable_decay, (10, 4, 7), 'a decay of 7 steps after a warm-up of 4 does not fit a run of 10'),
    (schedules.warmup_stable_decay, (10, 4, 0), 'a decay of 0 steps'),
    (schedules.warmup_piecewise, (10, 4, (5, 10)), 'boundaries 5, 10 do not lie .* 4 and that of the run at 10'),
    (schedules.warmup_piecewise, (10, 4, (4,)), 'boundaries 4 do not'),
    (schedules.warmup_piecewise, (10, 4, (7, 6)), 'boundaries 7, 6 do not'),
    (schedules.warmup_piecewise, (10, 4, ()), r'boundaries \(none\)'),
    (schedules.warmup_piecewise, (10, 4, (5,), 0.), 'factor=0.0'),
    (schedules.one_cycle, (10, 9), 'a decay of 9 steps leaves none for a cycle in a run of 10; it takes from 1 to 8'),
    (schedules.one_cycle, (10, 0), 'a decay of 0 steps'),
])
def test_schedules_that_do_not_fit_a_run_are_refused(make, arguments, message):
  with pytest.raises(ValueError, match=message):
    make(1., *arguments)
  with pytest.raises(ValueError, match='learning rate'):
    schedules.one_cycle(-1., 10, 2)


@pytest.mark.parametrize('make', SCHEDULES)
def test_schedules_scale_with_their_peak_and_may_start_there(make):
  steps = np.arange(20)
  unit, small = jax.vmap(make(1., 14, 4))(steps), jax.vmap(make(3e-4, 14, 4))(steps)
  np.testing.assert_allclose(small, 3e-4 * unit, rtol=1e-5, atol=1e-12)
  assert float(make(0.5, 10, 0)(jnp.int32(0))) == 0.5
  assert np.isfinite(float(make(0.5, 1, 0)(jnp.int32(1))))


@pytest.mark.parametrize('make', SCHEDULES)
@pytest.mark.parametrize('arguments,message', [
    ((1., 10, 10), 'a warm-up of 10 steps does not fit a run of 10'), ((1., 10, -1), 'a warm-up of -1 steps'),
    ((0., 10, 1), 'learning rate 0.0 is not positive'), ((-1e-3, 10, 1), 'learning rate -0.001'),
    ((math.inf, 10, 1), 'learning rate inf'),
])
def test_bad_schedules_are_refused(make, arguments, message):
  with pytest.raises(ValueError, match=message):
    make(*arguments)
