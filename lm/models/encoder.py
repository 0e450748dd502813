"""Encoders, in which each position sees its whole segment: `bert` below is one. Shape legend: `transformer.py`."""
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm import seeds, sharding
from lm.data.batch import Batch
from lm.declarations import Role
from lm.models import attention as attend
from lm.models import layers as parts
from lm.models import stack
from lm.models.context import Aux, Context, Taps
from lm.models.head import Head
from lm.models.transformer import LanguageModel, Output


def gelu(x: jax.Array) -> jax.Array:
  """The exact GELU, x times the standard normal distribution function of x (Hendrycks and Gimpel 2016)."""
  return jax.nn.gelu(x, approximate=False)


class PostNormBlock(nn.Module):
  """x = norm(x + attention(x)), then the same with `feed_forward` (Vaswani et al. 2017)."""
  attention: nn.Module
  feed_forward: nn.Module
  attention_norm: nn.Module
  feed_forward_norm: nn.Module
  dropout: float = 0.

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any, Aux]:
    keys = context.keys(3)
    y, cache = self.attention(x_BTD, context.with_key(keys[2]), cache)
    x_BTD = context.name('residual', self.attention_norm(x_BTD + parts.dropout(y, self.dropout, keys[0])))
    y, aux = self.feed_forward(x_BTD, context)
    y = self.feed_forward_norm(x_BTD + parts.dropout(y, self.dropout, keys[1]))
    return context.tap('output', y), cache, aux


@functools.partial(jax.tree_util.register_dataclass, data_fields=['transform_DX', 'bias_X', 'norm', 'words', 'bias_V'],
                   meta_fields=['eps'])
@dataclasses.dataclass(frozen=True)
class MaskedHead:
  """BERT's head, words(norm(gelu(x transform + bias))) + bias: maps hidden states to float32 logits, like `Head`."""
  transform_DX: jax.Array
  bias_X: jax.Array
  norm: dict[str, jax.Array]
  words: Head
  bias_V: jax.Array
  eps: float

  @property
  def vocab(self) -> int | None:
    return self.words.vocab

  def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
    y = parts.einsum('BTD,DX->BTX', hidden_BTD, self.transform_DX, jnp.float32)
    y = gelu(y + parts.row(self.bias_X, y))
    y = parts.LayerNorm(self.eps).apply({'params': self.norm}, y).astype(hidden_BTD.dtype)
    logits = self.words(y)
    return logits + parts.row(self.bias_V, logits)


@functools.partial(jax.tree_util.register_dataclass, data_fields=['pooler_DX', 'bias_X', 'score_X', 'score_bias'],
                   meta_fields=[])
@dataclasses.dataclass(frozen=True)
class ScoreHead:
  """tanh(x pooler + bias) score + bias: maps hidden states to a float32 score of each position, [B, T].

  The score of a text is that of its first token.
  """
  pooler_DX: jax.Array
  bias_X: jax.Array
  score_X: jax.Array
  score_bias: jax.Array   # [1]

  def __call__(self, hidden_BTD: jax.Array) -> jax.Array:
    y = parts.einsum('BTD,DX->BTX', hidden_BTD, self.pooler_DX, jnp.float32)
    y = jnp.tanh(y + parts.row(self.bias_X, y))
    scores = jnp.einsum('BTX,X->BT', y, self.score_X, out_sharding=sharding.spec('BT'))
    return scores + parts.row(self.score_bias, scores)


class Bidirectional(LanguageModel):
  """The base class of encoders: embeds words, positions and types, normalises, applies the layers.

  The attention of its blocks must not be causal. Its output has the hidden states of the last layer, and the head that
  `_head` declares. With an `embedding_size`, embeddings and their norm have that size, and a matrix maps them to the
  width.
  """
  vocab: int
  width: int
  blocks: stack.Stacks
  norm: parts.LayerNorm      # of the embedding; the head's norm has the same eps
  max_length: int
  types: int = 2
  dropout: float = 0.        # of the embedding
  std: float = 0.02
  dtype: Any = jnp.float32   # of the computation; parameters are float32
  remat: Callable[..., bool] | None = dataclasses.field(default=parts.keep_products, compare=False)

  causal = False
  embedding_size = None   # None: the width

  @property
  def layers(self) -> tuple[nn.Module, ...]:
    """Returns the block of each layer."""
    return stack.layers(self.blocks)

  @nn.compact
  def __call__(self, batch: Batch, key=None, cache: None = None, taps: Taps = ()) -> Output:
    if cache is not None:
      raise ValueError('an encoder has no cache, because later tokens change the outputs of earlier ones; leave it out')
    if batch.tokens.shape[1] > self.max_length:
      raise ValueError(f'{batch.tokens.shape[1]} tokens are more than the {self.max_length} that the model reads at '
                       'once; shorten the input')
    sharding.check('BT', batch.tokens.shape, 'batch')
    batch = parts.text_batch(batch)
    keys = (None, None) if key is None else jax.random.split(key)
    init = nn.initializers.normal(self.std)

    size = self.embedding_size or self.width

    def rows(name, count, indices_BT):
      table = parts.weight(self, name, '-D', (count, size), init, self.dtype, Role.EMBEDDING)
      return table.at[indices_BT].get(out_sharding=sharding.spec('BTD'))

    positions = batch.positions
    if positions is None:
      positions = jnp.broadcast_to(jnp.arange(batch.tokens.shape[1])[None], batch.tokens.shape)
      positions = sharding.constrain(positions, 'BT')
    embedding = parts.weight(self, 'embedding', 'VD', (self.vocab, size), init, self.dtype, Role.EMBEDDING, padded=True)
    x = parts.lookup(embedding, batch.tokens) + rows('positions', self.max_length, positions)
    x = x + rows('types', self.types, jnp.zeros_like(batch.tokens) if batch.types is None else batch.types)
    x = parts.dropout(self.norm(x), self.dropout, keys[0])
    if self.embedding_size is not None:
      projection = parts.weight(self, 'projection', 'D-', (size, self.width), init, self.dtype)
      x = parts.add_bias(self, 'projection_bias', '-', parts.einsum('BTD,DX->BTX', x, projection))
    visible = attend.Visible(batch.segments, batch.segments, None, positions, positions)
    context = Context(positions, visible, taps=taps)
    if self.has_variable('params', 'blocks'):
      params = self.get_variable('params', 'blocks')
    else:
      params = self.param('blocks', lambda rng: stack.init(self.blocks, rng, x, context))
    x, aux, readings = stack.run(self.blocks, params, x, context.with_key(keys[1]), remat=self.remat)
    return Output(x, self._head(embedding), None, aux, readings)

  def _head(self, embedding_VD: jax.Array) -> Any:
    """Declares the weights of the head and returns it, a function of hidden states and a pytree of its weights."""
    raise NotImplementedError

  @nn.nowrap
  def prompt(self, texts: Sequence[np.ndarray], rows: int, bos: int, eos: int, adds_bos: bool = True
             ) -> Batch:
    raise ValueError('an encoder such as BERT predicts masked tokens and writes no text; use a decoder, such as '
                     'GPT-2, or an encoder-decoder, such as T5')


