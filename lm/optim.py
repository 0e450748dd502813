"""Schedules and optimizers, on Optax: one function each. A schedule is a function of the step.

The optimizers that are made here keep their present learning rate in their state, where `learning_rate` finds it.
"""
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

Schedule = Callable[[jax.Array], jax.Array]


def _warm_up(schedule: Schedule, peak: float, steps: int, warmup: int) -> Schedule:
  if not 0 < peak < math.inf:
    raise ValueError(f'learning rate {peak} is not positive and finite')
  if not 0 <= warmup < max(steps, 1):
    raise ValueError(f'a warm-up of {warmup} steps does not fit a run of {steps}; lower it')
  return optax.join_schedules([optax.linear_schedule(peak / (warmup + 1), peak, warmup), schedule], [warmup])


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


class _Scheduled(NamedTuple):
  count: jax.Array
  learning_rate: jax.Array


def _descend(schedule: Schedule) -> optax.GradientTransformation:
  """update * -schedule(step), keeping the rate in the state."""
  def init(params):
    del params
    return _Scheduled(jnp.int32(0), jnp.asarray(schedule(jnp.int32(0)), jnp.float32))

  def update(updates, state, params=None):
    del params
    rate = jnp.asarray(schedule(state.count), jnp.float32)
    return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), _Scheduled(state.count + 1, rate)

  return optax.GradientTransformation(init, update)


def learning_rate(opt_state: Any) -> jax.Array | None:
  """The rate of the last update; None if the optimizer does not keep it."""
  return optax.tree_utils.tree_get(opt_state, 'learning_rate', filtering=lambda _, x: isinstance(x, jax.Array))


def evaluated(opt_state: Any, params: Any) -> Any:
  """The parameters to evaluate."""
  return params


def averages(opt_state: Any) -> bool:
  """Whether `evaluated` gives other parameters than it is given; `opt_state` may be abstract."""
  return False


def decayed(params: Any) -> Any:
  """True for matrices and tables, False for vectors, such as biases and the scales of norms: what weight decay is for.
  """
  return jax.tree_util.tree_map_with_path(lambda path, _: _is_matrix(path), params)


def _is_matrix(path: tuple) -> bool:
  return not str(path[-1].key).endswith(('bias', 'scale', 'sinks', 'correction'))


def _chain(schedule: Schedule, clip: float | None, *transforms: optax.GradientTransformation):
  if clip is not None and clip <= 0:
    raise ValueError(f'clip={clip} is not positive; None does not clip')
  clipping = () if clip is None else (optax.clip_by_global_norm(clip),)
  return optax.chain(*clipping, *transforms, _descend(schedule))


def sgd(schedule: Schedule, momentum: float = 0.9, clip: float | None = None) -> optax.GradientTransformation:
  """v = momentum v + g; params -= rate v. `clip` bounds the global norm of the gradient, as in all of these."""
  return _chain(schedule, clip, optax.trace(momentum))


def adam(schedule: Schedule, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
         clip: float | None = 1.) -> optax.GradientTransformation:
  """Adam (Kingma and Ba 2015): the mean of the gradient over the root of the mean of its square, bias-corrected."""
  return _chain(schedule, clip, optax.scale_by_adam(b1, b2, eps))


def adamw(schedule: Schedule, weight_decay: float = 0.1, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8,
          clip: float | None = 1.) -> optax.GradientTransformation:
  """Adam with decoupled weight decay (Loshchilov and Hutter 2019): params -= rate * (adam + weight_decay * params)."""
  if weight_decay < 0:
    raise ValueError(f'weight_decay={weight_decay} is negative')
  return _chain(schedule, clip, optax.scale_by_adam(b1, b2, eps), optax.add_decayed_weights(weight_decay, decayed))


def rmsprop(schedule: Schedule, decay: float = 0.99, eps: float = 1e-8, momentum: float = 0.,
            clip: float | None = 1.) -> optax.GradientTransformation:
  """RMSprop (Tieleman and Hinton 2012): the gradient over the root of the running mean of its square."""
  momenta = (optax.trace(momentum),) if momentum else ()
  return _chain(schedule, clip, optax.scale_by_rms(decay, eps), *momenta)


def muon(schedule: Schedule, weight_decay: float = 0.1, rest: float = 1., b1: float = 0.9, b2: float = 0.95,
         clip: float | None = 1.) -> optax.GradientTransformation:
  """Muon (Jordan et al. 2024): momentum, orthogonalised, for the matrices inside blocks; Adam for all else.

  Updates are scaled to the root mean square that Adam's have, 0.2 (Liu et al. 2025), so that one rate serves both;
  all else learns at `rest` times it. A matrix is orthogonalised whole: its shards are gathered on each device, and so
  is its momentum.
  """
  # The rate -1 is undone by the sign that Optax gives it; `_descend` has the schedule. Only the matrices decay.
  inner = optax.contrib.muon(-1., adam_learning_rate=-rest, weight_decay=weight_decay, adam_b1=b1, adam_b2=b2,
                             consistent_rms=0.2, muon_weight_dimension_numbers=_matrices)

  def update(updates, state, params):
    updates, state = inner.update(_whole(updates), state, _whole(params))
    return jax.tree.map(_laid_out_like, updates, params), state

  return _chain(schedule, clip, optax.GradientTransformation(lambda params: inner.init(_whole(params)), update))


def _matrices(params: Any) -> Any:
  """For each weight of a block, stacked over layers, which axes are the input's and the output's; None for the rest."""
  def axes(path, leaf):
    if path[0].key not in ('blocks', 'depths') or not _is_matrix(path):
      return None
    if path[-1].key in ('gate', 'up', 'down'):   # after the layers, experts may come
      return optax.contrib.MuonDimensionNumbers((leaf.ndim - 2,), (leaf.ndim - 1,))
    inputs = leaf.ndim - 2 if path[-1].key == 'out' else 1   # attention's output reads heads x head size
    return optax.contrib.MuonDimensionNumbers(tuple(range(1, inputs + 1)), tuple(range(inputs + 1, leaf.ndim)))
  return jax.tree_util.tree_map_with_path(axes, params)


def _whole(tree: Any) -> Any:
  def gather(x):
    return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, P(*(None,) * x.ndim))
  return jax.tree.map(gather, tree)


def _laid_out_like(x: jax.Array, like: jax.Array) -> jax.Array:
  return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, jax.typeof(like).sharding.spec)
