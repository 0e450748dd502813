"""Optimizers, on Optax: one function each.

Each takes a learning rate (a number, a schedule, see `lm.optim.schedules`, or `groups.Rates`, of several) and keeps its
present value in its state, where `learning_rate` reads it. `clip` bounds the global norm of the gradient.
`weight_decay` is decoupled (Loshchilov and Hutter 2019): params -= rate * (update + weight_decay * params), for the
parameters that the mask `decays` is true for. To add an optimizer, give `chain` what makes an update of a gradient.

What a function here returns is itself a function: of the declarations of a model's weights (`lm.declarations`), to the
Optax transformation for these weights. `train` gives it those of the run's model; `bound` does so elsewhere.
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


def _multiplied(weights: Any, factors: groups.Factors) -> tuple[optax.GradientTransformation, ...]:
  """What multiplies each update by its factor; nothing where there are no factors."""
  of_each = groups.factors_of(weights, factors)
  scale = optax.stateless(lambda updates, params: jax.tree.map(lambda factor, u: factor * u, of_each, updates))
  return (scale,) if factors else ()


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


def advanced(opt_state: Any, steps: int) -> Any:
  """The state of an optimizer whose schedules are so many steps further."""
  def further(x):
    match x:
      case _Scheduled() | optax.ScaleByScheduleState():
        return x._replace(count=x.count + steps)
      case ScheduleFreeState():   # it reads the rate, for the weight of a step in the average
        return x._replace(step_count=x.step_count + steps, base_optimizer_state=advanced(x.base_optimizer_state, steps))
    return x

  scheduled = lambda x: isinstance(x, (_Scheduled, optax.ScaleByScheduleState, ScheduleFreeState))
  return jax.tree.map(further, opt_state, is_leaf=scheduled)


def chain(rate: Rate, clip: float | None, *transforms: Optimizer, weight_decay: float = 0.,
          decays: groups.Mask = groups.decayed) -> Optimizer:
  """An optimizer: clips the gradient, makes an update of it, adds weight decay, and goes down at the rate.

  `transforms` are Optax's, or functions that return one for the declared weights.
  """
  rates = rate if isinstance(rate, groups.Rates) else groups.Rates(rate)
  if not 0 <= weight_decay < math.inf:
    raise ValueError(f'weight_decay={weight_decay} is negative or not finite')
  clipping, descend = _clipping(clip), _descend(_schedule(rates))

  def bind(weights):
    decay = (optax.add_decayed_weights(weight_decay, decays(weights)),) if weight_decay else ()
    return optax.chain(*clipping, *(groups.bound(transform, weights) for transform in transforms),
                       *_multiplied(weights, rates.updates), *decay, *_multiplied(weights, rates.factors), descend)
  return bind


def _schedule(rate: Rate) -> Schedule:
  """The schedule of a rate; a number is constant."""
  schedule = rate.schedule if isinstance(rate, groups.Rates) else rate
  if callable(schedule):
    return schedule
  if not 0 < schedule < math.inf:
    raise ValueError(f'a learning rate of {schedule} is not positive and finite')
  return lambda step: jnp.full_like(step, schedule, jnp.float32)


def _clipping(clip: float | None) -> tuple[optax.GradientTransformation, ...]:
  if clip is not None and clip <= 0:
    raise ValueError(f'clip={clip} is not positive; None does not clip')
  return () if clip is None else (optax.stateless(lambda updates, params: clipped(updates, clip)),)


def clipped(updates: Any, bound: float) -> Any:
  """The updates, or as much of them as has the global norm `bound`."""
  # As `optax.clip_by_global_norm`, which divides each gradient: XLA does not fuse divisions into all that reads them,
  # so that clipped gradients are written to memory, and read back twice by Adam. A factor costs nothing.
  norm = optax.tree.norm(updates)
  factor = jnp.where(norm < bound, 1., bound / norm)
  return jax.tree.map(lambda x: x * factor.astype(x.dtype), updates)


def sgd(rate: Rate, momentum: float = 0.9, clip: float | None = None, weight_decay: float = 0.,
        decays: groups.Mask = groups.decayed) -> Optimizer:
  """v = momentum v + g; params -= rate v."""
  return chain(rate, clip, optax.trace(momentum), weight_decay=weight_decay, decays=decays)


def adam(rate: Rate, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
         clip: float | None = 1.) -> Optimizer:
  """Adam (Kingma and Ba 2015): the mean of the gradient over the root of the mean of its square, bias-corrected."""
  return chain(rate, clip, optax.scale_by_adam(b1, b2, eps))


def adamw(rate: Rate, weight_decay: float = 0.1, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8,
          clip: float | None = 1., decays: groups.Mask = groups.decayed) -> Optimizer:
  """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
  return chain(rate, clip, optax.scale_by_adam(b1, b2, eps), weight_decay=weight_decay, decays=decays)


