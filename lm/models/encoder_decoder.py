"""The encoder-decoder, whose decoder also attends to the encoder's output for a source: `t5` below is one.

It shares the attention of decoders, whose kernel supports a learned bias of relative positions and its gradient. Shape
legend: `transformer.py`.
"""
import dataclasses
import math
import sys
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm import sharding
from lm.data.batch import Batch
from lm.declarations import Role
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack
from lm.models.attention import LayerCache, Visible
from lm.models.context import Aux, Context, EncodedSource, Taps
from lm.models.head import Head
from lm.models.source_cache import DecoderCache, EncoderDecoderCache
from lm.models.transformer import LanguageModel, Output, prompt_width


class CrossAttention(nn.Module):
  """Attention from the decoder to the encoder's output (Vaswani et al. 2017), without biases."""
  heads: int
  head_size: int
  scores: attend.AttentionScores = attend.AttentionScores(1., causal=False)
  std: float = 0.02
  out_std: float = 0.02
  query_std: float = 0.02

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: LayerCache | None = None):
    """Returns the output and a cache of the source's keys and values. If a cache is given, the source is not read."""
    (memory_BSD, visible), x_BTD = context.source, sharding.enter(x_BTD)
    q = attend.project(self, 'query', x_BTD, 'NH', self.heads, self.head_size, False, self.query_std)
    if cache is None:
      memory_BSD = sharding.enter(memory_BSD)
      k, v = (attend.project(self, name, memory_BSD, 'KH', self.heads, self.head_size, False, self.std)
              for name in ('key', 'value'))
      cache = LayerCache(k.swapaxes(1, 2), v.swapaxes(1, 2))
    if visible.start is not None:   # decoding
      k, v = cache
    q, k, v = context.name('cross_query', q), context.name('cross_key', k), context.name('cross_value', v)
    y = context.tap('cross_attended', attend.attend(q, k, v, visible, self.scores, key=context.key))
    return attend.output(self, y, x_BTD.shape[-1], False, self.out_std), cache

  @nn.nowrap
  def init_cache(self, batch_size: int, slots: int, dtype: Any) -> LayerCache:
    shape = batch_size, self.heads, slots, self.head_size
    return LayerCache(*(sharding.constrain(jnp.zeros(shape, dtype), 'BKSH') for _ in 'kv'))


class DecoderBlock(nn.Module):
  """A pre-norm block: x + attention(norm(x)), then the same with `cross_attention` and `feed_forward`."""
  attention: nn.Module
  cross_attention: nn.Module
  feed_forward: nn.Module
  attention_norm: nn.Module
  cross_attention_norm: nn.Module
  feed_forward_norm: nn.Module
  dropout: float = 0.

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: DecoderCache | None = None
               ) -> tuple[jax.Array, DecoderCache | None, Aux]:
    keys = context.keys(5)
    tokens, source = (None, None) if cache is None else cache
    y, tokens = self.attention(self.attention_norm(x_BTD), context.with_key(keys[3]), tokens)
    x_BTD = context.name('residual', x_BTD + parts.dropout(y, self.dropout, keys[0]))
    source = source if context.source.memory_BSD is None else None   # a new source replaces the cached one
    y, source = self.cross_attention(self.cross_attention_norm(x_BTD), context.with_key(keys[4]), source)
    x_BTD = context.name('cross_residual', x_BTD + parts.dropout(y, self.dropout, keys[1]))
    y, aux = self.feed_forward(self.feed_forward_norm(x_BTD), context)
    cache = None if cache is None else DecoderCache(tokens, source)
    return context.tap('output', x_BTD + parts.dropout(y, self.dropout, keys[2])), cache, aux

  @nn.nowrap
  def init_cache(self, batch_size: int, slots: int, dtype: Any, source_slots: int | None = None) -> DecoderCache:
    source = None if source_slots is None else self.cross_attention.init_cache(batch_size, source_slots, dtype)
    return DecoderCache(self.attention.init_cache(batch_size, slots, dtype), source)


