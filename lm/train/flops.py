"""Counts the floating-point operations of a program in its trace: matrix products, including those in loops."""
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from lm import sharding
from lm.train.run import Run, abstract_batch, abstract_constants, with_constants
from lm.workdir import throughput

_UNKNOWN_LOOP = ('the program multiplies matrices in a loop whose number of iterations is not known before it runs, so '
                 'its FLOPs cannot be counted; compare by steps, tokens or seconds')


def count(function: Callable[..., Any], *args: Any) -> float:
  """Returns the operations of `function(*args)`, see `counter`."""
  return counter(function, *args)(*args)


def counter(function: Callable[..., Any], *args: Any) -> Callable[..., float]:
  """Traces a function, which may be expensive, and returns a function that counts its operations.

  It counts matrix products and convolutions, as 2 operations for each multiplication with its addition, and QR and
  symmetric eigenvalue decompositions, by the formulas of Golub and Van Loan. Elementwise operations are left out, since
  memory bounds them rather than arithmetic. So is attention by a fused kernel, which is not a matrix product to JAX.

  The body of a scan counts as often as it runs, while `cost_analysis` of XLA counts it once. Where the condition of a
  branch depends only on scalars of NumPy in `args`, the branch that they choose counts. Otherwise, and inside loops and
  derivatives, the most expensive branch counts.

  Args:
    function: the function.
    args: its arguments, which may be abstract.

  Returns:
    A function of arguments with the same shapes, which returns the number of operations.

  Raises:
    ValueError: there are matrix products in a loop that runs until a condition holds, as those of experts on CPU do.
  """
  jaxpr = jax.make_jaxpr(function)(*args)
  scalar = lambda x: x if isinstance(x, np.generic) else None
  return lambda *args: _count(jaxpr.jaxpr, list(map(scalar, jax.tree.leaves(args))))[0]


def count_training(function: Callable[..., Any], params: Any, *args: Any) -> float:
  """Returns the operations of `function(params, *args)` and of its gradient with respect to `params`.

  Each matrix product of the function counts once, and once more for each of its two factors that depends on `params`.
  Operations that the backward pass repeats to save memory do not count. `args` may be abstract.

  Raises:
    ValueError: as in `counter`.
  """
  jaxpr = jax.make_jaxpr(function)(params, *args).jaxpr
  trained = len(jax.tree.leaves(params))
  return _count_training(jaxpr, [i < trained for i in range(len(jaxpr.invars))])[0]


def flops_per_token(run: Run, mesh: jax.sharding.Mesh, shape: tuple[int, int] | None = None) -> float:
  """Returns the FLOPs of training a model on one token, by which the MFU is computed.

  The optimizer, and operations that the backward pass repeats, do not count. Of the scores of causal attention, the
  blocks that are computed count. Batches have the shape of `abstract_batch(run, mesh, shape)`.

  Raises:
    ValueError: the operations of the model cannot be counted.
  """
  # On a platform without kernels of its own, all products are JAX's, and are counted. Those in loops, as on CPU, and
  # those in fused attention cannot be.
  device = jax.sharding.AbstractDevice('any', 1, 'any')
  mesh = sharding.abstract_mesh(sharding.mesh_text(mesh), device)

  def loss(params, batch, constants):
    return run.objective.loss(run.model.apply, with_constants(params, constants), batch, None)

  with jax.sharding.use_abstract_mesh(mesh):
    batch = abstract_batch(run, mesh, shape)
    params = jax.eval_shape(lambda: run.model.init(jax.random.key(0)))
    return count_training(loss, params, batch, abstract_constants(run)) / math.prod(batch.tokens.shape)


def flops_by_step(run: Run, mesh: jax.sharding.Mesh, devices: list[Any]) -> Callable[[int], float] | None:
  """Returns a function from the number of a step to its FLOPs per token; None where the MFU cannot be computed.

  A line says why, except on CPUs.
  """
  unknown = sorted({device.device_kind for device in devices if throughput.peak_flops(device) is None})
  try:
    if not unknown:
      flops = {shape: flops_per_token(run, mesh, shape) for shape in run.schedule.shapes()}
      return lambda step: flops[run.schedule.shape(step - 1)]
    reason = f'the peak FLOP/s of {", ".join(unknown)} is not known; add it in lm/workdir/throughput.py'
  except ValueError as error:
    reason = str(error)
  if unknown != ['cpu']:
    print(f'no MFU is shown: {reason}')
  return None


def _count_training(jaxpr, depend: Sequence[bool]) -> tuple[float, list[bool]]:
  """Returns the operations, and which outputs depend on the parameters, given which inputs do."""
  values, total = dict(zip(jaxpr.invars, depend, strict=True)), 0.
  read = lambda v: not isinstance(v, core.Literal) and values.get(v, False)
  for equation in jaxpr.eqns:
    operations, outputs = _count_equation_training(equation, list(map(read, equation.invars)))
    total += operations
    values.update(zip(equation.outvars, outputs))
  return total, list(map(read, jaxpr.outvars))


