"""Replays a step that was not finite in float32, and names the first module whose values are not finite.

The order is that of the computation: parameters, activations by layer, logits, loss; then the gradients of activations
from the last layer to the first, and those of parameters; then the update of the optimizer.
"""
import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import seeds
from lm.data.batch import Batch
from lm.train import not_finite
from lm.train.feed import DataFeed
from lm.train.gradient import accumulate, accumulate_gradients
from lm.train.interfaces import Model
from lm.train.run import Run, State, abstract_state, init, load_constants, with_constants
from lm.train.step import step_function
from lm.workdir import arrays, checkpoint, integrity

# The activations that models name for taps, and the modules that compute them.
ACTIVATIONS = {'query': 'attention', 'key': 'attention', 'value': 'attention', 'attended': 'attention',
               'residual': 'attention', 'gate': 'feed_forward', 'up': 'feed_forward', 'router': 'feed_forward',
               'output': 'feed_forward'}
_LAYERS = 1024   # more than any model has
_SHOWN = 6


def replay(run: Run, workdir: pathlib.Path, mesh: jax.sharding.Mesh, step: int) -> list[str]:
  """Returns lines on what is not finite in a step; the first line names the first.

  A step that `not_finite.keep` has kept is loaded. For others, and where the parameters before the step are not finite
  themselves, the steps from the last checkpoint on are computed again, up to the one whose update made them so.

  Raises:
    ValueError: the run has no such step, or the steps before it cannot be computed again.
  """
  if not 1 <= step <= run.steps:
    raise ValueError(f'the run has no step {step} to replay, its steps are 1 to {run.steps}; give one of them')
  run = dataclasses.replace(run, offload_optimizer=False)   # its state is read on the devices
  constants = load_constants(run)
  is_kept = step in not_finite.steps_kept(workdir)
  state, batch = not_finite.load(run, workdir, mesh, step) if is_kept else (None, None)
  lines = []
  if state is None:
    last, (step, state, batch) = step, _compute_again(run, workdir, mesh, step, constants)
    if step < last:
      lines = [f'the parameters before step {last} are not finite: the update of step {step} made them so']
  models = {'float32': run.model.with_dtype(jnp.float32) if hasattr(run.model, 'with_dtype') else run.model}
  dtype = getattr(run.model, 'dtype', jnp.float32)
  if jnp.dtype(dtype) != jnp.float32:
    models[jnp.dtype(dtype).name] = run.model   # where float32 has no fault, its range is the reason
  for name, model in models.items():
    with jax.default_matmul_precision('highest') if name == 'float32' else contextlib.nullcontext():
      places = list(_places(run, model, state, batch, constants))
    if places:
      shown = [*places[1:_SHOWN], *([f'{len(places) - _SHOWN} more'] if len(places) > _SHOWN else [])]
      after = f'; after it: {", ".join(shown)}' if shown else ''
      return [f'step {step} in {name}: the first that is not finite is {places[0]}{after}', *lines]
    lines.append(f'step {step} in {name}: all values are finite')
  if not is_kept:
    return [*lines, f'{workdir} has no record of a fault at this step']
  return [*lines, 'the fault does not come again: it may be one of the device, or of operations whose order varies']


def _compute_again(run: Run, workdir: pathlib.Path, mesh: jax.sharding.Mesh, last: int, constants: Any
                   ) -> tuple[int, State, Batch]:
  """Returns (step, state before it, batch) of the first step whose update makes parameters not finite, or of `last`."""
  with checkpoint.Checkpoints(workdir / 'checkpoints', create=False) as checkpoints:
    earlier = [number for number in checkpoints.steps() if number < last]
    state = checkpoints.restore(abstract_state(run, mesh), earlier[-1]).state if earlier else None
  if state is None and run.start is not None:
    raise ValueError(f'step {last} comes before the first checkpoint of a run that starts from other parameters; save '
                     'more often (--save_every), and let it fail again')
  if state is None:
    state = jax.jit(functools.partial(init, run))(seeds.key(run.seed))
  first = int(state.step) + 1
  print(f'step {last} is computed again' if first == last else f'steps {first} to {last} are computed again')
  data = run.data.open(workdir, control=run.objective.control)
  compute, batches = jax.jit(step_function(run)), not_finite.LeftOutBatches(workdir)
  with contextlib.closing((run.feed or DataFeed)(run, data, mesh)) as feed:
    for number in range(int(state.step), last):
      batch = feed(batches.index(number), state._replace(params=with_constants(state.params, constants)))
      new, _ = compute(state, batch, constants, seeds.key(run.seed))
      if number + 1 == last or not integrity.all_finite(new.params):
        break
      state = new
  return number + 1, state, batch


