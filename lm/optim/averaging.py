"""Averages of the parameters over a run: what to evaluate and to keep in the place of the last."""
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ScheduleFreeState

from lm.optim import groups
from lm.optim.groups import Optimizer


class Averaged(NamedTuple):
  count: jax.Array
  average: Any
  inner: Any   # the optimizer's own state


def averaged(optimizer: Optimizer, decay: float) -> Optimizer:
  """The optimizer, with an exponential moving average of the parameters after each update in its state.

  After n updates, sum_i decay^(n - i) p_i / sum_i decay^(n - i): the parameters that it began with have no part in it.
  (An average that starts from them holds decay^n of them, and at 0.9999 those of 2000 steps would be lost in it.)

  Raises:
    ValueError: if decay is not between 0 and 1; in `init`, if the optimizer has an average of its own.
  """
  if not 0 < decay < 1:
    raise ValueError(f'the decay {decay} of a moving average is not between 0 and 1; take one such as 0.999')
  return lambda weights: _averaged(groups.bound(optimizer, weights), decay)


def _averaged(optimizer: optax.GradientTransformationExtraArgs, decay: float) -> optax.GradientTransformationExtraArgs:
  def init(params):
    inner = optimizer.init(params)
    if averages(inner):
      raise ValueError('the optimizer evaluates an average already, as schedule_free does; average one that does not')
    return Averaged(jnp.int32(0), jax.tree.map(jnp.copy, params), inner)

  def update(updates, state, params, **extra):
    updates, inner = optimizer.update(updates, state.inner, params, **extra)
    count = state.count + 1
    weight = (1 - decay) / -jnp.expm1(count * math.log(decay))   # 1 at first
    average = jax.tree.map(lambda a, p, u: (a + weight * (p + u - a)).astype(a.dtype), state.average, params, updates)
    return updates, Averaged(count, average, inner)

  return optax.GradientTransformationExtraArgs(init, update)


def _found(opt_state: Any) -> Averaged | ScheduleFreeState | None:
  is_average = lambda x: isinstance(x, Averaged | ScheduleFreeState)
  return next(filter(is_average, jax.tree.leaves(opt_state, is_leaf=is_average)), None)


def averages(opt_state: Any) -> bool:
  """Whether `evaluated` gives other parameters than those that are trained. The state may be abstract."""
  return _found(opt_state) is not None


def evaluated(opt_state: Any, params: Any) -> Any:
  """The parameters to evaluate and to ship: the average, x of schedule-free's, or `params` themselves."""
  match _found(opt_state):
    case Averaged(average=average):
      return average
    case ScheduleFreeState() as state:
      return optax.contrib.schedule_free_eval_params(state, params)
  return params
