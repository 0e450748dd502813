"""Probes of gradients: of padding, of accumulation, of each parameter, and on several devices."""
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import declarations, sharding, train
from lm.declarations import Role
from lm.doctor.findings import DoesNotApply, Finding, Verdict, judge
from lm.doctor.small_batch import text_tokens
from lm.doctor.subject import Pass, Subject, compiled_fast
from lm.models import moe
from lm.optim import groups


@functools.cache
def _distance_program() -> Any:
  """Returns a compiled function of two trees that returns the norms of their difference, and of the first."""
  def distance(first, second):
    first, second = jax.tree.map(lambda x: x.astype(jnp.float32), (first, second))
    return optax.tree.norm(jax.tree.map(jnp.subtract, first, second)), optax.tree.norm(first)
  return compiled_fast(distance)


def difference(first: Pass, second: Pass) -> float:
  """Returns the relative difference of two gradients, or that of their losses if it is larger."""
  gap, norm = map(float, _distance_program()(first.gradients, second.gradients))
  losses = [float(each.metrics['loss']) for each in (first, second)]
  return max(gap / max(norm, 1e-30), abs(losses[0] - losses[1]) / max(abs(losses[0]), 1e-30))


def rounding(subject: Subject) -> float:
  """Returns the relative difference of two gradients that rounding explains."""
  return 1e-4 if getattr(subject.base_model, 'dtype', jnp.float32) == jnp.float32 else 5e-2


def padding_has_no_gradient(subject: Subject) -> Finding:
  """Whether the loss and the gradient stay the same where the tokens and the labels of padding change."""
  batch = subject.small(subject.run.accumulate)
  padding = batch.segments == 0
  if not padding.any():
    raise DoesNotApply('short rows have no padding')
  ids = text_tokens(subject.special)
  other = np.where(padding, ids[np.arange(padding.size).reshape(padding.shape) % len(ids)], 0)
  changed = batch._replace(tokens=batch.tokens + np.where(padding, other - batch.tokens, 0),
                           targets=batch.targets + np.where(padding, other - batch.targets, 0))
  change = difference(subject.gradient_pass(batch), subject.gradient_pass(changed))
  text = f'other tokens and labels in {int(padding.sum())} positions of padding change the gradient by {change:.1e}'
  return judge(change <= rounding(subject) / 10, text,
               'padding is trained on, or seen; its weights and segments have to be 0, and the model has to use them')


def accumulation(subject: Subject) -> Finding:
  """Whether a step that is computed in parts has the gradient of a step in one part."""
  parts = max(subject.run.accumulate, 2)
  batch = subject.small(parts)
  change = difference(subject.gradient_pass(batch), subject.gradient_pass(batch, parts))
  text = f'a step in {parts} parts has the gradient of one part, with a difference of {change:.1e}'
  if getattr(subject.run.objective, 'denominator', None) is None:
    return judge(change <= rounding(subject), text,
                 'right only for losses that compare the rows of a part, as kto does', Verdict.WARNING)
  return judge(change <= rounding(subject), text, 'sums of losses have to be added over the parts, and divided once')


def accumulation_in_use(subject: Subject) -> Finding:
  """As `accumulation`, for runs that accumulate."""
  if subject.run.accumulate == 1:
    raise DoesNotApply('a step is computed in one part')
  return accumulation(subject)