@dataclasses.dataclass(frozen=True)
class RelativePositions:
  """Maps distances to buckets: each small distance has its own, larger ones share buckets of logarithmic width.

  All distances from `max_distance` on share the last bucket. Without causality, half of the buckets are for later keys.
  """
  buckets: int = 32
  max_distance: int = 128

  def __post_init__(self):
    if not 4 <= self.buckets < 2 * self.max_distance:
      raise ValueError(f'{self.buckets} buckets are too few or too many; give at least 4, and less than twice '
                       f'{self.max_distance}, the distance at which the last bucket starts')

  def __call__(self, queries_T: jax.Array, keys_S: jax.Array, causal: bool) -> jax.Array:
    """Returns buckets [T, S], given indices of queries and keys in a row; [B, T, S] for queries [B, T]."""
    count = self.buckets if causal else self.buckets // 2
    # NumPy computes a table, because logarithms of other backends round differently and would change buckets.
    near, far = count // 2, np.maximum(np.arange(self.max_distance + 1, dtype=np.float32), 1)
    far = near + (np.log(far / near) / np.float32(math.log(self.max_distance / near)) * (count - near)).astype(np.int32)
    table = np.where(np.arange(len(far)) < near, np.arange(len(far)), np.minimum(far, count - 1))
    later = jnp.expand_dims(keys_S, tuple(range(queries_T.ndim))) - queries_T[..., None]
    distance = jnp.maximum(-later, 0) if causal else jnp.abs(later)
    buckets = jnp.asarray(table, jnp.int32).at[jnp.minimum(distance, self.max_distance)].get(
        out_sharding=sharding.spec('B--'[3 - distance.ndim:]))
    return buckets if causal else buckets + count * (later > 0)


_OF_ENCODER = 'encoder/'   # prefix of names of taps in the encoder


