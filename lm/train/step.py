"""A step of training: forward pass, loss, backward pass, update."""
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm import optim, seeds, sharding
from lm.data.batch import Batch
from lm.train.gradient import accumulate
from lm.train.run import Run, State, advance, with_constants


def make_step(run: Run) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  """Returns `step_function(run)`, jitted for the platform of the mesh in use; it donates the state.

  It is the same function whenever it is made for the same run and platform, so that a step is traced once.
  """
  name = f'_step_{sharding.platform()}'
  if name not in vars(run):   # as `functools.cached_property` would keep it
    vars(run)[name] = jax.jit(step_function(run), donate_argnums=0, compiler_options=sharding.overlap_options() or None)
  return vars(run)[name]


def step_function(run: Run) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  """Returns the pure function `(state, batch, constants={}, key=None, number=None) -> (state, metrics)` of a step.

  The key is by default that of the run's seed; it is folded with the number of the step. Unless the run stops at it, a
  step whose loss or gradient is not finite returns the state as it was, its number included. So does a step whose
  `number`, that of the steps before it, is not the one of the state: the host starts a step before it knows the loss of
  the last one.
  """
  def step(state: State, batch: Batch, constants: Mapping[str, Any] = types.MappingProxyType({}),
           key: jax.Array | None = None, number: jax.Array | None = None):
    loss = functools.partial(_loss, run, constants)
    key = seeds.key(run.seed) if key is None else key
    key = jax.random.fold_in(jax.random.fold_in(key, 1), state.step)
    (loss_sum, (weight_sum, sums)), grads = run.gradient(loss, state.params, batch, key, run.accumulate)
    weight_sum = jnp.maximum(weight_sum, jnp.finfo(jnp.float32).tiny)
    factor = 1 / weight_sum   # multiply: XLA fuses it into each consumer, but materialises a division
    grads = jax.tree.map(lambda g: g * factor, grads)
    mean, norm = loss_sum / weight_sum, optax.tree.norm(grads)
    if run.offload_optimizer:   # it comes after the gradient, so that activations have its memory before
      grads, on_host = jax.lax.optimization_barrier((grads, state.opt_state))
      state = state._replace(opt_state=sharding.to_devices(on_host))
    # For second derivatives: no activations of one part are kept while the next one is computed.
    part_loss = loss if run.accumulate == 1 else jax.checkpoint(loss)
    updates, opt_state = run.transformation.update(
        grads, state.opt_state, state.params, value=mean,
        obj_fn=lambda params: _mean(accumulate(part_loss, params, batch, key, run.accumulate)))
    new = State(state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.seen)
    metrics = {'loss': mean, 'grad_norm': norm,
               'accuracy': sums['correct'] / jnp.maximum(sums['tokens'], 1),
               **{name: pair[0] / jnp.maximum(pair[1], 1) for name, pair in sums.items() if isinstance(pair, tuple)}}
    rate = optim.learning_rate(opt_state)
    if rate is not None:
      metrics['learning_rate'] = rate
    if run.guard is not None:
      keeps, history = run.guard.judge(state.seen, mean, norm)
      new = jax.tree.map(functools.partial(jnp.where, keeps), new, advance(state, 1))._replace(seen=history)
      metrics |= {'skipped': history.total, 'skipped_lately': jnp.sum(history.skipped)}
    if run.guard is None and run.not_finite is None:   # the run stops: the selection would take memory, and change bits
      return new, metrics
    is_next = jnp.isfinite(mean) & jnp.isfinite(norm)
    if number is not None:
      is_next &= state.step == number
    return jax.tree.map(functools.partial(jnp.where, is_next), new, state), metrics

  def step_to_host(*args: Any, **kwargs: Any):
    new, metrics = step(*args, **kwargs)
    return new._replace(opt_state=sharding.to_host(new.opt_state)), metrics

  return step_to_host if run.offload_optimizer else step


def _loss(run: Run, constants: Mapping[str, Any], params: Any, batch: Batch, key: jax.Array) -> tuple[Any, Any]:
  """Returns (loss_sum, (weight_sum, sums)) of a part of a batch, with the auxiliary outputs of the model."""
  reports = []

  def apply(*args, **kwargs):
    outputs = run.model.apply(*args, **kwargs)
    reports.append(outputs.aux)
    return outputs

  loss_sum, weight_sum, sums = _checked(run.objective.loss(apply, with_constants(params, constants), batch, key))
  if reports:
    aux = functools.reduce(lambda total, other: total.plus(other), reports)
    sums = {**sums, **aux.metrics}
    if aux.loss is not None:   # a mean, which is weighted like the losses of the parts of a batch
      loss_sum += weight_sum * aux.loss
      sums['auxiliary_loss'] = (aux.loss, jnp.float32(1))
  return loss_sum, (weight_sum, sums)


def _checked(result: Any) -> tuple[jax.Array, jax.Array, Mapping[str, Any]]:
  """Returns the result of an objective's loss. Raises ValueError where it is not (loss_sum, weight_sum, sums)."""
  match result:
    case (loss, weight, {'nll': _, 'tokens': _, 'correct': _}) if jnp.shape(loss) == jnp.shape(weight) == ():
      return result
  values = result if isinstance(result, tuple) else (result,)
  kinds = ', '.join(map(_kind, values))
  raise ValueError(f'the loss of the objective returned {kinds}; return (loss_sum, weight_sum, sums): two '
                   "scalars, whose quotient is the loss, and a dict of sums over targets: 'nll', 'tokens', 'correct'")


def _kind(x: Any) -> str:
  """Says what a value is, for an error."""
  if isinstance(x, dict):
    return str(sorted(x))
  return f'an array {list(jnp.shape(x))}' if jnp.shape(x) else 'a scalar'


def _mean(sums):
  loss_sum, (weight_sum, _) = sums
  return loss_sum / jnp.maximum(weight_sum, jnp.finfo(jnp.float32).tiny)
