"""Optimizers, on Optax: one function each.

All of them share these arguments:

  rate: the learning rate: a number, a schedule (see `lm.optim.schedules`), or `groups.Rates`, which differ between
    parameters. The state keeps the present rate, which `learning_rate` reads.
  clip: bound on the global norm of the gradient; None does not clip.
  weight_decay: decoupled (Loshchilov and Hutter 2019): params -= rate * (update + weight_decay * params).
  decays: the mask of the parameters that decay.

Each returns a function from the declarations of a model's weights (`lm.declarations`) to the Optax transformation for
these weights. `train` calls it with the declarations of the run's model, and `bind` does so elsewhere. To add an
optimizer, give `chain` a transformation that turns gradients into updates.
"""
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from optax.contrib import ScheduleFreeState

from lm.optim import groups
from lm.optim.groups import Optimizer
from lm.optim.scale_by_muon import scale_by_muon
from lm.optim.scale_by_soap import scale_by_soap
from lm.optim.schedules import Schedule

Rate = float | Schedule | groups.Rates


class _Scheduled(NamedTuple):
  count: jax.Array
  learning_rate: jax.Array


def _scale(weights: Any, factors: groups.Factors) -> tuple[optax.GradientTransformation, ...]:
  """Returns a transformation that multiplies each update by its factor; none where there are no factors."""
  if not factors:
    return ()
  by_weight = groups.factors_of(weights, factors)
  scale = optax.stateless(lambda updates, params: jax.tree.map(lambda factor, u: factor * u, by_weight, updates))
  return (scale,)


def _descend(schedule: Schedule) -> optax.GradientTransformation:
  """Returns a transformation that multiplies updates by -schedule(step), and keeps the rate in its state."""
  def init(params):
    del params
    return _Scheduled(jnp.int32(0), jnp.asarray(schedule(jnp.int32(0)), jnp.float32))

  def update(updates, state, params=None):
    del params
    rate = jnp.asarray(schedule(state.count), jnp.float32)
    return jax.tree.map(lambda u: -rate.astype(u.dtype) * u, updates), _Scheduled(state.count + 1, rate)

  return optax.GradientTransformation(init, update)


def learning_rate(opt_state: Any) -> jax.Array | None:
  """Returns the learning rate of the last update; None if the optimizer does not keep it."""
  return optax.tree_utils.tree_get(opt_state, 'learning_rate', filtering=lambda _, x: isinstance(x, jax.Array))


def advance(opt_state: Any, steps: int) -> Any:
  """Returns the state of an optimizer with its schedules advanced by a number of steps."""
  def advance_schedule(x):
    match x:
      case _Scheduled() | optax.ScaleByScheduleState():
        return x._replace(count=x.count + steps)
      case ScheduleFreeState():   # the rate is also the weight of a step in the average
        return x._replace(step_count=x.step_count + steps, base_optimizer_state=advance(x.base_optimizer_state, steps))
    return x

  has_schedule = lambda x: isinstance(x, (_Scheduled, optax.ScaleByScheduleState, ScheduleFreeState))
  return jax.tree.map(advance_schedule, opt_state, is_leaf=has_schedule)


def chain(rate: Rate, clip: float | None, *transforms: Optimizer, weight_decay: float = 0.,
          decays: groups.Mask = groups.decay_mask) -> Optimizer:
  """Returns an optimizer that clips the gradient, transforms it, adds weight decay, and steps at the learning rate.

  `transforms` are transformations of Optax, or functions that return one for declared weights.

  Raises:
    ValueError: the rate, the weight decay or the bound of clipping is out of range.
  """
  rates = rate if isinstance(rate, groups.Rates) else groups.Rates(rate)
  if not 0 <= weight_decay < math.inf:
    raise ValueError(f'weight_decay={weight_decay} is negative or not finite')
  clipping, descend = _clipping(clip), _descend(_schedule(rates))

  def bind(weights):
    decay = (optax.add_decayed_weights(weight_decay, decays(weights)),) if weight_decay else ()
    return optax.chain(*clipping, *(groups.bind(transform, weights) for transform in transforms),
                       *_scale(weights, rates.updates), *decay, *_scale(weights, rates.factors), descend)
  return bind


def _schedule(rate: Rate) -> Schedule:
  """Returns the schedule of a rate; that of a number is constant."""
  schedule = rate.schedule if isinstance(rate, groups.Rates) else rate
  if callable(schedule):
    return schedule
  if not 0 < schedule < math.inf:
    raise ValueError(f'the learning rate {schedule} is not positive and finite; take one such as 1e-3')
  return lambda step: jnp.full_like(step, schedule, jnp.float32)


