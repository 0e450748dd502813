"""Floating-point operations of a program, counted in what JAX traces: matrix products, also those inside loops."""
import math
from collections.abc import Callable
from typing import Any

import jax


def count(function: Callable[..., Any], *args: Any) -> float:
  """Of the matrix products and convolutions of `function(*args)`: 2 for each multiplication and its addition.

  `args` may be abstract. Bodies of scans count as often as they run, those of `while` once (their trips are not known),
  of branches the most expensive one. Elementwise work is left out: it is bound by memory, not arithmetic. XLA's own
  `cost_analysis` counts the body of a loop once.
  """
  return _jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _jaxpr(jaxpr) -> float:
  return sum(map(_equation, jaxpr.eqns))


def _equation(equation) -> float:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    shape = equation.invars[0].aval.shape
    return 2. * math.prod(equation.outvars[0].aval.shape) * math.prod(shape[i] for i in contracted)
  if name == 'ragged_dot_general':
    left, right = (v.aval.shape for v in equation.invars[:2])
    return 2. * math.prod(left) * right[-1]
  if name == 'conv_general_dilated':
    kernel = equation.invars[1].aval.shape
    out = kernel[params['dimension_numbers'].rhs_spec[0]]
    return 2. * math.prod(equation.outvars[0].aval.shape) * math.prod(kernel) / out
  if name == 'cond':
    return max(map(_jaxpr, (branch.jaxpr for branch in params['branches'])))
  inner = sum(_jaxpr(getattr(value, 'jaxpr', value)) for key, value in params.items()
              if hasattr(getattr(value, 'jaxpr', value), 'eqns') and not key.startswith(('fwd', 'bwd', 'jvp', 'cond_')))
  if name == 'shard_map':   # of one device
    inner *= params['mesh'].size
  return inner * (params['length'] if name == 'scan' else 1)
