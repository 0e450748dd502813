"""A reward model: a decoder that also scores the text up to each token (Ouyang et al. 2022, arXiv:2203.02155)."""
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import seeds, sharding
from lm.data.batch import Batch
from lm.declarations import Role
from lm.models import layers as parts
from lm.models.context import Aux, Taps
from lm.models.transformer import Cache, LanguageModel, Transformer


class Scored(NamedTuple):
  hidden: jax.Array        # [B, T, D]
  head: Callable[[jax.Array], jax.Array]
  cache: Cache | None
  aux: Aux
  readings: Mapping[str, Any]
  scores: jax.Array        # [B, T], float32


class Reward(LanguageModel):
  """A decoder with a vector `score` [D]: the score of a position is the dot product of its hidden state with it."""
  decoder: Transformer

  @property
  def max_length(self) -> int:
    return self.decoder.max_length

  @nn.compact
  def __call__(self, batch: Batch, key=None, cache: Cache | None = None, taps: Taps = ()) -> Scored:
    out = self.decoder(batch, key, cache, taps)
    width = self.decoder.width
    score = parts.weight(self, 'score', '-', (width,), nn.initializers.normal((width + 1) ** -0.5),
                         role=Role.HEAD)
    return Scored(*out, jnp.einsum('BTD,D->BT', out.hidden.astype(jnp.float32), score,
                                   out_sharding=sharding.spec('BT')))

  @nn.nowrap
  def start(self, load: Callable[[Any], Any], seed: int = 0) -> Any:
    """Returns parameters in which those of the decoder are `load(decoder)`, and those of the score are new."""
    new = jax.jit(lambda: {'score': self.init(seeds.key(seed))['score']})()
    return {**new, 'decoder': load(self.decoder)}