class EncoderDecoder(LanguageModel):
  """T5 (Raffel et al. 2020): encodes `batch.source` and decodes `batch.tokens`, whose first token is a start token.

  A learned bias for the distance from query to key, [N, T, T], is added to the scores. All layers of the encoder share
  one bias, and all layers of the decoder another. If the embedding is `tied` to the head, logits are divided by
  sqrt(D).
  """
  vocab: int
  width: int
  encoder: stack.Stacks
  decoder: stack.Stacks
  encoder_norm: nn.Module
  decoder_norm: nn.Module
  relative: RelativePositions = RelativePositions()
  tied: bool = True
  dropout: float = 0.        # of the embedding and of the outputs of the last norms
  std: float = 1.            # of the embedding
  dtype: Any = jnp.float32   # of the computation; parameters are float32
  remat: Callable[..., bool] | None = dataclasses.field(default=parts.keep_products, compare=False)

  reads_source = True
  max_length = sys.maxsize   # relative positions have no limit

  @nn.compact
  def __call__(self, batch: Batch, key=None, cache: EncoderDecoderCache | None = None, taps: Taps = ()) -> Output:
    if batch.source is None and (cache is None or cache.source_segments_BS is None):
      raise ValueError('an encoder-decoder reads batch.source, which is missing; with a cache, the first batch has it')
    sharding.check('BT', batch.tokens.shape, 'batch')
    batch = parts.text_batch(batch)
    keys = (None,) * 6 if key is None else jax.random.split(key, 6)
    embedding = parts.weight(self, 'embedding', 'VD', (self.vocab, self.width), nn.initializers.normal(self.std),
                             self.dtype, Role.EMBEDDING, padded=True)

    def embed(tokens, key):
      return parts.dropout(parts.lookup(embedding, tokens), self.dropout, key)

    x = embed(batch.tokens, keys[0])
    if self.has_variable('params', 'blocks'):
      blocks = self.get_variable('params', 'blocks')
    else:
      blocks = self.param('blocks', lambda rng: self._init_blocks(rng, x))
    memory, aux, readings = None, Aux(), {}
    decoder_taps = tuple((name, tap) for name, tap in taps if not name.startswith(_OF_ENCODER))
    if batch.source is not None:
      places = jnp.arange(batch.source.shape[1])
      visible = Visible(batch.source_segments, batch.source_segments, bias_NTS=self._bias('encoder', places, places))
      encoder_taps = tuple((name.removeprefix(_OF_ENCODER), tap) for name, tap in taps if name.startswith(_OF_ENCODER))
      memory, aux, read = stack.run(self.encoder, blocks['encoder'], embed(batch.source, keys[1]),
                                    Context(None, visible, keys[2], taps=encoder_taps), remat=self.remat)
      readings = {_OF_ENCODER + name: reading for name, reading in read.items()}
      memory = parts.dropout(self.encoder_norm(memory), self.dropout, keys[3])
    if cache is None:
      places = jnp.arange(x.shape[1])
      visible = Visible(batch.segments, batch.segments, bias_NTS=self._bias('decoder', places, places))
      context = Context(None, visible, keys[4], EncodedSource(memory, _of_source(batch, batch.source_segments)),
                        taps=decoder_taps)
      x, decoder_aux, read = stack.run(self.decoder, blocks['decoder'], x, context, remat=self.remat)
    else:
      x, cache, decoder_aux, read = self._cached(blocks['decoder'], x, batch, memory, cache, decoder_taps)
    aux, readings = aux.plus(decoder_aux), {**readings, **read}
    x = parts.dropout(self.decoder_norm(x), self.dropout, keys[5])
    if self.tied:
      x = x * jnp.asarray(self.width ** -0.5, x.dtype)
      return Output(x, Head(embedding, vocab=self.vocab), cache, aux, readings)
    init = nn.initializers.normal(self.width ** -0.5)
    head = parts.weight(self, 'head', 'VD', (self.vocab, self.width), init, self.dtype, Role.HEAD, padded=True)
    return Output(x, Head(head, vocab=self.vocab), cache, aux, readings)

  def _init_blocks(self, rng, x):
    keys = jax.random.split(rng)
    return {'encoder': stack.init(self.encoder, keys[0], x, Context(None, Visible())),
            'decoder': stack.init(self.decoder, keys[1], x,
                                  Context(None, Visible(), source=EncodedSource(x, Visible())))}

  def _bias(self, name, queries_T, keys_S):
    """[N, T, S] for the encoder or the decoder; [B, N, T, S] where each row has queries of its own, [B, T]."""
    heads = stack.layers(getattr(self, name))[0].attention.heads
    init = nn.initializers.normal(self.width ** -0.5)
    table = parts.weight(self, name + '_bias', '-N', (self.relative.buckets, heads), init, role=Role.VECTOR)
    buckets = self.relative(queries_T, keys_S, causal=name == 'decoder')
    bias = table.at[buckets].get(out_sharding=sharding.spec('B--N'[3 - buckets.ndim:]))
    return jnp.moveaxis(bias, -1, -3)

  def _cached(self, params, x, batch, memory, cache, taps):
    segments = jnp.ones_like(batch.tokens) if batch.segments is None else batch.segments
    filled = attend.write(cache.segments_BS, segments, cache.index)
    places = cache.index[:, None] + jnp.arange(x.shape[1])[None]
    bias = self._bias('decoder', places, jnp.arange(filled.shape[1]))
    visible = Visible(segments, filled, start=cache.index, bias_NTS=bias)
    sources = cache.source_segments_BS
    if memory is not None:
      sources = jnp.ones_like(batch.source) if batch.source_segments is None else batch.source_segments
    seen_source = _of_source(batch, sources)._replace(start=jnp.int32(0))
    context = Context(None, visible, source=EncodedSource(memory, seen_source), taps=taps)
    x, layers, aux, readings = stack.run_cached(self.decoder, params, x, context, cache.layers)
    new = EncoderDecoderCache(layers, filled, sources, cache.index + batch.tokens.shape[1])
    if cache.source_segments_BS is not None:   # a new source leaves the room that the cache has for a wider one
      new = new.widened(max(cache.source_segments_BS.shape[1], sources.shape[1]))
    return x, new, aux, readings

  @nn.nowrap
  def unstack(self, params: Any) -> Any:
    """Returns parameters with one tree for each layer of the decoder; see `Transformer.unstack`."""
    blocks = params['blocks']
    return {**params, 'blocks': {**blocks, 'decoder': stack.unstacked(self.decoder, blocks['decoder'])}}

  @nn.nowrap
  def insert(self, cache: EncoderDecoderCache, new: EncoderDecoderCache, rows: jax.Array) -> EncoderDecoderCache:
    """See `LanguageModel.insert`. The sources of `new` may be narrower. Raises ValueError if they are wider."""
    new = new.widened(cache.source_segments_BS.shape[1])
    return super().insert(cache, new, rows)

  @nn.nowrap
  def prompt(self, texts: Sequence[np.ndarray], rows: int, bos: int, eos: int, adds_bos: bool = True
             ) -> Batch:
    """See `LanguageModel.prompt`. The source is a text followed by eos, and bos starts the decoder."""
    del adds_bos
    source, segments = np.zeros((2, rows, prompt_width(texts)), np.int32)
    for row, ids in enumerate(texts):
      source[row, :len(ids) + 1], segments[row, :len(ids) + 1] = [*ids, eos], 1
    return Batch(np.full((rows, 1), bos, np.int32), positions=np.zeros((rows, 1), np.int32), segments=segments[:, :1],
                 source=source, source_segments=segments)

  @nn.nowrap
  def init_cache(self, batch_size: int, slots: int, source_slots: int | None = None) -> EncoderDecoderCache:
    """Returns an empty cache with `slots` slots of tokens for each row. The first batch adds the source.

    With `source_slots`, the cache has room for sources of so many tokens from the beginning, and then keeps its shape.
    """
    sharding.require_whole_rows()
    layers = tuple(block.init_cache(batch_size, slots, self.dtype, source_slots)
                   for block in stack.layers(self.decoder))
    empty = sharding.constrain(jnp.zeros((batch_size, slots), jnp.int32), 'BS')
    sources = None
    if source_slots is not None:
      sources = sharding.constrain(jnp.zeros((batch_size, source_slots), jnp.int32), 'BS')
    return EncoderDecoderCache(layers, empty, sources, sharding.constrain(jnp.zeros(batch_size, jnp.int32), 'B'))


