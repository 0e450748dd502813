"""Flags of how a step is computed: precision, memory and accumulation."""
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lm import train
from lm.models import layers
from lm.models.prediction_heads import MultiToken
from lm.models.quantized_decoder import quantized
from lm.models.rounding import FP8, INT8, Rounding


@dataclasses.dataclass(frozen=True)
class Computation:
  """Computation.

  Args:
    precision: type of activations; parameters, norms and losses are float32. int8 and fp8 are bfloat16 with factors of
      8 bits in the products with the weights of blocks.
    remat: what the backward pass recomputes to save memory, all but matrix products, nothing, or all.
    accumulate: number of parts that a step is computed in, one after the other.
  """
  precision: Literal['float32', 'bfloat16', 'int8', 'fp8'] = 'float32'
  remat: Literal['products', 'none', 'full'] = 'products'
  accumulate: int = 1

  @property
  def dtype(self) -> Any:
    return jnp.dtype('bfloat16' if self.rounding else self.precision)

  @property
  def rounding(self) -> Rounding | None:
    """How factors of products are rounded; None where they are not."""
    return {'int8': INT8, 'fp8': FP8}.get(self.precision)

  @property
  def policy(self) -> Callable[..., bool] | None:
    """The policy of `jax.checkpoint` for what is kept of a layer; None keeps all."""
    return {'products': layers.keep_products, 'none': None,
            'full': jax.checkpoint_policies.nothing_saveable}[self.remat]

  def apply(self, model: Any) -> Any:
    """Returns a model that computes with this precision and remat.

    Raises:
      ValueError: the class of the model has a fixed precision or remat, and it is another one.
      ImportError: the precision needs a package that is not installed.
    """
    model = model.with_dtype(self.dtype)
    if isinstance(model, MultiToken):
      return dataclasses.replace(model, trunk=self.apply(model.trunk))
    if self.rounding:
      model = quantized(model, self.rounding)
    if any(field.name == 'remat' for field in dataclasses.fields(model)):
      return model.clone(remat=self.policy)
    if self.remat != 'products':
      raise ValueError(f'a model of class {type(model).__name__} takes no --remat={self.remat}; leave it out')
    return model

  def with_accumulation(self, run: train.Run) -> train.Run:
    """Returns the run with steps that are computed in parts."""
    return dataclasses.replace(run, accumulate=self.accumulate)
