"""Schedules of the learning rate. Each function returns a schedule: a function from the step to a float32 rate.

All but `one_cycle` begin with `warmup` steps of linear warm-up, where the rate of step i is (i + 1) / (warmup + 1) of
the peak. They raise ValueError where a schedule does not fit into its steps.
"""
import itertools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.Array], jax.Array]


def _warm_up(schedule: Schedule, peak: float, steps: int, warmup: int) -> Schedule:
  """Returns a schedule with a warm-up before it."""
  _check_peak(peak)
  if not 0 <= warmup < max(steps, 1):
    raise ValueError(f'a warm-up of {warmup} steps does not fit a run of {steps}; lower it')
  return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), schedule], [warmup])


def _check_peak(peak: float) -> None:
  if not 0 < peak < math.inf:
    raise ValueError(f'the learning rate {peak} is not positive and finite; take one such as 1e-3')


def warmup_cosine(peak: float, steps: int, warmup: int, final: float = 0.1) -> Schedule:
  """Linear to `peak` in `warmup` steps, then half a cosine down to `final * peak` (Loshchilov and Hutter 2017)."""
  return _warm_up(optax.cosine_decay_schedule(peak, max(steps - warmup, 1), final), peak, steps, warmup)


def warmup_linear(peak: float, steps: int, warmup: int, final: float = 0.) -> Schedule:
  """Linear to `peak` in `warmup` steps, then linear down to `final * peak`."""
  return _warm_up(optax.linear_schedule(peak, final * peak, max(steps - warmup, 1)), peak, steps, warmup)


def warmup_constant(peak: float, steps: int, warmup: int) -> Schedule:
  """Linear to `peak` in `warmup` steps, then constant."""
  return _warm_up(optax.constant_schedule(peak), peak, steps, warmup)


def warmup_inverse_sqrt(peak: float, steps: int, warmup: int) -> Schedule:
  """Linear to `peak` in `warmup` steps, then peak * sqrt(warmup / step) (Vaswani et al. 2017)."""
  start = max(warmup, 1)
  return _warm_up(lambda step: peak * jnp.sqrt(start / (step + start)), peak, steps, warmup)


def warmup_stable_decay(peak: float, steps: int, warmup: int, decay: int, final: float = 0.) -> Schedule:
  """Linear to `peak`, constant, then down to `final * peak` in the last `decay` steps (WSD, Hu et al. 2024).

  At step n of the N = `decay` last steps, the rate has 1 - sqrt(n / N) of the way to its final value before it. Hägele
  et al. 2024 (arXiv:2405.18392) find this better than a line, with N from a tenth to a fifth of the steps.
  """
  if decay < 1 or warmup + decay > steps:
    raise ValueError(f'a decay of {decay} steps after a warm-up of {warmup} does not fit a run of {steps}; it takes '
                     f'from 1 to {steps - warmup}')

  def rate(step):
    share = jnp.clip((step + warmup - (steps - decay)) / decay, 0, 1)   # `step` counts from the end of the warm-up
    return peak * (final + (1 - final) * (1 - jnp.sqrt(share)))
  return _warm_up(rate, peak, steps, warmup)


def warmup_piecewise(peak: float, steps: int, warmup: int, boundaries: Sequence[int], factor: float = 0.1) -> Schedule:
  """Linear to `peak` in `warmup` steps, then constant between `boundaries`, each of which multiplies it by `factor`."""
  if not boundaries or not all(a < b for a, b in itertools.pairwise((warmup, *boundaries, steps))):
    raise ValueError(f'boundaries {", ".join(map(str, boundaries)) or "(none)"} do not lie in ascending order between '
                     f'the end of the warm-up at {warmup} and that of the run at {steps}')
  if not 0 < factor < math.inf:
    raise ValueError(f'factor={factor} is not positive and finite')
  factors = {boundary - warmup: factor for boundary in boundaries}
  return _warm_up(optax.piecewise_constant_schedule(peak, factors), peak, steps, warmup)


def one_cycle(peak: float, steps: int, decay: int, start: float = 0.04, final: float = 4e-6) -> Schedule:
  """Linear from `start * peak` to `peak`, back in as many steps, then linear to `final * peak` in `decay` steps.

  The learning rate is that of Smith and Topin 2018 (arXiv:1708.07120), with the start and the end of PyTorch's
  OneCycleLR. They also change the momentum in the opposite direction, which is not done here.
  """
  _check_peak(peak)
  half, odd = divmod(steps - decay, 2)
  if decay < 1 or half < 1:
    raise ValueError(f'a decay of {decay} steps leaves none for a cycle in a run of {steps}; it takes from 1 to '
                     f'{steps - 2}')
  points = [0, half, 2 * half + odd, steps]
  return lambda step: peak * jnp.interp(step, jnp.array(points, jnp.float32), jnp.array([start, 1, start, final]))
