"""Weights with a change of low rank, as adapters have them (see `lora`)."""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from lm import sharding


@functools.partial(jax.tree_util.register_dataclass, data_fields=['weight', 'a', 'b'], meta_fields=['scale'])
@dataclasses.dataclass(frozen=True)
class LowRank:
  """A weight with a change of low rank, weight + scale * a b. It replaces the weight in a model's parameters.

  The weight is [*leading, *inputs, *outputs], a is [*leading, *inputs, r], and b is [*leading, r, *outputs]; the
  leading axes are those of layers and experts. The sum is computed where the weight is used: of stacked layers, only
  the sum and the gradient of one layer exist at a time.
  """
  weight: jax.Array   # the first field, because Flax compares its shape with the declared one
  a: jax.Array
  b: jax.Array
  scale: float

  def merged(self) -> jax.Array:
    """Returns the sum in float32, sharded like the weight."""
    letters, leading = 'abcdefghijkl', self.a.ndim + self.b.ndim - self.weight.ndim - 2
    axes, inputs = letters[:self.weight.ndim], self.a.ndim - 1
    formula = f'{axes[:inputs]}r,{axes[:leading]}r{axes[inputs:]}->{axes}'
    layout = None if sharding.spec('') is None else jax.typeof(self.weight).sharding
    change = jnp.einsum(formula, self.a, self.b, out_sharding=layout, preferred_element_type=jnp.float32)
    return self.weight.astype(jnp.float32) + self.scale * change