def _clipping(clip: float | None) -> tuple[optax.GradientTransformation, ...]:
  """Returns a transformation that clips; none where `clip` is None."""
  if clip is None:
    return ()
  if clip <= 0:
    raise ValueError(f'clip={clip} is not positive; None does not clip')
  return (optax.stateless(lambda updates, params: _clip(updates, clip)),)


def _clip(updates: Any, bound: float) -> Any:
  """Returns the updates, scaled down to the global norm `bound` where theirs is larger."""
  # `optax.clip_by_global_norm` divides each gradient. XLA does not fuse divisions into their consumers: it would write
  # the clipped gradients to memory, and Adam would read them twice. It fuses a factor.
  norm = optax.tree.norm(updates)
  factor = jnp.where(norm < bound, 1., bound / norm)
  return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates)


def sgd(rate: Rate, momentum: float = 0.9, clip: float | None = None, weight_decay: float = 0.,
        decays: groups.Mask = groups.decay_mask) -> Optimizer:
  """Gradient descent with momentum: v = momentum v + g; params -= rate v."""
  return chain(rate, clip, optax.trace(momentum), weight_decay=weight_decay, decays=decays)


def adam(rate: Rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
         clip: float | None = 1.) -> Optimizer:
  """Adam (Kingma and Ba 2015): the running mean of the gradient over the root of that of its square, bias-corrected."""
  return chain(rate, clip, optax.scale_by_adam(b1, b2, eps))


def adamw(rate: Rate, weight_decay: float = 0.1, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8,
          clip: float | None = 1., decays: groups.Mask = groups.decay_mask) -> Optimizer:
  """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
  return chain(rate, clip, optax.scale_by_adam(b1, b2, eps), weight_decay=weight_decay, decays=decays)


def nadamw(rate: Rate, weight_decay: float = 0.1, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8,
           clip: float | None = 1., decays: groups.Mask = groups.decay_mask) -> Optimizer:
  """AdamW with Nesterov's momentum (Dozat 2016) and a constant b1."""
  return chain(rate, clip, optax.scale_by_adam(b1, b2, eps, nesterov=True), weight_decay=weight_decay, decays=decays)


def rmsprop(rate: Rate, decay: float = 0.99, eps: float = 1e-8, momentum: float = 0., clip: float | None = 1.,
            weight_decay: float = 0., decays: groups.Mask = groups.decay_mask) -> Optimizer:
  """RMSprop (Tieleman and Hinton 2012): the gradient over the root of the running mean of its square."""
  momenta = (optax.trace(momentum),) if momentum else ()
  return chain(rate, clip, optax.scale_by_rms(decay, eps), *momenta, weight_decay=weight_decay, decays=decays)


def adafactor(rate: Rate, weight_decay: float = 0., decay: float = 0.8, bound: float = 1.,
              clip: float | None = None, decays: groups.Mask = groups.decay_mask) -> Optimizer:
  """Adafactor (Shazeer and Stern 2018): RMSprop that keeps mean squares of rows and of columns only; no momentum.

  Rows and columns are the two largest axes of an array; an array with fewer than two axes of 128 or more keeps all its
  mean squares. Their decay at step t is 1 - t ** -decay. In each layer, the root mean square of an update is reduced to
  `bound`, then multiplied by that of its parameter, which counts as 1e-3 at least. The rate is so relative to the
  parameters: 0.01 in the paper.
  """
  return chain(rate, clip, optax.scale_by_factored_rms(decay_rate=decay),
               lambda weights: _scale_by_parameters(weights, bound),
               weight_decay=weight_decay, decays=decays)


def _scale_by_parameters(weights: Any, bound: float) -> optax.GradientTransformation:
  """Returns a transformation that bounds the size of updates, and multiplies them by the size of their parameters."""
  def update(updates, params):
    def leaf(weight, update, param):
      axes = tuple(range(weight.stacked, update.ndim))
      rms = lambda x: jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))
      return update / jnp.maximum(1, rms(update) / bound) * jnp.maximum(1e-3, rms(param))
    return jax.tree.map(leaf, weights, updates, params)
  return optax.stateless(update)


def lion(rate: Rate, weight_decay: float = 1., b1: float = 0.9, b2: float = 0.99, clip: float | None = 1.,
         decays: groups.Mask = groups.decay_mask) -> Optimizer:
  """Lion (Chen et al. 2023): sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g.

  Its best rate is three to ten times smaller than that of AdamW, and its weight decay as many times larger.
  """
  return chain(rate, clip, optax.scale_by_lion(b1, b2), weight_decay=weight_decay, decays=decays)


