"""The decoder, a composition of modules: `gpt2` and `llama` below are two of many.

Shapes: B batch, T query time, S key time, D model width, N query heads, K key/value heads, H head size,
F feed-forward, V vocabulary, L layers, P learned positions. A name ends in its shape where that helps. The einsums and
the sharding table use the same letters.
"""
import collections.abc
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm import declarations, sharding
from lm.data.batch import Batch
from lm.declarations import Role
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack
from lm.models.context import Aux, Context, Taps
from lm.models.head import Head
from lm.models.rotary import LongRope, Rotary


class Cache(NamedTuple):
  """Keys and values of the tokens so far. A token of row b sees slot s if `segments_BS[b, s]` is its own segment."""
  layers: tuple[Any, ...]  # of each block, as from its `init_cache`
  segments_BS: jax.Array   # 0: empty or padding
  positions_BS: jax.Array
  index: jax.Array         # [B], how many slots of each row are filled; later slots are not visible
  pages_BM: jax.Array | None = None   # the pages that have the slots of each row; see `paged`
  window_pages_BM: jax.Array | None = None   # those in layers with a window


class Output(NamedTuple):
  hidden: jax.Array        # [B, T, D]
  head: Callable[[jax.Array], jax.Array]
  cache: Cache | None
  aux: Aux = Aux()         # the sum over the blocks
  readings: Mapping[str, Any] = {}   # of taps, by name, stacked over layers


def prompt_width(texts: Sequence[np.ndarray]) -> int:
  """Returns a width of rows for any of the texts and one more token: a power of two, to keep compilations few."""
  return max(16, 1 << max(map(len, texts)).bit_length())


# A run asks several times for the shapes of its parameters. A model is traced for them once for each mesh, and the
# operations of that trace become part of the program that asks, as if they had been traced anew.
@functools.partial(jax.jit, static_argnums=(0, 1), inline=True)
def _init(model: 'LanguageModel', declares: bool, key: jax.Array) -> Any:
  """Returns new parameters, with their declarations if these are being collected, as `declares` says."""
  del declares   # two traces of a model differ in it
  tokens = jnp.zeros((sharding.parts('B'), sharding.parts('T')), jnp.int32)
  return nn.Module.init(model, key, Batch(tokens, source=tokens))['params']


class LanguageModel(nn.Module):
  """Base class of models: Flax modules whose parameters are an explicit tree."""
  causal = True             # an output depends only on its own and earlier tokens, except on bidirectional ones
  reads_source = False      # a prompt is the source of an encoder, apart from the text that the model writes
  depths = 0                # further tokens that are predicted at each position, see `prediction_heads`
  original_context = None   # see `Transformer.original_context`

  @nn.nowrap
  def with_dtype(self, dtype: Any) -> 'LanguageModel':
    """Returns the model with its computation in another dtype. Raises ValueError if its dtype is fixed to float32."""
    if any(field.name == 'dtype' for field in dataclasses.fields(self)):
      return self.clone(dtype=dtype)
    if jnp.dtype(dtype) != jnp.float32:
      raise ValueError(f'a model of class {type(self).__name__} cannot be made to compute in {jnp.dtype(dtype).name}; '
                       'leave out --precision')
    return self

  @nn.nowrap
  def init(self, key: jax.Array) -> Any:
    """Returns new float32 parameters, sharded over the current mesh. Call it inside `jax.jit`."""
    for field in dataclasses.fields(self):
      if field.compare and not isinstance(getattr(self, field.name), collections.abc.Hashable):
        raise ValueError(f'the field {field.name} of the model {type(self).__name__} is a '
                         f'{type(getattr(self, field.name)).__name__}, which cannot be hashed; give a tuple')
    return _init(self, declarations.collects(), key)

  @nn.nowrap
  def apply(self, params: Any, batch: Batch, *, key: jax.Array | None = None, cache: Cache | None = None,
            taps: Taps = ()) -> Output:
    """Applies the model to `batch`, whose rows have positions and segments if they are packed or padded.

    A `key` turns dropout on. With a `cache`, the batch continues the tokens of the cache. `taps` read or replace
    activations of the blocks by name: query, key, value, attended, residual (after attention), gate, up, router and
    output (of the block), as far as the blocks have them; see `context.Tap`.
    """
    return super().apply({'params': params}, batch, key=key, cache=cache, taps=taps)

  @nn.nowrap
  def prompt(self, texts: Sequence[np.ndarray], rows: int, bos: int, eos: int, adds_bos: bool = True
             ) -> Batch:
    """Returns the batch that the model reads before it generates, in NumPy. Its last column has the last tokens.

    Here, a row is bos, if `adds_bos` is true or the text is empty, and the text, padded on the left. Rows beyond the
    number of texts are empty.
    """
    del eos
    texts = [np.int32([bos, *ids]) if adds_bos or not len(ids) else ids for ids in texts]
    longest = max(map(len, texts))
    width = max(min(prompt_width([ids[1:] for ids in texts]), self.max_length), longest)
    tokens, positions, segments = np.zeros((3, rows, width), np.int32)
    for row, ids in enumerate(texts):
      span = row, slice(width - len(ids), None)
      tokens[span], positions[span], segments[span] = ids, np.arange(len(ids)), 1
    return Batch(tokens, positions=positions, segments=segments)

  @nn.nowrap
  def insert(self, cache: Any, new: Any, rows: jax.Array) -> Any:
    """Returns `cache` with row `rows[i]` replaced by row i of the cache `new`. Indices out of range are skipped.

    The first axis of each leaf is that of rows; the other axes have the same sizes in both caches.
    """
    return sharding.insert_rows(cache, new, rows)


