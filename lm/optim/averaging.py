"""Averages of the parameters over a run: what to evaluate and to keep in the place of the last."""
import math
from collections.abc import Sequence
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


# The arrays that each kind of average is computed from, beside the parameters.
_ARRAYS = {'Averaged': ('average',), 'ScheduleFreeState': ('z', 'b1')}


def _is_average(state: Any) -> bool:
  return isinstance(state, Averaged | ScheduleFreeState)


def averages(opt_state: Any) -> bool:
  """Whether `evaluated` gives other parameters than those that are trained. The state may be abstract."""
  return place(opt_state) is not None


def place(opt_state: Any) -> list[str] | None:
  """Where an average is in the state of an optimizer: its kind, then a path; None without one."""
  for path, state in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_average):
    if _is_average(state):
      return [type(state).__name__, *(jax.tree_util.keystr((key,), simple=True) for key in path)]
  return None


def is_place(place: Any) -> bool:
  """Whether a value, which may come from a file, is what `place` gives."""
  return isinstance(place, list) and all(isinstance(key, str) for key in place) and place[:1] and place[0] in _ARRAYS


def abstract_arrays(place: Sequence[str], params: Any) -> Any:
  """The part of the state of an optimizer that `from_arrays` needs, by path; `params` are abstract."""
  scalar = jax.ShapeDtypeStruct((), jnp.float32)
  tree = {name: scalar if name == 'b1' else params for name in _ARRAYS[place[0]]}
  for key in reversed(place[1:]):
    tree = {key: tree}
  return tree


def from_arrays(place: Sequence[str], tree: Any, params: Any) -> Any:
  """`evaluated`, of the arrays that were restored into `abstract_arrays`."""
  for key in place[1:]:
    tree = tree[key]
  if place[0] == 'Averaged':
    return tree['average']
  return optax.contrib.schedule_free_eval_params(
      ScheduleFreeState(**{**dict.fromkeys(ScheduleFreeState._fields), **tree}), params)


def evaluated(opt_state: Any, params: Any) -> Any:
  """The parameters to evaluate and to ship: the average, x of schedule-free's, or `params` themselves."""
  state = next(filter(_is_average, jax.tree.leaves(opt_state, is_leaf=_is_average)), None)
  match state:
    case Averaged(average=average):
      return average
    case ScheduleFreeState():
      return optax.contrib.schedule_free_eval_params(state, params)
  return params
