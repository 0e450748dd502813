"""Floating-point operations of a program, counted in what JAX traces: matrix products, also those inside loops."""
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

_UNKNOWN_LOOP = ('the program multiplies matrices in a loop whose turns are not known before it runs, so its FLOPs '
                 'cannot be counted; compare by steps, tokens or seconds')


def count(function: Callable[..., Any], *args: Any) -> float:
  """The operations of `function(*args)`: see `counter`."""
  return counter(function, *args)(*args)


def counter(function: Callable[..., Any], *args: Any) -> Callable[..., float]:
  """Traces a function once; what is returned counts its operations for arguments of these shapes.

  Counted are matrix products and convolutions, 2 for each multiplication and its addition, and the QR and symmetric
  eigenvalue decompositions, by the formulas of Golub and Van Loan. `args` may be abstract. Where scalars are given as
  NumPy's, a branch of the program that depends on them alone is the one that they choose; of other branches, and of
  all inside loops and derivatives, the most expensive one counts. Bodies of scans count as often as they run.
  Elementwise work is left out: it is bound by memory, not arithmetic; and so is attention by cuDNN, which is no matrix
  product to JAX. XLA's own `cost_analysis` counts the body of a loop once.

  Raises:
    ValueError: for matrix products in a loop that runs until a condition holds, as those of experts on CPU do.
  """
  jaxpr = jax.make_jaxpr(function)(*args)
  known = lambda x: x if isinstance(x, np.generic) else None
  return lambda *args: _jaxpr(jaxpr.jaxpr, list(map(known, jax.tree.leaves(args))))[0]


def training(function: Callable[..., Any], params: Any, *args: Any) -> float:
  """The operations of `function(params, *args)` and of its gradient with respect to `params`, none of them twice.

  Those of a model, without what its program computes again to save memory: each matrix product of the function counts
  once, and once more for each of its two factors that depends on `params`. `args` may be abstract.

  Raises:
    ValueError: as in `counter`.
  """
  jaxpr = jax.make_jaxpr(function)(params, *args).jaxpr
  trained = len(jax.tree.leaves(params))
  return _training(jaxpr, [i < trained for i in range(len(jaxpr.invars))])[0]


def flops_per_token(run: Run, mesh: jax.sharding.Mesh, shape: tuple[int, int] | None = None) -> float:
  """Of a model's training, for the MFU: without the optimizer, and without what the backward pass computes again.

  With batches as `abstract_batch` has them. Attention counts the blocks of scores that causality leaves to compute.
  ValueError for a model whose products cannot be counted.
  """
  # Of devices on which all products are JAX's own: those in loops of CPUs and in fused attention cannot be counted.
  device = jax.sharding.AbstractDevice('TPU v4', 1, 'tpu')
  mesh = sharding.abstract_mesh(sharding.mesh_text(mesh), device)

  def loss(params, batch, constants):
    return run.objective.loss(run.model.apply, with_constants(params, constants), batch, None)

  with jax.sharding.use_abstract_mesh(mesh):
    batch = abstract_batch(run, mesh, shape)
    params = jax.eval_shape(lambda: run.model.init(jax.random.key(0)))
    return training(loss, params, batch, abstract_constants(run)) / math.prod(batch.tokens.shape)


def flops_by_step(run: Run, mesh: jax.sharding.Mesh, devices: list[Any]) -> Callable[[int], float] | None:
  """FLOPs of a token in each step, by its number; None where there is no MFU, which is said unless devices are CPUs."""
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


def _training(jaxpr, depend: Sequence[bool]) -> tuple[float, list[bool]]:
  """Operations, and which outputs depend on the parameters, given which inputs do."""
  values, total = dict(zip(jaxpr.invars, depend, strict=True)), 0.
  read = lambda v: not isinstance(v, core.Literal) and values.get(v, False)
  for equation in jaxpr.eqns:
    operations, outputs = _differentiated(equation, list(map(read, equation.invars)))
    total += operations
    values.update(zip(equation.outvars, outputs))
  return total, list(map(read, jaxpr.outvars))


