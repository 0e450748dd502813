"""Flags of how a step is computed: precision, memory and accumulation."""
import dataclasses
from typing import Any, Literal

import jax.numpy as jnp

from lm import train
from lm.models import layers
from lm.models.prediction_heads import MultiToken
from lm.models.quantized_decoder import quantized
from lm.models.rematerialisation import SavePolicy
from lm.models.rounding import FP8, INT8, Rounding


@dataclasses.dataclass(frozen=True)
class Computation:
  """Computation.

  Args:
    precision: type of activations; parameters, norms and losses are float32. int8 and fp8 are bfloat16 with factors of
      8 bits in the products with the weights of blocks.
    keep_activations: what is kept of a layer for the backward pass, which computes the others again: products (of
      matrices), all, none, or names such as query,key,value,attended,residual,gate,up.
    offload: names of activations that are kept in the memory of the host.
    offload_optimizer: keep the state of the optimizer in the memory of the host between its updates.
    accumulate: number of parts that a step is computed in, one after the other; in a pipeline, each of them has a
      microbatch for each stage.
  """
  precision: Literal['float32', 'bfloat16', 'int8', 'fp8'] = 'float32'
  keep_activations: tuple[str, ...] = ('products',)
  offload: tuple[str, ...] = ()
  offload_optimizer: bool = False
  accumulate: int = 1

  @property
  def dtype(self) -> Any:
    return jnp.dtype('bfloat16' if self.rounding else self.precision)

  @property
  def rounding(self) -> Rounding | None:
    """How factors of products are rounded; None where they are not."""
    return {'int8': INT8, 'fp8': FP8}.get(self.precision)

  def policy(self, model: Any) -> SavePolicy | None:
    """Returns which activations of a model are kept; None for all.

    Raises:
      ValueError: the model does not have an activation, or cannot keep it on the host.
    """
    words = {'all': None, 'none': SavePolicy(), 'products': layers.keep_products}
    if len(self.keep_activations) == 1 and self.keep_activations[0] in words:
      policy = words[self.keep_activations[0]]
      if policy is None and self.offload:
        raise ValueError(f'--offload={",".join(self.offload)} needs --keep_activations with names, products or none, '
                         'and not all')
      if not self.offload:
        return policy
      SavePolicy(on_host=self.offload).check(model)
      return dataclasses.replace(policy, on_host=self.offload)
    alone = [name for name in self.keep_activations if name in words]
    if alone:
      raise ValueError(f'--keep_activations={",".join(self.keep_activations)} has {alone[0]}, which stands alone; '
                       'leave it out, or the names beside it')
    policy = SavePolicy(self.keep_activations, self.offload)
    policy.check(model)
    return policy

  def apply(self, model: Any) -> Any:
    """Returns a model that computes with this precision, and keeps these activations.

    Raises:
      ValueError: the class of the model has a fixed precision, or keeps other activations.
      ImportError: the precision needs a package that is not installed.
    """
    model = model.with_dtype(self.dtype)
    if isinstance(model, MultiToken):
      return dataclasses.replace(model, trunk=self.apply(model.trunk))
    if self.rounding:
      model = quantized(model, self.rounding)
    if any(field.name == 'remat' for field in dataclasses.fields(model)):
      return model.clone(remat=self.policy(model))
    if self.offload or self.keep_activations != ('products',):
      raise ValueError(f'what a model of class {type(model).__name__} keeps is fixed; leave out '
                       f'--keep_activations={",".join(self.keep_activations)} and --offload')
    return model

  def apply_to_steps(self, run: train.Run) -> train.Run:
    """Returns the run with steps that are computed in these parts, and this memory for the state of its optimizer."""
    return dataclasses.replace(run, accumulate=self.accumulate, offload_optimizer=self.offload_optimizer)