def parameters_have_gradients(subject: Subject) -> Finding:
  """Whether each parameter has a gradient, in each layer, but those that the optimizer must not train."""
  weights = declarations.of(subject.run.model)
  sizes = _sizes_by_layer(subject.gradient_pass(subject.small(subject.run.accumulate)).gradients, weights)
  paths = [jax.tree_util.keystr(path, simple=True, separator='/')
           for path, _ in jax.tree_util.tree_leaves_with_path(subject.params)]
  idle, unexpected = [], []
  for path, size, weight in zip(paths, sizes, jax.tree.leaves(weights, is_leaf=_is_weight)):
    if weight.role is Role.CORRECTION:   # only `moe.BiasBalance` gives it a gradient, for `optim.with_router_balance`
      unexpected += [path] if size.any() and not _has_bias_balance(subject.base_model) else []
    elif not size.all():
      idle.append(path if not size.any() else f'{path} (layers {_numbers(np.flatnonzero(size == 0))})')
  constants = sorted(subject.constants.keys() & (subject.params.keys() if isinstance(subject.params, dict) else ()))
  if constants or unexpected:
    return judge(False, 'parameters that are not to be trained have a gradient', ', '.join([*constants, *unexpected]))
  fixed = f', and these are not trained: {", ".join(subject.constants)}' if subject.constants else ''
  return judge(not idle, f'{len(paths) - len(idle)} of {len(paths)} parameters have a gradient{fixed}',
               f'these have none and stay as they are: {", ".join(idle[:6])}{", ..." if len(idle) > 6 else ""}',
               Verdict.WARNING)


def _has_bias_balance(module: Any) -> bool:
  """Returns whether a model, or a part of it, balances experts by the corrections of their routers."""
  if isinstance(module, tuple | list):
    return any(map(_has_bias_balance, module))
  if not dataclasses.is_dataclass(module) or isinstance(module, type):
    return False
  fields = (field.name for field in dataclasses.fields(module) if field.name not in ('parent', 'name'))
  return isinstance(module, moe.BiasBalance) or any(_has_bias_balance(getattr(module, name, None)) for name in fields)


def _is_weight(x: Any) -> bool:
  return isinstance(x, declarations.Weight)


def _numbers(layers: np.ndarray) -> str:
  return ', '.join(map(str, layers[:4])) + (', ...' if len(layers) > 4 else '')


def _sizes_by_layer(gradients: Any, weights: Any) -> list[np.ndarray]:
  """Returns the largest entry of each gradient, for each layer where they are stacked, [L] or [1]."""
  def largest(weight, x):
    first = x.shape[0] if weight.stacked else 1
    axes = tuple(range(1 if weight.stacked else 0, x.ndim))
    return groups.replicated(jnp.max(jnp.abs(x.astype(jnp.float32)), axis=axes).reshape(first))
  sizes = compiled_fast(lambda gradients: jax.tree.map(largest, weights, gradients, is_leaf=_is_weight))(gradients)
  return [np.asarray(size) for size in jax.tree.leaves(sizes)]


def sharded_equals_single(subject: Subject) -> Finding:
  """Whether a step on the mesh has the loss and the gradient of a step on one device."""
  if subject.mesh.size == 1:
    raise DoesNotApply('the mesh has one device')
  if jax.process_count() > 1:
    raise DoesNotApply('no device can read the parameters of other processes')
  batch = subject.small()
  whole = subject.gradient_pass(batch)
  single = sharding.make_mesh(None, [subject.mesh.devices.flat[0]])
  with jax.set_mesh(single):
    params = _moved(subject.params, jax.eval_shape(subject.run.model.init, jax.random.key(0)), single)
    constants = _moved(dict(subject.constants), train.abstract_constants(subject.run), single)
    alone = dataclasses.replace(subject, mesh=single, params=params, constants=constants).gradient_pass(batch)
  change = difference(Pass(*jax.tree.map(np.asarray, tuple(whole))), Pass(*jax.tree.map(np.asarray, tuple(alone))))
  return judge(change <= rounding(subject), f'a step on {sharding.mesh_text(subject.mesh)} has the gradient of one '
               f'device, with a difference of {change:.1e}', 'the devices do not compute what one device does')


def _moved(tree: Any, abstract: Any, mesh: jax.sharding.Mesh) -> Any:
  """Returns a tree of arrays on another mesh, laid out as the abstract tree."""
  return jax.tree.map(lambda x, like: jax.device_put(np.asarray(x), like.sharding), tree,
                      train.with_shardings(abstract, mesh))