def _differentiated(equation, depend: Sequence[bool]) -> tuple[float, Sequence[bool]]:
  name, params, inner = equation.primitive.name, equation.params, _inner(equation)
  if name == 'scan':
    # Its inputs are constants, what it carries, and stacks; its outputs what it carries, and stacks.
    stacks = lambda outer, inner: sum(a.aval.ndim > b.aval.ndim for a, b in zip(outer, inner, strict=True))
    carries = len(equation.outvars) - stacks(equation.outvars, inner[0].outvars)
    last = len(depend) - stacks(equation.invars, inner[0].invars)
    first = last - carries
    while True:   # until what the loop carries depends on no more
      operations, outputs = _training(inner[0], depend)
      carried = [a or b for a, b in zip(depend[first:last], outputs)]
      if carried == depend[first:last]:
        return params['length'] * operations, outputs
      depend = [*depend[:first], *carried, *depend[last:]]
  if name == 'cond':
    operations, outputs = zip(*(_training(branch, depend[1:]) for branch in inner))
    return max(operations), list(map(any, zip(*outputs)))
  if name == 'while':
    if any(_training(jaxpr, [False] * len(jaxpr.invars))[0] for jaxpr in inner):
      raise ValueError(_UNKNOWN_LOOP)
  elif inner and len(inner[0].invars) == len(depend):   # a sum of scattered values has a program of one sum
    operations, outputs = _training(inner[0], depend)
    return operations * (params['mesh'].size if name == 'shard_map' else 1), outputs
  real = any(depend) and name != 'stop_gradient'
  outputs = [real and jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in equation.outvars]
  shapes = [v.aval.shape for v in equation.invars]
  operations = _products(name, params, shapes, equation.outvars[0].aval.shape) if equation.outvars else 0.
  return operations * (1 + sum(depend[:2])), outputs


def _jaxpr(jaxpr, known: Sequence[Any] | None = None) -> tuple[float, list[Any]]:
  """Operations, and the scalars that come out, given inputs; None is what is not known."""
  values, total = dict(zip(jaxpr.invars, known or ())), 0.
  # In a loop, a shard or a derivative nothing is known.
  read = lambda v: None if known is None else v.val if isinstance(v, core.Literal) else values.get(v)
  for equation in jaxpr.eqns:
    inputs = list(map(read, equation.invars))
    operations, outputs = _equation(equation, inputs)
    total += operations
    values.update(zip(equation.outvars, outputs))
  return total, list(map(read, jaxpr.outvars))


def _equation(equation, inputs: Sequence[Any]) -> tuple[float, Sequence[Any]]:
  name, params, inner = equation.primitive.name, equation.params, _inner(equation)
  if name == 'jit':
    return _jaxpr(inner[0], inputs)
  if name == 'cond':
    index, *rest = inputs
    costs = [_jaxpr(branch, rest)[0] for branch in inner]
    return max(costs) if index is None else costs[min(max(int(index), 0), len(costs) - 1)], ()
  if inner:
    operations = sum(_jaxpr(jaxpr)[0] for jaxpr in inner)
    if name == 'while' and operations:
      raise ValueError(_UNKNOWN_LOOP)
    times = params['length'] if name == 'scan' else params['mesh'].size if name == 'shard_map' else 1   # of one device
    return times * operations, ()
  if not equation.outvars or equation.effects:
    return 0., ()
  if inputs and not any(x is None for x in inputs) and all(v.aval.shape == () for v in equation.outvars):
    found = equation.primitive.bind(*inputs, **params)
    return 0., found if equation.primitive.multiple_results else [found]
  return _products(name, params, [v.aval.shape for v in equation.invars], equation.outvars[0].aval.shape), ()


def _inner(equation) -> list[Any]:
  """The programs in a program's equation that are run: those of a derivative of its own are not."""
  values = [value for key, parameter in equation.params.items() if not key.startswith(('fwd', 'bwd', 'jvp', 'cond_'))
            for value in (parameter if isinstance(parameter, tuple) else (parameter,))]
  return [jaxpr for jaxpr in (getattr(value, 'jaxpr', value) for value in values) if hasattr(jaxpr, 'eqns')]


def _products(name: str, params: dict[str, Any], shapes: Sequence[tuple[int, ...]], out: tuple[int, ...]) -> float:
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    return 2. * math.prod(out) * math.prod(shapes[0][i] for i in contracted)
  if name == 'ragged_dot_general':   # each row of the left once, with one group of the right
    numbers = params['ragged_dot_dimension_numbers']
    (_, contracted), (_, batch) = numbers.dot_dimension_numbers
    shared = {*contracted, *batch, *numbers.rhs_group_dimensions}
    return 2. * math.prod(shapes[0]) * math.prod(n for i, n in enumerate(shapes[1]) if i not in shared)
  if name == 'conv_general_dilated':
    return 2. * math.prod(out) * math.prod(shapes[1]) / shapes[1][params['dimension_numbers'].rhs_spec[0]]
  if name == 'eigh':
    return 9. * math.prod(shapes[0]) * shapes[0][-1]
  if name == 'qr':   # R, then as many columns of Q
    k, m = sorted(shapes[0][-2:])
    return 4 / 3 * math.prod(shapes[0][:-2]) * k * k * (3 * m - k)
  return 0.