class Encoder(Bidirectional):
  """BERT (Devlin et al. 2019), with the head for masked language modelling."""

  def _head(self, embedding_VD: jax.Array) -> MaskedHead:
    init, zeros, ones = nn.initializers.normal(self.std), nn.initializers.zeros, nn.initializers.ones
    norm = {'scale': parts.weight(self, 'transform_norm_scale', '-', (self.width,), ones),
            'bias': parts.weight(self, 'transform_norm_bias', '-', (self.width,), zeros)}
    transform = parts.weight(self, 'transform', 'D-', (self.width, self.width), init, self.dtype, Role.HEAD)
    transform_bias = parts.weight(self, 'transform_bias', '-', (self.width,), zeros)
    bias = parts.weight(self, 'head_bias', 'V', (self.vocab,), zeros, padded=True)
    return MaskedHead(transform, transform_bias, norm, Head(embedding_VD, vocab=self.vocab), bias, self.norm.eps)


class TextScorer(Bidirectional):
  """An encoder that gives a text, or a pair of texts, a score: the model of BLEURT (Sellam et al. 2020).

  `output.head(output.hidden[:, :1])` is the score of each row, [B, 1], if a row is one text.
  """
  embedding_size: int | None = None

  def _head(self, embedding_VD: jax.Array) -> ScoreHead:
    del embedding_VD
    init, zeros = nn.initializers.normal(self.std), nn.initializers.zeros
    pooler = parts.weight(self, 'pooler', 'D-', (self.width, self.width), init, self.dtype, Role.HEAD)
    pooler_bias = parts.weight(self, 'pooler_bias', '-', (self.width,), zeros)
    score = parts.weight(self, 'score', '-', (self.width,), init, role=Role.HEAD)
    return ScoreHead(pooler, pooler_bias, score, parts.weight(self, 'score_bias', '-', (1,), zeros))

  @nn.nowrap
  def start(self, load: Callable[[Any], Any], base: Bidirectional, seed: int = 0) -> Any:
    """Returns parameters in which those that `base` has too are `load(base)`, and the others are new."""
    loaded, new = load(base), jax.jit(lambda: self.init(seeds.key(seed)))()
    return {name: loaded.get(name, value) for name, value in new.items()}


def scorer(base: Bidirectional) -> TextScorer:
  """Returns a scorer with the layers and the embeddings of another encoder."""
  shared = ('vocab', 'width', 'blocks', 'norm', 'max_length', 'types', 'dropout', 'std', 'dtype', 'remat',
            'embedding_size')
  return TextScorer(**{name: getattr(base, name) for name in shared})


def bert(vocab: int = 30522, width: int = 768, layers: int = 12, heads: int = 12, max_length: int = 512,
         dropout: float = 0., dtype=jnp.float32, remat=parts.keep_products) -> Encoder:
  """BERT (Devlin et al. 2019), by default base and uncased: feed-forward of 4 times the width, exact GELU, biases."""
  if width < 1 or heads < 1 or width % heads:
    raise ValueError(f'heads={heads} does not divide width={width}; choose a width that is a multiple of it')
  attention = attend.Attention(heads, heads, width // heads, bias=True, scores=attend.AttentionScores(causal=False))
  block = PostNormBlock(attention, parts.FeedForward(4 * width, gelu, gated=False, bias=True), parts.LayerNorm(1e-12),
                        parts.LayerNorm(1e-12), dropout)
  return Encoder(vocab, width, stack.stacks([block] * layers), parts.LayerNorm(1e-12), max_length, dropout=dropout,
                 dtype=dtype, remat=remat)
