"""Multi-token prediction: a trunk, which is a complete model, and another block for each depth.

At position i, depth k = 1, 2, ... predicts token i + k + 1; the trunk is depth 0. Shape legend: `transformer.py`.
"""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack
from lm.models.context import Aux, Context, Taps
from lm.models.transformer import Cache, Head, Transformer


class ParallelHead(nn.Module):
  """A block on the trunk's hidden states, independent of other depths (Gloeckle et al. 2024).

  In the paper, the last layer of the trunk is the head of the next token. Here, the trunk predicts it, and the heads of
  further tokens read the trunk's normalised output.
  """
  block: nn.Module

  @nn.compact
  def __call__(self, hidden_BTD, previous_BTD, ahead_BTD, context: Context, cache=None):
    return self.block(sharding.spread(hidden_BTD), context, cache)


class SequentialModule(nn.Module):
  """A block on M [norm(h); norm(e)] (DeepSeek-AI 2024, DeepSeek-V3, eq. 21).

  h is the hidden state of the previous depth, for depth 1 the trunk's normalised output; e is the embedding of token
  i + k.
  """
  block: nn.Module
  hidden_norm: nn.Module
  token_norm: nn.Module

  @nn.compact
  def __call__(self, hidden_BTD, previous_BTD, ahead_BTD, context: Context, cache=None):
    both = jnp.concatenate([self.hidden_norm(previous_BTD), self.token_norm(ahead_BTD)], axis=-1)
    shape = both.shape[-1], previous_BTD.shape[-1]   # C, the two widths together, is not sharded
    merge = parts.weight(self, 'merge', 'CD', shape, nn.initializers.normal(shape[0] ** -0.5), both.dtype)
    x_BTD = sharding.spread(parts.einsum('BTC,CD->BTD', both, merge))
    return self.block(x_BTD, context, cache)