def _count_equation_training(equation, depend: Sequence[bool]) -> tuple[float, Sequence[bool]]:
  name, params, inner = equation.primitive.name, equation.params, _inner(equation)
  if name == 'scan':
    # The inputs of a scan are constants, the carry, and stacks; its outputs are the carry, and stacks.
    count_stacks = lambda outer, inner: sum(a.aval.ndim > b.aval.ndim for a, b in zip(outer, inner, strict=True))
    carries = len(equation.outvars) - count_stacks(equation.outvars, inner[0].outvars)
    last = len(depend) - count_stacks(equation.invars, inner[0].invars)
    first = last - carries
    while True:   # until no further part of the carry depends on the parameters
      operations, outputs = _count_training(inner[0], depend)
      carried = [a or b for a, b in zip(depend[first:last], outputs)]
      if carried == depend[first:last]:
        return params['length'] * operations, outputs
      depend = [*depend[:first], *carried, *depend[last:]]
  if name == 'cond':
    operations, outputs = zip(*(_count_training(branch, depend[1:]) for branch in inner))
    return max(operations), list(map(any, zip(*outputs)))
  if name == 'while':
    if any(_count_training(jaxpr, [False] * len(jaxpr.invars))[0] for jaxpr in inner):
      raise ValueError(_UNKNOWN_LOOP)
  elif inner and len(inner[0].invars) == len(depend):   # not so for `scatter_add`, whose inner program adds two scalars
    operations, outputs = _count_training(inner[0], depend)
    return operations * (params['mesh'].size if name == 'shard_map' else 1), outputs
  is_dependent = any(depend) and name != 'stop_gradient'
  outputs = [is_dependent and jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in equation.outvars]
  shapes = [v.aval.shape for v in equation.invars]
  operations = _products(name, params, shapes, equation.outvars[0].aval.shape) if equation.outvars else 0.
  return operations * (1 + sum(depend[:2])), outputs


def _count(jaxpr, scalars: Sequence[Any] | None = None) -> tuple[float, list[Any]]:
  """Returns the operations and the values of scalar outputs, given those of scalar inputs; other values are None.

  Without `scalars`, as inside a loop, a shard or a derivative, no values are computed.
  """
  values, total = dict(zip(jaxpr.invars, scalars or ())), 0.

  def read(v):
    if scalars is None:
      return None
    return v.val if isinstance(v, core.Literal) else values.get(v)

  for equation in jaxpr.eqns:
    inputs = list(map(read, equation.invars))
    operations, outputs = _count_equation(equation, inputs)
    total += operations
    values.update(zip(equation.outvars, outputs))
  return total, list(map(read, jaxpr.outvars))


def _count_equation(equation, inputs: Sequence[Any]) -> tuple[float, Sequence[Any]]:
  name, params, inner = equation.primitive.name, equation.params, _inner(equation)
  if name == 'jit':
    return _count(inner[0], inputs)
  if name == 'cond':
    index, *branch_inputs = inputs
    costs = [_count(branch, branch_inputs)[0] for branch in inner]
    if index is None:
      return max(costs), ()
    return costs[min(max(int(index), 0), len(costs) - 1)], ()
  if inner:
    operations = sum(_count(jaxpr)[0] for jaxpr in inner)
    if name == 'while' and operations:
      raise ValueError(_UNKNOWN_LOOP)
    if name == 'scan':
      return params['length'] * operations, ()
    if name == 'shard_map':   # its program is that of one device
      return params['mesh'].size * operations, ()
    return operations, ()
  if not equation.outvars or equation.effects:
    return 0., ()
  if inputs and not any(x is None for x in inputs) and all(v.aval.shape == () for v in equation.outvars):
    outputs = equation.primitive.bind(*inputs, **params)
    return 0., outputs if equation.primitive.multiple_results else [outputs]
  return _products(name, params, [v.aval.shape for v in equation.invars], equation.outvars[0].aval.shape), ()


def _inner(equation) -> list[Any]:
  """Returns the programs inside an equation that run, which excludes those of custom derivatives."""
  values = [value for key, parameter in equation.params.items() if not key.startswith(('fwd', 'bwd', 'jvp', 'cond_'))
            for value in (parameter if isinstance(parameter, tuple) else (parameter,))]
  return [jaxpr for jaxpr in (getattr(value, 'jaxpr', value) for value in values) if hasattr(jaxpr, 'eqns')]


def _products(name: str, params: dict[str, Any], shapes: Sequence[tuple[int, ...]], out: tuple[int, ...]) -> float:
  """Returns the operations of a primitive, given the shapes of its inputs and of its output."""
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    return 2. * math.prod(out) * math.prod(shapes[0][i] for i in contracted)
  if name == 'ragged_dot_general':   # each row of the left factor meets one group of the right one
    numbers = params['ragged_dot_dimension_numbers']
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    shared = {*contracted, *batch, *numbers.rhs_group_dimensions}
    return 2. * math.prod(shapes[0]) * math.prod(n for i, n in enumerate(shapes[1]) if i not in shared)
  if name == 'conv_general_dilated':
    return 2. * math.prod(out) * math.prod(shapes[1]) / shapes[1][params['dimension_numbers'].rhs_spec[0]]
  if name == 'eigh':
    return 9. * math.prod(shapes[0]) * shapes[0][-1]
  if name == 'qr':   # R, and as many columns of Q
    k, m = sorted(shapes[0][-2:])
    return 4 / 3 * math.prod(shapes[0][:-2]) * k * k * (3 * m - k)
  return 0.
