"""The head of a language model: hidden states to logits. Shape legend: `transformer.py`."""
import dataclasses
import functools

import jax
import jax.numpy as jnp

from lm import sharding
from lm.models import layers
from lm.models.rounded_weights import RoundedWeight


@functools.partial(jax.tree_util.register_dataclass, data_fields=['weight_VD'], meta_fields=['softcap', 'vocab'])
@dataclasses.dataclass(frozen=True)
class Head:
  """Maps hidden states to float32 logits. A model returns it unapplied, so that losses need not store all of [B, T, V].

  With a `softcap`, logits are softcap * tanh(logits / softcap) (Gemma 2). On a mesh that does not divide the `vocab`,
  the weight has more rows, and their logits are hidden; None says that the weight has no such rows.
  """
  weight_VD: jax.Array | RoundedWeight
  softcap: float | None = None
  vocab: int | None = None

  def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
    if isinstance(self.weight_VD, RoundedWeight):
      logits = self.weight_VD.logits(hidden_BTD)
    elif sharding.platform() == 'cpu' and hidden_BTD.shape[1] == 1:   # in decoding, this order is twice as fast
      logits = jnp.einsum('VD,BTD->VBT', self.weight_VD, hidden_BTD, out_sharding=sharding.spec('VBT'),
                          preferred_element_type=jnp.float32).transpose(1, 2, 0)
    else:
      logits = layers.einsum('BTD,VD->BTV', hidden_BTD, self.weight_VD, jnp.float32)
    if self.softcap is not None:
      logits = self.softcap * jnp.tanh(logits / self.softcap)
    return logits if self.vocab is None else sharding.hide_padding(logits, self.vocab)
