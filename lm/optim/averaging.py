"""Averages of the parameters over a run, which are evaluated and exported in place of the last parameters."""
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ScheduleFreeState

from lm import sharding
from lm.optim import groups
from lm.optim.groups import Optimizer


class Averaged(NamedTuple):
  """The state of an optimizer with a moving average.

  Attributes:
    count: the number of updates.
    average: the average of the parameters.
    inner: the state of the optimizer itself.
  """
  count: jax.Array
  average: Any
  inner: Any


def with_average(optimizer: Optimizer, decay: float) -> Optimizer:
  """Adds an exponential moving average of the parameters to the state of an optimizer.

  With p_i the parameters after update i, the average after n updates is

    sum_i decay^(n - i) p_i / sum_i decay^(n - i).

  The initial parameters have no weight in it. In an average that starts from them their weight is decay^n, which for a
  decay of 0.9999 is still 0.82 after 2000 updates.

  Raises:
    ValueError: the decay is not between 0 and 1; in `init`, the optimizer has an average of its own.
  """
  if not 0 < decay < 1:
    raise ValueError(f'the decay {decay} of a moving average is not between 0 and 1; take one such as 0.999')
  return lambda weights: _with_average(groups.bind(optimizer, weights), decay)


def _with_average(optimizer: optax.GradientTransformationExtraArgs, decay: float
                  ) -> optax.GradientTransformationExtraArgs:
  def init(params):
    inner = optimizer.init(params)
    if has_average(inner):
      raise ValueError('the optimizer has an average of its own already, as schedule_free does; average another one')
    return Averaged(jnp.int32(0), jax.tree.map(jnp.copy, params), inner)

  def update(updates, state, params, **extra):
    updates, inner = optimizer.update(updates, state.inner, params, **extra)
    count = state.count + 1
    weight = (1 - decay) / -jnp.expm1(count * math.log(decay))   # it is 1 for the first update
    average = jax.tree.map(lambda a, p, u: (a + weight * (p + u - a)).astype(a.dtype), state.average, params, updates)
    return updates, Averaged(count, average, inner)

  return optax.GradientTransformationExtraArgs(init, update)


# The arrays of the state that each kind of average is computed from, beside the parameters.
_ARRAYS = {'Averaged': ('average',), 'ScheduleFreeState': ('z', 'b1')}


def _is_average(state: Any) -> bool:
  return isinstance(state, Averaged | ScheduleFreeState)


def has_average(opt_state: Any) -> bool:
  """Whether `evaluation_params` returns other parameters than those that are trained. The state may be abstract."""
  return average_path(opt_state) is not None


def average_path(opt_state: Any) -> list[str] | None:
  """Returns the kind of the average in the state of an optimizer, then the keys that lead to it; None without one."""
  for path, state in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_average):
    if _is_average(state):
      return [type(state).__name__, *(jax.tree_util.keystr((key,), simple=True) for key in path)]
  return None


def is_average_path(path: Any) -> bool:
  """Whether a value, which may come from a file, has the form of what `average_path` returns."""
  if not isinstance(path, list) or not path:
    return False
  return all(isinstance(key, str) for key in path) and path[0] in _ARRAYS


def abstract_arrays(path: Sequence[str], params: Any) -> Any:
  """Returns the part of the state of an optimizer that `from_arrays` needs, as a tree of dicts; `params` are abstract.
  """
  scalar = jax.ShapeDtypeStruct((), jnp.float32)
  tree = {name: scalar if name == 'b1' else params for name in _ARRAYS[path[0]]}
  for key in reversed(path[1:]):
    tree = {key: tree}
  return tree


def from_arrays(path: Sequence[str], tree: Any, params: Any) -> Any:
  """Returns the parameters to evaluate from arrays that were restored into `abstract_arrays`."""
  for key in path[1:]:
    tree = tree[key]
  if path[0] == 'Averaged':
    return tree['average']
  return optax.contrib.schedule_free_eval_params(
      ScheduleFreeState(**{**dict.fromkeys(ScheduleFreeState._fields), **tree}), params)


def evaluation_params(opt_state: Any, params: Any) -> Any:
  """Returns the parameters to evaluate and to export: the average, x of schedule-free optimizers, or `params`."""
  state = next(filter(_is_average, jax.tree.leaves(opt_state, is_leaf=_is_average)), None)
  match state:
    case Averaged(average=average):
      return sharding.to_devices(average)   # a run may keep it on the host
    case ScheduleFreeState():
      return optax.contrib.schedule_free_eval_params(sharding.to_devices(state), params)
  return params
