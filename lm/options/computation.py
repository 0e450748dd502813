"""Flags of how a step is computed, which change no objective: precision, memory, accumulation."""
import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

from lm import train
from lm.models import layers
from lm.models.prediction_heads import MultiToken


@dataclasses.dataclass(frozen=True)
class Computation:
  """Computation.

  Args:
    precision: of activations; parameters are float32.
    remat: what the backward pass computes again rather than keeps, all but matrix products, nothing, or all.
    accumulate: parts that a step is computed in, one after the other.
  """
  precision: Literal['float32', 'bfloat16'] = 'float32'
  remat: Literal['products', 'none', 'full'] = 'products'
  accumulate: int = 1

  @property
  def dtype(self) -> Any:
    return jnp.dtype(self.precision)

  @property
  def policy(self) -> Callable[..., bool] | None:
    """What `jax.checkpoint` may keep of a layer; None for all."""
    return {'products': layers.keep_products, 'none': None,
            'full': jax.checkpoint_policies.nothing_saveable}[self.remat]

  def applied(self, model: Any) -> Any:
    """A model that computes so.

    Raises:
      ValueError: a model of a class that has one precision, or one remat, for good is given another.
    """
    model = model.with_dtype(self.dtype)
    if isinstance(model, MultiToken):
      return dataclasses.replace(model, trunk=self.applied(model.trunk))
    if any(field.name == 'remat' for field in dataclasses.fields(model)):
      return model.clone(remat=self.policy)
    if self.remat != 'products':
      raise ValueError(f'a model of class {type(model).__name__} takes no --remat={self.remat}; leave it out')
    return model

  def accumulated(self, run: train.Run) -> train.Run:
    """The run whose steps are computed in parts."""
    return dataclasses.replace(run, accumulate=self.accumulate)
