"""Products of matrices whose factors are rounded to 8 bits. Qwix (github.com/google/qwix) rounds.

Each row of a factor, along the axes that the product contracts, has a scale of its own, its largest absolute value.
"""
import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lm.data.text.source import require


@dataclasses.dataclass(frozen=True)
class Rounding:
  """The dtypes to which factors are rounded: activations and weights to `forward`, gradients of outputs to `backward`.

  The gradient with respect to a weight is a product of factors that are not rounded, because it is a sum over all
  tokens, in which the rounding of the largest would hide the others (Wortsman et al. 2023).
  """
  forward: Any
  backward: Any

  def check(self) -> None:
    """Raises ImportError, which says what to install, if Qwix is missing."""
    require('qwix', 'quantized')


INT8 = Rounding(jnp.dtype('int8'), jnp.dtype('int8'))
FP8 = Rounding(jnp.dtype('float8_e4m3fn'), jnp.dtype('float8_e5m2'))   # Micikevicius et al. 2022

_rounding: contextvars.ContextVar[Rounding | None] = contextvars.ContextVar('rounding', default=None)


@contextlib.contextmanager
def rounded(rounding: Rounding) -> Iterator[None]:
  """Rounds the factors of all products with weights (`layers.einsum`) that are traced in this context."""
  token = _rounding.set(rounding)
  try:
    yield
  finally:
    _rounding.reset(token)


def current(dtype: Any) -> Rounding | None:
  """Returns the rounding of factors of this dtype in this context.

  It is None outside, and for float32, so that routers are not rounded, nor a model that is made to compute in float32.
  """
  return None if dtype == jnp.float32 else _rounding.get()


def product(formula: str, a: jax.Array, b: jax.Array, layout: Any, dtypes: tuple[Any, Any]) -> jax.Array:
  """Returns the float32 product of `a` and `b`, which are rounded to these dtypes, by the formula of an einsum.

  Integers are summed in int32.
  """
  qwix = require('qwix', 'quantized')
  operands, result = formula.split('->')
  a, b = (qwix.quantize(x.astype(jnp.float32), dtype,
                        channelwise_axes=[i for i, letter in enumerate(letters) if letter in result])
          for x, letters, dtype in zip((a, b), operands.split(','), dtypes, strict=True))
  total = jnp.int32 if jnp.issubdtype(a.qvalue.dtype, jnp.integer) else jnp.float32
  values = jnp.einsum(formula, a.qvalue, b.qvalue, out_sharding=layout, preferred_element_type=total)
  # A scale has size 1 along contracted axes, so that this product has the scale of each entry of the result.
  scales = jnp.einsum(formula, a.scale, b.scale, out_sharding=layout, precision='highest')
  return values.astype(jnp.float32) * scales