def _of_source(batch: Batch, segments_BS: jax.Array | None) -> Visible:
  """Returns which positions of the source a token sees: its own segment. Without segments, a row is one segment, 1."""
  if batch.segments is None and segments_BS is None:
    return Visible()
  ones = jnp.ones_like
  return Visible(ones(batch.tokens) if batch.segments is None else batch.segments,
                 ones(batch.source) if segments_BS is None else segments_BS)


def t5(vocab: int = 32128, width: int = 512, layers: int = 6, heads: int = 8, head_size: int = 64, hidden: int = 2048,
       gated: bool = False, tied: bool = True, dropout: float = 0., dtype=jnp.float32,
       remat=parts.keep_products) -> EncoderDecoder:
  """T5 (Raffel et al. 2020), by default 1.0 small: ReLU, embedding tied to the head. T5 1.1 is `gated` and not `tied`.

  The encoder and the decoder have `layers` layers each. Attention scores are not divided by the square root of the head
  size; instead, initial values are such that scores and activations have the same size at any width.
  """
  for name, size in (('width', width), ('layers', layers), ('heads', heads), ('head_size', head_size)):
    if size < 1:
      raise ValueError(f'{name}={size} is not positive')
  std, out_std, query_std = width ** -0.5, (heads * head_size) ** -0.5, (width * head_size) ** -0.5

  def attention(causal):
    return attend.Attention(heads, heads, head_size, scores=attend.AttentionScores(1., causal=causal), std=std,
                            out_std=out_std, query_std=query_std)

  cross = CrossAttention(heads, head_size, std=std, out_std=out_std, query_std=query_std)
  feed_forward = parts.FeedForward(hidden, parts.gelu_gated if gated else jax.nn.relu, gated, std=std,
                                   out_std=hidden ** -0.5)
  norm = parts.RMSNorm   # a new one for each use, because Flax shares the weights of one object
  encoder = parts.Block(attention(False), feed_forward, norm(), norm(), dropout=dropout)
  decoder = DecoderBlock(attention(True), cross, feed_forward, norm(), norm(), norm(), dropout)
  return EncoderDecoder(vocab, width, stack.stacks([encoder] * layers), stack.stacks([decoder] * layers), norm(),
                        norm(), tied=tied, dropout=dropout, dtype=dtype, remat=remat)