class _AdanState(NamedTuple):
  count: jax.Array
  last: Any         # the last gradient
  mean: Any         # of the gradient
  difference: Any   # the mean of the change of the gradient
  square: Any       # the mean of (g + b2 d)^2


def adan(rate: Rate, weight_decay: float = 0.02, b1: float = 0.98, b2: float = 0.92, b3: float = 0.99,
         eps: float = 1e-8, clip: float | None = 1., decays: groups.Mask = groups.decay_mask
         ) -> Optimizer:
  """Adan (Xie et al. 2022), with d the change of the gradient g:

    update = (mean of g + b2 * mean of d) / sqrt(mean of (g + b2 d)^2).

  The means have the decays b1, b2 and b3, which are one minus those of the paper, and are bias-corrected. Weight decay
  is decoupled as in all optimizers here; the paper divides by 1 + rate * weight_decay instead.
  """
  # Optax 0.2.8 takes 1 - b2 as the factor of d: https://github.com/google-deepmind/optax/pull/1715.
  def init(params):
    return _AdanState(jnp.int32(0), *(optax.tree.zeros_like(params) for _ in range(4)))

  def update(updates, state, params=None):
    del params
    change = jax.tree.map(lambda g, last: jnp.where(state.count == 0, 0., g - last), updates, state.last)
    count = state.count + 1
    means = [optax.tree.update_moment(x, mean, b, order) for x, mean, b, order in (
        (updates, state.mean, b1, 1), (change, state.difference, b2, 1),
        (jax.tree.map(lambda g, d: g + b2 * d, updates, change), state.square, b3, 2))]
    corrected = (optax.tree.bias_correction(mean, b, count) for mean, b in zip(means, (b1, b2, b3)))
    steps = jax.tree.map(lambda m, v, n: (m + b2 * v) / (jnp.sqrt(n) + eps), *corrected)
    return steps, _AdanState(count, updates, *means)

  return chain(rate, clip, optax.GradientTransformation(init, update), weight_decay=weight_decay, decays=decays)


def muon(rate: Rate, weight_decay: float = 0.1, other_rate: float = 1., b1: float = 0.9, b2: float = 0.95,
         clip: float | None = 1., decays: groups.Mask = groups.hidden_mask) -> Optimizer:
  """Muon (Jordan et al. 2024): orthogonalised Nesterov momentum for matrices inside blocks, NAdam for other parameters.

  Updates are scaled to a root mean square of 0.2, that of Adam's updates (Liu et al. 2025), so that one rate serves
  both; the rate of other parameters is multiplied by `other_rate`. Each device holds whole copies of the momentum of
  matrices, and gathers the shards of their gradients. By default, only the matrices decay.
  """
  return chain(rate, clip, lambda weights: scale_by_muon(weights, b1, b2, other_rate), weight_decay=weight_decay,
               decays=decays)


def soap(rate: Rate, weight_decay: float = 0.1, b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8,
         precondition_every: int = 10, max_dim: int = 10_000, clip: float | None = 1.,
         decays: groups.Mask = groups.decay_mask) -> Optimizer:
  """SOAP (Vyas et al. 2024): Adam in the eigenbasis of Shampoo's preconditioner, for the matrices inside blocks.

  See `lm.optim.scale_by_soap.scale_by_soap`.
  """
  for name, value in {'precondition_every': precondition_every, 'max_dim': max_dim}.items():
    if value < 1:
      raise ValueError(f'{name}={value} is not positive; take 1 or more')
  return chain(rate, clip, lambda weights: scale_by_soap(weights, b1, b2, eps, precondition_every, max_dim),
               weight_decay=weight_decay, decays=decays)


def schedule_free(rate: Rate, weight_decay: float = 0.1, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
                  clip: float | None = 1., decays: groups.Mask = groups.decay_mask) -> Optimizer:
  """Schedule-free AdamW (Defazio et al. 2024): gradients are taken at y = (1 - b1) z + b1 x, and x is a mean of z.

  Steps change z. The mean is weighted by the square of the largest rate until then; warm up, then keep the rate
  constant. The parameters in training are y; the result is x, which `evaluation_params` returns. Weight decay is of y.
  """
  base = chain(rate, None, optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
               weight_decay=weight_decay, decays=decays)
  schedule = _schedule(rate)
  clipping = _clipping(clip)

  def bind(weights):
    # Optax counts these steps from 1.
    free = optax.contrib.schedule_free(groups.bind(base, weights), lambda count: schedule(count - 1), b1)
    return optax.chain(*clipping, free)
  return bind