def nadamw(rate: Rate, weight_decay: float = 0.1, b1: float = 0.9, b2: float = 0.95, eps: float = 1e-8,
           clip: float | None = 1., decays: groups.Mask = groups.decayed) -> Optimizer:
  """AdamW with Nesterov's momentum (Dozat 2016), of constant b1."""
  return chain(rate, clip, optax.scale_by_adam(b1, b2, eps, nesterov=True), weight_decay=weight_decay, decays=decays)


def rmsprop(rate: Rate, decay: float = 0.99, eps: float = 1e-8, momentum: float = 0., clip: float | None = 1.,
            weight_decay: float = 0., decays: groups.Mask = groups.decayed) -> Optimizer:
  """RMSprop (Tieleman and Hinton 2012): the gradient over the root of the running mean of its square."""
  momenta = (optax.trace(momentum),) if momentum else ()
  return chain(rate, clip, optax.scale_by_rms(decay, eps), *momenta, weight_decay=weight_decay, decays=decays)


def adafactor(rate: Rate, weight_decay: float = 0., decay: float = 0.8, bound: float = 1.,
              clip: float | None = None, decays: groups.Mask = groups.decayed) -> Optimizer:
  """Adafactor (Shazeer and Stern 2018): RMSprop whose mean squares are kept as one of each row and one of each column.

  Of the two largest axes of an array, where both have 128 or more; others by themselves. At step t they have the decay
  1 - t ** -decay. An update's root mean square is at most `bound`, and is then multiplied by that of its parameter, at
  least 1e-3, each of a layer: the rate is relative, 0.01 in the paper. There is no momentum.
  """
  return chain(rate, clip, optax.scale_by_factored_rms(decay_rate=decay),
               lambda weights: _relative(weights, bound),
               weight_decay=weight_decay, decays=decays)


def _relative(weights: Any, bound: float) -> optax.GradientTransformation:
  def update(updates, params):
    def leaf(weight, update, param):
      axes = tuple(range(weight.stacked, update.ndim))
      size = lambda x: jnp.sqrt(jnp.mean(jnp.square(x), axis=axes, keepdims=True))
      return update / jnp.maximum(1, size(update) / bound) * jnp.maximum(1e-3, size(param))
    return jax.tree.map(leaf, weights, updates, params)
  return optax.stateless(update)


def lion(rate: Rate, weight_decay: float = 1., b1: float = 0.9, b2: float = 0.99, clip: float | None = 1.,
         decays: groups.Mask = groups.decayed) -> Optimizer:
  """Lion (Chen et al. 2023): sign(b1 m + (1 - b1) g), then m = b2 m + (1 - b2) g.

  It takes a rate three to ten times smaller than AdamW's, and a weight decay as much larger.
  """
  return chain(rate, clip, optax.scale_by_lion(b1, b2), weight_decay=weight_decay, decays=decays)


class _AdanState(NamedTuple):
  count: jax.Array
  last: Any         # gradient
  mean: Any
  difference: Any   # mean of the gradient's change
  square: Any


def adan(rate: Rate, weight_decay: float = 0.02, b1: float = 0.98, b2: float = 0.92, b3: float = 0.99,
         eps: float = 1e-8, clip: float | None = 1., decays: groups.Mask = groups.decayed
         ) -> Optimizer:
  """Adan (Xie et al. 2022): with d the change of the gradient, (mean of g + b2 mean of d) / root of mean (g + b2 d)^2.

  Means of decay b1, b2, b3, bias-corrected; a b is one minus the paper's. Weight decay is decoupled as in all of these,
  where the paper's divides by 1 + rate * weight_decay.
  """
  # Not Optax's, whose factor of d is 1 - b2 (0.2.8), https://github.com/google-deepmind/optax/pull/1715.
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