def _places(run: Run, model: Model, state: State, batch: Batch, constants: Any) -> Iterator[str]:
  """Yields in words what is not finite in a step, in the order of the computation."""
  names = _tapped(model, state, batch, constants)
  key = jax.random.fold_in(jax.random.fold_in(seeds.key(run.seed), 1), state.step)
  order: list[str] = []
  yield from (f'the parameter {name}' for name in _leaves(state.params))
  counts, watched, grads, mean = jax.jit(functools.partial(_compute, run, model, names, order))(
      state.params, batch, constants, key)
  counts, watched = jax.tree.map(np.asarray, (counts, watched))
  for layer in range(_LAYERS):
    yield from (f'layer {layer}, {ACTIVATIONS[name]}: {name}' for name in order if counts[name][layer])
  words = {'hidden': 'the normalised output of the last layer', 'logits': 'the logits', 'loss': 'the loss'}
  yield from (text for name, text in words.items() if counts[name])
  if watched['hidden'][0]:
    yield 'the gradient of the output of the last layer'
  for layer in reversed(range(_LAYERS)):
    yield from (f'the gradient of layer {layer}, {ACTIVATIONS[name]}: {name}' for name in reversed(order)
                if watched[name][layer])
  yield from (f'the gradient of the parameter {name}' for name in _leaves(grads))

  @jax.jit
  def update(state, grads, value):
    updates, opt_state = run.transformation.update(grads, state.opt_state, state.params, value=value,
                                                   obj_fn=lambda params: value)
    return updates, opt_state, optax.apply_updates(state.params, updates)

  trees = update(state, grads, mean)
  for what, tree in zip(('the update of the optimizer for', 'the state of the optimizer,', 'the new value of'), trees):
    yield from (f'{what} {name}' for name in _leaves(tree))
  if not _leaves(trees[-1]) and not integrity.all_finite(trees[-1]):   # squares overflow before values do
    largest = max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(trees[-1]))
    yield f'the norm of the new parameters, whose largest value is {largest:.1e}'


def _compute(run: Run, model: Model, names: Sequence[str], order: list[str], params: Any, batch: Batch, constants: Any,
             key: jax.Array) -> tuple[Any, Any, Any, jax.Array]:
  """Returns (counts, watched, gradients, mean loss): how many values, and how many of their gradients, are not finite.

  Both are dicts by activation, of [layers]; `order` becomes the order of the activations within a layer.
  """
  def loss(params, watches, part, key):
    counts = {name: jnp.zeros(_LAYERS) for name in names} | {'hidden': jnp.float32(0), 'logits': jnp.float32(0)}
    additional = []

    def tap(name, x, layer):
      if name not in order:
        order.append(name)
      return _watch(x, watches[name][layer]), jnp.zeros(_LAYERS).at[layer].set(_count(x))

    def apply(*args, **kwargs):
      taps = {'taps': tuple((name, functools.partial(tap, name)) for name in names)} if names else {}
      outputs = model.apply(*args, **taps, **kwargs)
      for name in names:
        counts[name] += jnp.sum(outputs.readings[name], axis=0)
      by_position = jnp.moveaxis(jax.lax.stop_gradient(outputs.hidden), 1, 0)[:, :, None]
      counts['hidden'] += _count(outputs.hidden)
      counts['logits'] += jnp.sum(jax.lax.map(lambda hidden: _count(outputs.head(hidden)), by_position))
      if outputs.aux.loss is not None:
        additional.append(outputs.aux.loss)
      return outputs._replace(hidden=_watch(outputs.hidden, watches['hidden'][0]))

    loss_sum, weight_sum, _ = run.objective.loss(apply, with_constants(params, constants), part, key)
    loss_sum += weight_sum * sum(additional)
    return loss_sum, (weight_sum, {**counts, 'loss': _count(loss_sum)})

  watches = {name: jnp.zeros(_LAYERS) for name in (*names, 'hidden')}

  def part_gradient(params, part, key):
    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, watches, part, key)

  (loss_sum, (weight_sum, counts)), (grads, watched) = accumulate(part_gradient, params, batch, key, run.accumulate)
  if run.gradient is not accumulate_gradients:
    plain = lambda params, part, key: (lambda total, aux: (total, (aux[0], {})))(*loss(params, watches, part, key))
    (loss_sum, (weight_sum, _)), grads = run.gradient(plain, params, batch, key, run.accumulate)
  factor = 1 / jnp.maximum(weight_sum, jnp.finfo(jnp.float32).tiny)
  return counts, watched, jax.tree.map(lambda g: g * factor, grads), loss_sum * factor


def _tapped(model: Model, state: State, batch: Batch, constants: Any) -> list[str]:
  """Returns the activations that a model has for taps."""
  names = []
  for name in ACTIVATIONS:
    taps = ((name, lambda x, layer: (x, None)),)
    # Models without taps raise TypeError, those without this activation ValueError.
    with contextlib.suppress(TypeError, ValueError):
      jax.eval_shape(lambda params, taps=taps: model.apply(params, batch, taps=taps).hidden,
                     with_constants(state.params, constants))
      names.append(name)
  return names


@jax.custom_vjp
def _watch(x: jax.Array, count: jax.Array) -> jax.Array:
  """Returns `x`. The "gradient" of `count` is the number of values of the gradient of `x` that are not finite."""
  del count
  return x


_watch.defvjp(lambda x, count: (x, None), lambda _, gradient: (gradient, _count(gradient)))


def _count(x: jax.Array) -> jax.Array:
  return jnp.sum(~jnp.isfinite(x), dtype=jnp.float32)


def _leaves(tree: Any) -> list[str]:
  """Returns the names of the arrays that are not finite; of stacked layers, with the place in the stack."""
  names = []
  for name, bad in jax.tree.map(np.atleast_1d, _bad(arrays.named(tree))).items():
    names += [f'{name}[{i}]' if len(bad) > 1 else name for i in np.flatnonzero(bad)]
  return names


@jax.jit
def _bad(named: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Returns whether arrays have values that are not finite; for stacked layers, by layer."""
  return {name: jnp.any(~jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)) if 'blocks.' in name else None)
          for name, leaf in named.items() if jnp.issubdtype(leaf.dtype, jnp.floating)}