class Transformer(LanguageModel):
  """A decoder: embeds the tokens, applies the layers, normalises.

  The parameters `blocks` have a tree for each block of each stack, named '0', '1', ..., stacked over its repeats.
  `remat` is a policy of `jax.checkpoint_policies`, which selects what is stored of a layer for the backward pass; None
  stores everything.
  """
  vocab: int
  width: int
  blocks: stack.Stacks
  norm: nn.Module
  max_length: int
  positions: bool = False    # learned positions, added to the embedding
  tied: bool = True
  embedding_scale: float | None = None
  softcap: float | None = None   # of the logits
  dropout: float = 0.        # of the embedding
  layer_dropout: stack.LayerDropout | None = None
  std: float = 0.02
  dtype: Any = jnp.float32   # of the computation; parameters are float32
  remat: Callable[..., bool] | None = dataclasses.field(default=parts.keep_products, compare=False)

  @property
  def layers(self) -> tuple[nn.Module, ...]:
    """Returns the block of each layer."""
    return stack.layers(self.blocks)

  @property
  def original_context(self) -> int | None:
    """The length in tokens beyond which a text has other rotary frequencies (LongRoPE); None if there is none."""
    rotaries = [getattr(getattr(block, 'attention', None), 'rotary', None) for block in self.layers]
    scalings = [rotary.scaling for rotary in rotaries if rotary is not None]
    return min((scaling.original for scaling in scalings if isinstance(scaling, LongRope)), default=None)

  @nn.compact
  def __call__(self, batch: Batch, key=None, cache: Cache | None = None, taps: Taps = ()) -> Output:
    if batch.tokens.shape[1] > self.max_length:
      raise ValueError(f'{batch.tokens.shape[1]} tokens are more than the {self.max_length} that the model reads at '
                       'once; raise its length or shorten the input')
    sharding.check('BT', batch.tokens.shape, 'batch')
    batch = parts.text_batch(batch)
    keys = (None, None) if key is None else jax.random.split(key)
    init = nn.initializers.normal(self.std)
    embedding = parts.weight(self, 'embedding', 'VD', (self.vocab, self.width), init, self.dtype, Role.EMBEDDING,
                             padded=True)
    x = parts.lookup(embedding, batch.tokens).astype(self.dtype)
    if self.embedding_scale is not None:
      x = x * jnp.asarray(self.embedding_scale, x.dtype)
    start = jnp.int32(0) if cache is None else cache.index
    positions = batch.positions
    if positions is None:
      positions = jnp.reshape(start, (-1, 1)) + jnp.arange(x.shape[1])[None]
      positions = sharding.constrain(jnp.broadcast_to(positions, x.shape[:2]), 'BT')
    if self.positions:
      table = parts.weight(self, 'positions', 'PD', (self.max_length, self.width), init, self.dtype,
                           Role.EMBEDDING)
      x = x + table.at[positions].get(out_sharding=sharding.spec('BTD'))
    x = parts.dropout(x, self.dropout, keys[0])
    x, cache, aux, readings = self._blocks(x, positions, batch, cache, keys[1], taps)
    x = self.norm(x)
    if not self.tied:
      embedding = parts.weight(self, 'head', 'VD', (self.vocab, self.width), init, self.dtype, Role.HEAD, padded=True)
    return Output(x, Head(embedding, self.softcap, self.vocab), cache, aux, readings)

  def _blocks(self, x, positions, batch, cache, key, taps):
    visible = attend.Visible(batch.segments, batch.segments, batch.bidirectional, positions, positions)
    context = Context(positions, visible, key, taps=taps)
    if self.has_variable('params', 'blocks'):
      params = self.get_variable('params', 'blocks')
    else:
      params = self.param('blocks', lambda rng: stack.init(self.blocks, rng, x, Context(positions, visible)))
      return x, None, Aux(), {}   # parameters do not depend on what the blocks compute
    if cache is not None:
      return self._cached(params, x, positions, batch, cache, taps)
    x, aux, readings = stack.run(self.blocks, params, x, context, self.remat, self.layer_dropout)
    return x, None, aux, readings

  def _cached(self, params, x, positions, batch, cache, taps):
    segments = jnp.ones_like(batch.tokens) if batch.segments is None else batch.segments
    filled = attend.write(cache.segments_BS, segments, cache.index)
    key_positions = attend.write(cache.positions_BS, positions, cache.index)
    bidirectional = None
    if batch.bidirectional is not None:   # of the new tokens; earlier ones are visible anyway
      bidirectional = attend.write(jnp.zeros_like(filled, bool), batch.bidirectional, cache.index)
    visible = attend.Visible(segments, filled, bidirectional, positions, key_positions, cache.index,
                             pages_BM=cache.pages_BM, window_pages_BM=cache.window_pages_BM)
    context = Context(positions, visible, taps=taps)
    x, layers, aux, readings = stack.run_cached(self.blocks, params, x, context, cache.layers)
    cache = cache._replace(layers=layers, segments_BS=filled, positions_BS=key_positions,
                           index=cache.index + batch.tokens.shape[1])
    return x, cache, aux, readings

  @nn.nowrap
  def unstack(self, params: Any) -> Any:
    """Returns parameters with one tree for each layer, so that steps with a cache do not copy weights.

    Call it once before many steps. Parameters that are unstacked already are returned as they are.
    """
    return {**params, 'blocks': stack.unstacked(self.blocks, params['blocks'])}

  @nn.nowrap
  def init_cache(self, batch_size: int, slots: int) -> Cache:
    """Returns an empty cache with `slots` slots for each row."""
    sharding.require_whole_rows()
    layers = tuple(block.init_cache(batch_size, slots, self.dtype) for block in self.layers)
    empty = sharding.constrain(jnp.zeros((batch_size, slots), jnp.int32), 'BS')
    return Cache(layers, empty, empty, sharding.constrain(jnp.zeros(batch_size, jnp.int32), 'B'))