def muon(rate: Rate, weight_decay: float = 0.1, rest: float = 1., b1: float = 0.9, b2: float = 0.95,
         clip: float | None = 1., decays: groups.Mask = groups.hidden) -> Optimizer:
  """Muon (Jordan et al. 2024): Nesterov's momentum, orthogonalised, for the matrices inside blocks; NAdam for all else.

  Updates are scaled to the root mean square that Adam's have, 0.2 (Liu et al. 2025), so that one rate serves both;
  all else is updated at `rest` times it. A matrix is orthogonalised whole: its shards are gathered on each device, and
  so is its momentum. By default, only the matrices decay.
  """
  return chain(rate, clip, lambda weights: scale_by_muon(weights, b1, b2, rest), weight_decay=weight_decay,
               decays=decays)


def soap(rate: Rate, weight_decay: float = 0.1, b1: float = 0.95, b2: float = 0.95, eps: float = 1e-8,
         precondition_every: int = 10, max_dim: int = 10_000, clip: float | None = 1.,
         decays: groups.Mask = groups.decayed) -> Optimizer:
  """SOAP (Vyas et al. 2024): Adam in the eigenbasis of Shampoo's preconditioner, for the matrices inside blocks.

  See `lm.optim.scale_by_soap.scale_by_soap`.
  """
  for name, value in {'precondition_every': precondition_every, 'max_dim': max_dim}.items():
    if value < 1:
      raise ValueError(f'{name}={value} is not positive')
  return chain(rate, clip, lambda weights: scale_by_soap(weights, b1, b2, eps, precondition_every, max_dim),
               weight_decay=weight_decay, decays=decays)


def sophia(rate: Rate, weight_decay: float = 0.1, b1: float = 0.965, b2: float = 0.99, gamma: float = 0.01,
           curvature_every: int = 10, clip: float | None = 1., decays: groups.Mask = groups.decayed
           ) -> Optimizer:
  """Sophia-H (Liu et al. 2023): clip(m / max(gamma h, eps), 1), with h the diagonal of the Hessian.

  Every `curvature_every` steps, h is estimated after Hutchinson, z * (Hessian z) with random signs z, at the cost of
  a second backward pass through the first; its running mean of decay b2 counts from the next step on. `update` needs
  `obj_fn`, the loss as a function of the parameters.
  """
  inner = optax.contrib.sophia(-1., b1, b2, weight_decay=0., gamma=gamma, update_interval=curvature_every,
                               hessian_diagonal_fn=hutchinson())
  return chain(rate, clip, inner, weight_decay=weight_decay, decays=decays)


def hutchinson() -> optax.GradientTransformationExtraArgs:
  """The diagonal of the Hessian of `obj_fn` as z * (Hessian z), of which it is the mean over random signs z.

  Not Optax's, whose derivatives are forward over reverse, which functions with a gradient of their own have not.
  """
  def update(updates, count, params=None, *, obj_fn=None, **unused):
    del updates, unused
    if obj_fn is None:
      raise ValueError('sophia needs the loss as a function of the parameters, update(..., obj_fn=...)')
    signs = random_signs(params, count)
    along = lambda p: sum(jax.tree.leaves(jax.tree.map(lambda g, z: jnp.sum(g * z), jax.grad(obj_fn)(p), signs)))
    return jax.tree.map(jnp.multiply, signs, jax.grad(along)(params)), count + 1
  return optax.GradientTransformationExtraArgs(lambda params: jnp.int32(0), update)


def random_signs(params: Any, count: jax.Array) -> Any:
  """A tree of 1 and -1, as the parameters are, different ones for each count."""
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))
  return tree.unflatten([groups.laid_out_like(jax.random.rademacher(key, x.shape, x.dtype), x)
                         for key, x in zip(keys, leaves)])


def schedule_free(rate: Rate, weight_decay: float = 0.1, b1: float = 0.9, b2: float = 0.999, eps: float = 1e-8,
                  clip: float | None = 1., decays: groups.Mask = groups.decayed) -> Optimizer:
  """Schedule-free AdamW (Defazio et al. 2024): gradients at y = (1 - b1) z + b1 x, steps of z, and x the mean of z.

  The mean is weighted by the square of the largest rate so far; warm up, then leave the rate constant. The parameters
  are y; what to evaluate and to keep is x, which `evaluated` gives. Weight decay is that of y.
  """
  base = chain(rate, None, optax.scale_by_rms(b2, eps, eps_in_sqrt=False, bias_correction=True),
               weight_decay=weight_decay, decays=decays)
  schedule = _schedule(rate)
  clipping = _clipping(clip)

  def bind(weights):
    # Its first step is number 1.
    free = optax.contrib.schedule_free(groups.bound(base, weights), lambda count: schedule(count - 1), b1)
    return optax.chain(*clipping, free)
  return bind