class MultiTokenOutput(NamedTuple):
  """The trunk's output, and `ahead`, each depth's normalised hidden states for the same head; empty with a cache."""
  hidden: jax.Array
  head: Head
  cache: Cache | None
  aux: Aux
  readings: Mapping[str, Any]
  ahead: tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class MultiToken:
  """A trunk with a module for each of `depths` depths, which share the embedding, the last norm and the head.

  The parameters are those of the trunk, which `trunk` can read as they are, and an entry `depths`, stacked like those
  of blocks. Attention in depths is causal even among tokens that are marked bidirectional, since depths read tokens
  ahead of their position.
  """
  trunk: Transformer
  depths: int
  module: nn.Module   # ParallelHead or SequentialModule

  causal = True
  reads_source = False

  def __post_init__(self):
    if self.depths < 0:
      raise ValueError(f'depths={self.depths} is negative; 0 predicts only the next token')

  @property
  def vocab(self) -> int:
    return self.trunk.vocab

  @property
  def max_length(self) -> int:
    return self.trunk.max_length

  @property
  def original_context(self) -> int | None:
    return self.trunk.original_context

  def with_dtype(self, dtype: Any) -> 'MultiToken':
    """See `LanguageModel.with_dtype`."""
    return dataclasses.replace(self, trunk=self.trunk.with_dtype(dtype))

  @property
  def _stacks(self) -> stack.Stacks:
    return (stack.Stack((self.module,), self.depths),)

  def init(self, key: jax.Array) -> Any:
    """See `LanguageModel.init`. The trunk's parameters are the same as without depths."""
    params = self.trunk.init(key)
    if not self.depths:
      return params
    shape = sharding.parts('B'), sharding.parts('T')
    x = sharding.constrain(jnp.zeros((*shape, self.trunk.width), self.trunk.dtype), 'BTD')
    positions = sharding.constrain(jnp.zeros(shape, jnp.int32), 'BT')
    visible = attend.Visible(positions_BT=positions, key_positions_BS=positions)
    context = Context(positions, visible)
    return params | {'depths': stack.init(self._stacks, jax.random.fold_in(key, 1), x, x, x, context)}

  def apply(self, params: Any, batch: Batch, *, key: jax.Array | None = None, cache: Cache | None = None,
            taps: Taps = ()) -> MultiTokenOutput:
    """See `LanguageModel.apply`. With a `cache`, only the trunk is applied. Its dropout is the same as without depths.

    Taps apply to the trunk.
    """
    out = self.trunk.apply(params, batch, key=key, cache=cache, taps=taps)
    ahead: list[jax.Array] = []
    if cache is not None or not self.depths:
      return MultiTokenOutput(*out, ())
    batch = parts.text_batch(batch)
    positions = batch.positions
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1])[None], batch.tokens.shape)
      positions = sharding.constrain(positions, 'BT')
    visible = attend.Visible(batch.segments, batch.segments, None, positions, positions)

    def module(k, params, hidden, previous, tokens):
      dropout = None if key is None else jax.random.fold_in(key, k)
      x, normalised, _, aux = self.depth(params, k, hidden, previous, tokens, Context(positions, visible, dropout))
      return x, normalised, aux

    if self.trunk.remat is not None:
      module = jax.checkpoint(module, policy=self.trunk.remat, static_argnums=0)
    previous, aux = out.hidden, out.aux
    for k in range(1, self.depths + 1):
      previous, hidden, depth_aux = module(k, params, out.hidden, previous, _ahead(batch, k))
      ahead.append(hidden)
      aux = aux.plus(depth_aux)
    return MultiTokenOutput(*out._replace(aux=aux), tuple(ahead))

  def depth(self, params: Any, k: int, hidden_BTD: jax.Array, previous_BTD: jax.Array, tokens_BT: jax.Array,
            context: Context, cache: Any = None) -> tuple[jax.Array, jax.Array, Any, Aux]:
    """Applies depth k to the trunk's hidden states, those of depth k - 1, and the tokens k positions ahead (-1: none).

    Returns its hidden states, these normalised (the input of the head), its cache, and its auxiliary output.
    """
    table = parts.in_use(params['embedding'], 'VD', self.trunk.dtype)
    ahead = parts.lookup(table, jnp.maximum(tokens_BT, 0))
    if self.trunk.embedding_scale is not None:
      ahead = ahead * jnp.asarray(self.trunk.embedding_scale, ahead.dtype)
    ahead = jnp.where(tokens_BT[..., None] < 0, 0, ahead)
    tree = stack.unstacked(self._stacks, params['depths'])[k - 1]
    x, cache, aux = self.module.apply({'params': tree}, hidden_BTD, previous_BTD, ahead, context, cache)
    x = sharding.constrain(x, 'BTD')
    return x, self.trunk.norm.apply({'params': params['norm']}, x), cache, aux

  def prompt(self, texts: Sequence[np.ndarray], rows: int, bos: int, eos: int, adds_bos: bool = True
             ) -> Batch:
    return self.trunk.prompt(texts, rows, bos, eos, adds_bos)

  def unstack(self, params: Any) -> Any:
    """See `Transformer.unstack`; the parameters of depths are unstacked too."""
    params = self.trunk.unstack(params)
    return {**params, 'depths': stack.unstacked(self._stacks, params['depths'])} if self.depths else params

  def init_cache(self, batch_size: int, slots: int) -> Cache:
    """Returns an empty cache of the trunk."""
    return self.trunk.init_cache(batch_size, slots)

  def insert(self, cache: Cache, new: Cache, rows: jax.Array) -> Cache:
    """See `LanguageModel.insert`."""
    return self.trunk.insert(cache, new, rows)

  def init_depth_caches(self, batch_size: int, slots: int) -> tuple[Any, ...]:
    """Returns an empty cache for each depth."""
    return tuple(self.module.block.init_cache(batch_size, slots, self.trunk.dtype)
                 for _ in range(self.depths))


def _ahead(batch: Batch, k: int) -> jax.Array:
  """Returns the token k positions ahead in the same segment; -1 if there is none."""
  time = batch.tokens.shape[1]

  def shift(x, fill):   # of whole rows, because positions cross the borders of parts
    x = jnp.pad(sharding.constrain(x, 'B-')[:, k:], ((0, 0), (0, min(k, time))), constant_values=fill)
    return sharding.constrain(x, 'BT')

  tokens = shift(batch.tokens, -1)
  return tokens if batch.segments is None else jnp.where(batch.segments == shift(batch.segments, -1), tokens, -1)


def parallel(trunk: Transformer, depths: int) -> MultiToken:
  """Returns a model with independent heads (Gloeckle et al. 2024), whose blocks are like the trunk's last."""
  return MultiToken(trunk, depths, ParallelHead(trunk.layers[-1]))


def sequential(trunk: Transformer, depths: int) -> MultiToken:
  """Returns a model with a chain of modules (DeepSeek-AI 2024), whose blocks are like the trunk's last.

  Each module also reads the token before the one that it predicts.
  """
  norms = trunk.norm.clone(), trunk.norm.clone()   # two objects, because Flax shares the parameters of one object
  return MultiToken(trunk, depths, SequentialModule(trunk.layers[-1], *norms))