def _head_size(width: int, heads: int, rates: dict[str, float | None], head_size: int | None = None, **sizes: int
               ) -> int:
  for name, size in {'width': width, 'heads': heads, **sizes}.items():
    if size < 1:
      raise ValueError(f'{name}={size} is not positive; give 1 or more')
  for name, rate in rates.items():
    if rate is not None and not 0 <= rate < 1:
      raise ValueError(f'{name}={rate} is not in [0, 1)')
  if head_size is not None:
    return head_size
  if width % heads:
    raise ValueError(f'heads={heads} does not divide width={width}; choose a width that is a multiple of it')
  return width // heads


def gpt2(vocab: int = 50257, width: int = 768, layers: int = 12, heads: int = 12, max_length: int = 1024,
         dropout: float = 0., embedding_dropout: float | None = None, attention_dropout: float = 0.,
         layer_dropout: stack.LayerDropout | None = None, dtype=jnp.float32,
         remat=parts.keep_products) -> Transformer:
  """GPT-2 (Radford et al. 2019): learned positions, LayerNorm, tanh GELU, biases, tied embedding.

  `dropout` applies to the output of each residual branch, and to the embedding unless `embedding_dropout` is given;
  `attention_dropout` applies to the probabilities of attention.
  """
  out_std = 0.02 / (2 * layers) ** 0.5
  rates = {'dropout': dropout, 'embedding_dropout': embedding_dropout, 'attention_dropout': attention_dropout}
  size = _head_size(width, heads, rates, vocab=vocab, layers=layers, max_length=max_length)
  attention = attend.Attention(heads, heads, size, bias=True, scores=attend.AttentionScores(dropout=attention_dropout),
                               out_std=out_std)
  feed_forward = parts.FeedForward(4 * width, jax.nn.gelu, gated=False, bias=True, out_std=out_std)
  block = parts.Block(attention, feed_forward, parts.LayerNorm(), parts.LayerNorm(), dropout=dropout)
  return Transformer(vocab, width, stack.stacks([block] * layers), parts.LayerNorm(), max_length, positions=True,
                     dropout=dropout if embedding_dropout is None else embedding_dropout,
                     layer_dropout=layer_dropout, dtype=dtype, remat=remat)


def llama(vocab: int, width: int, layers: int, heads: int, kv_heads: int | None = None, hidden: int | None = None,
          max_length: int = 2048, theta: float = 10_000., tied: bool = True, head_size: int | None = None,
          qk_norm: bool = False, dropout: float = 0., embedding_dropout: float | None = None,
          attention_dropout: float = 0., layer_dropout: stack.LayerDropout | None = None, dtype=jnp.float32,
          remat=parts.keep_products) -> Transformer:
  """Llama (Touvron et al. 2023): rotary positions, RMSNorm, gated SiLU of hidden size 8/3 of the width, no biases.

  With `qk_norm`, the queries and the keys of each head are normalised before the rotation (Qwen 3). Matrices are
  initialised with std 1 / sqrt(width), so that activations have the same size at any width. Dropout is that of `gpt2`.
  """
  rates = {'dropout': dropout, 'embedding_dropout': embedding_dropout, 'attention_dropout': attention_dropout}
  size = _head_size(width, heads, rates, head_size, vocab=vocab, layers=layers, max_length=max_length)
  kv_heads = heads if kv_heads is None else kv_heads
  if kv_heads < 1 or heads % kv_heads:
    raise ValueError(f'kv_heads={kv_heads} does not divide heads={heads}')
  if size < 1 or size % 2:
    source = f'width={width} over heads={heads}' if head_size is None else f'head_size={head_size}'
    raise ValueError(f'{source} gives heads of size {size}; rotary positions need an even size of 2 or more')
  std = width ** -0.5
  out_std = std / (2 * layers) ** 0.5
  query_norm, key_norm = (parts.RMSNorm(), parts.RMSNorm()) if qk_norm else (None, None)
  attention = attend.Attention(heads, kv_heads, size, Rotary(theta), query_norm=query_norm, key_norm=key_norm,
                               scores=attend.AttentionScores(dropout=attention_dropout), std=std, out_std=out_std)
  feed_forward = parts.FeedForward(hidden or -(-width * 8 // 3 // 64) * 64, std=std, out_std=out_std)
  block = parts.Block(attention, feed_forward, parts.RMSNorm(), parts.RMSNorm(), dropout=dropout)
  return Transformer(vocab, width, stack.stacks([block] * layers), parts.RMSNorm(), max_length, tied=tied,
                     dropout=dropout if embedding_dropout is None else embedding_dropout,
                     layer_dropout=layer_dropout, dtype=dtype, remat=remat)
