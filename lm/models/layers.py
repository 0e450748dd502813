"""The parts of models except attention: weights, norms, feed-forward layers, blocks. Shape legend: `transformer.py`."""
import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import declarations, sharding
from lm.data.batch import Batch
from lm.declarations import Role
from lm.models import rounding
from lm.models.context import Aux, Context
from lm.models.low_rank_weight import LowRank, RowLowRank
from lm.models.rematerialisation import SavePolicy
from lm.models.rounded_weights import RoundedWeight

Initializer = Callable[..., jax.Array]
Factor = jax.Array | RowLowRank | RoundedWeight   # a weight in use

# Results of matrix products that the backward pass reads, and the outputs of attention. All others (norms, activations,
# rotations) are cheaper to compute again.
keep_products = SavePolicy(('query', 'key', 'value', 'attended', 'residual', 'up', 'gate', 'cross_query', 'cross_key',
                      'cross_value', 'cross_residual'))


def text_batch(batch: Batch) -> Batch:
  """Returns the batch, sharded over the mesh. Raises ValueError if it has inputs, which text models do not read."""
  if batch.inputs:
    raise ValueError(f'the batch has inputs ({", ".join(batch.inputs)}), which this model does not read; take a model '
                     'that does, or data without them')
  return jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)


def weight(module: nn.Module, name: str, axes: str, shape: tuple[int, ...], init: Initializer, dtype=None,
           role: Role | None = None, inputs: str | None = None, padded: bool = False) -> jax.Array:
  """Declares a float32 parameter, which is stored in shards, and returns it gathered for use, in `dtype`.

  `role` and `inputs` declare the weight to optimizers and adapters; see `declarations.declare`. By default, a weight
  with one axis is a vector, and one with more axes is a matrix of the last two, [in, out]. With `padded`, a vocabulary
  V may have any size: where its mesh axes do not divide it, the weight in use has more rows, which are zeros, and the
  caller hides their logits, as `Head` does.

  Raises:
    ValueError: the size of an axis is not a multiple of its mesh axis, or the declaration is not valid.
  """
  sharding.check(axes, shape, name, sharding.stored_spec(axes, shape) if padded else None)
  declaration = declarations.declare(axes, role, inputs)

  def new(key):
    return declarations.attach(sharding.store(init(key, shape, jnp.float32), axes), declaration)

  return in_use(declarations.detach(module.param(name, new)), axes, dtype)


def in_use(value: jax.Array | LowRank | RowLowRank | RoundedWeight, axes: str, dtype: Any = None) -> Factor:
  """Returns a stored parameter gathered for use, in `dtype`; a rounded one as it is."""
  if isinstance(value, RoundedWeight):
    return value
  if isinstance(value, RowLowRank):
    inputs = value.a.ndim - 1
    return dataclasses.replace(value, weight=in_use(value.weight, axes, dtype),
                               a=in_use(value.a, axes[:inputs] + 'r', dtype),
                               b=in_use(value.b, 'r' + axes[inputs:], dtype))
  if isinstance(value, LowRank):
    value = value.merged()
  return sharding.gather(value if dtype is None else value.astype(dtype), axes)


def einsum(formula: str, x: jax.Array, w: Factor, dtype: Any = None) -> jax.Array:
  """Multiplies by a gathered weight. The letters of the formula also define the sharding of the result.

  All three products, forward and backward, multiply in the dtype of `x` and accumulate in float32; in a model that
  rounds factors to 8 bits, the first two multiply these (see `rounding`). The result has `dtype`; None means the dtype
  of `x`. A rounded weight is multiplied over the last axis of `x` and its own first one.
  """
  if isinstance(w, RoundedWeight):
    return w.product(x).astype(dtype or x.dtype)
  if isinstance(w, RowLowRank):
    return w.product(einsum, formula, x).astype(dtype or x.dtype)
  return sharding.leave(_einsum(formula, x, w, dtype or x.dtype, rounding.current(x.dtype)))


def _multiply(formula, x, w, dtype, rounds):
  """Multiplies; where contracted axes are split, each device has a part of the result."""
  dtypes, layout = None if rounds is None else (rounds.forward, rounds.forward), sharding.spec(formula.split('->')[1])
  if layout is not None:
    layout = layout.update(unreduced=frozenset(sharding.contracted(formula, x)))
  return _product(formula, x, w, layout, dtypes).astype(dtype)


def _product(formula, a, b, layout, dtypes=None):
  """Multiplies two operands in float32. The layout says over which mesh axes devices have parts of the result."""
  a, b = sharding.whole(a), sharding.whole(b)
  with_parts = layout
  if layout is not None:   # rounded factors have scales, which multiply whole results
    axes = frozenset() if dtypes else layout.unreduced & sharding.contracted(formula, a)
    with_parts = jax.P(*layout.partitions, unreduced=axes)
  if dtypes:
    y = rounding.product(formula, a, b, with_parts, dtypes)
  else:
    y = jnp.einsum(formula, a, b, out_sharding=with_parts, preferred_element_type=jnp.float32)
  return y if with_parts == layout else jax.sharding.reshard(y, layout)


def _einsum_backward(formula, dtype, rounds, residuals, dy):
  x, w = residuals
  operands, y_axes = formula.split('->')
  x_axes, w_axes = operands.split(',')
  dy = dy.astype(x.dtype)
  dtypes = None if rounds is None else (rounds.backward, rounds.forward)
  dx = _product(f'{y_axes},{w_axes}->{x_axes}', dy, w, sharding.gradient_spec(x), dtypes)
  order = w_axes
  if sharding.platform() == 'cpu':   # XLA transposes the operand whose axes come first, which should be the smaller one
    order = ''.join(sorted(w_axes, key=lambda axis: (axis in y_axes) == (x.size <= dy.size)))
  layout = sharding.gradient_spec(w)
  if layout is not None:
    layout = layout.update(partitions=[layout.partitions[w_axes.index(axis)] for axis in order])
  dw = _product(f'{x_axes},{y_axes}->{order}', x, dy, layout)
  if order != w_axes:
    dw = jax.lax.optimization_barrier(dw).transpose([order.index(axis) for axis in w_axes])
  return dx.astype(x.dtype), dw.astype(w.dtype)


_einsum = sharding.custom_vjp(_multiply, lambda *args: (_multiply(*args), args[1:3]), _einsum_backward,
                              nondiff_argnums=(0, 3, 4))


def merge_inputs(w: Factor) -> Factor:
  """Returns a gathered weight whose first two axes, which are inputs, are one; the second of them is not split."""
  if isinstance(w, RowLowRank):
    return dataclasses.replace(w, weight=merge_inputs(w.weight), a=merge_inputs(w.a))
  return w.merge_inputs() if isinstance(w, RoundedWeight) else sharding.merge_axes(w, 0)


def lookup(table_VD: jax.Array | RoundedWeight, tokens_BT: jax.Array) -> jax.Array:
  """Returns the rows of a table for tokens, [B, T, D]. Where V is sharded, each shard looks up its own rows."""
  if isinstance(table_VD, RoundedWeight):
    return table_VD.rows(tokens_BT)
  if sharding.is_on_one_device():   # a `shard_map` would sum the gradient over it
    return jnp.asarray(table_VD).at[tokens_BT].get(out_sharding=sharding.spec('BTD'))

  def local(table, tokens):
    tokens = tokens - sharding.part_index('V') * table.shape[0]
    is_local = (tokens >= 0) & (tokens < table.shape[0])
    rows = table[jnp.where(is_local, tokens, 0)]
    return sharding.sum_of_parts(jnp.where(is_local[..., None], rows, 0), 'V')

  specs = jax.typeof(table_VD).sharding.spec, sharding.spec('BT')
  return jax.shard_map(local, in_specs=specs, out_specs=sharding.spec('BTD'))(table_VD, tokens_BT)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes a share `rate` of the entries and scales the others (Srivastava et al. 2014). Without a key, returns x."""
  if key is None or rate == 0:
    return x
  layout = None if sharding.spec('') is None else jax.typeof(x).sharding
  keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=layout)
  return jnp.where(keep, x / (1 - rate), 0)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32, over the last axes, whose letters are `axes` (Zhang and Sennrich 2019).

  `offset` is added to the scale, whose initial value is then 1 - offset. Without `learned`, there is no scale.
  """
  eps: float = 1e-6
  offset: float = 0.
  axes: str = '-'
  learned: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    n = len(self.axes)
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=tuple(range(-n, 0)), keepdims=True) + self.eps)
    if self.learned:
      scale = weight(self, 'scale', self.axes, x.shape[-n:], nn.initializers.constant(1 - self.offset),
                     role=Role.VECTOR)
      y = y * row(scale.astype(jnp.float32) + self.offset, y)
    return y.astype(x.dtype)


class LayerNorm(nn.Module):
  """(x - mean) / std * scale + bias, in float32 (Ba et al. 2016)."""
  eps: float = 1e-5
  bias: bool = True

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    scale = weight(self, 'scale', '-', x.shape[-1:], nn.initializers.ones)
    y = x.astype(jnp.float32)
    y = y - jnp.mean(y, axis=-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.eps) * row(scale, y)
    if self.bias:
      y = y + row(weight(self, 'bias', '-', x.shape[-1:], nn.initializers.zeros), y)
    return y.astype(x.dtype)


def row(vector: jax.Array, like: jax.Array) -> jax.Array:
  """Returns a vector with axes of size 1 in front, so that it broadcasts against `like` without rank promotion."""
  return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def add_bias(module: nn.Module, name: str, axes: str, y: jax.Array) -> jax.Array:
  """Declares a bias for the last axes of `y` and adds it in float32, because its gradient sums over all positions."""
  bias = weight(module, name, axes, y.shape[-len(axes):], nn.initializers.zeros, role=Role.VECTOR)
  return (y.astype(jnp.float32) + row(bias, y)).astype(y.dtype)


def silu_gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.silu(gate) * up


def gelu_gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.gelu(gate) * up


class FeedForward(nn.Module):
  """down(activation(up(x))) or, if `gated`, down(activation(gate(x), up(x))) (Shazeer 2020)."""
  hidden: int
  activation: Callable[..., jax.Array] = silu_gated
  gated: bool = True
  bias: bool = False
  std: float = 0.02
  out_std: float = 0.02

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Aux]:
    """Returns the output [B, T, D] and an auxiliary output. All feed-forward modules have this signature."""
    width, x_BTD = x_BTD.shape[-1], sharding.enter(x_BTD)

    def up(name):
      w = weight(self, name, 'DF', (width, self.hidden), nn.initializers.normal(self.std), x_BTD.dtype)
      y = einsum('BTD,DF->BTF', x_BTD, w)
      return context.name(name, add_bias(self, name + '_bias', 'F', y) if self.bias else y)

    y = self.activation(up('gate'), up('up')) if self.gated else self.activation(up('up'))
    down = weight(self, 'down', 'FD', (self.hidden, width), nn.initializers.normal(self.out_std), y.dtype)
    y = einsum('BTF,FD->BTD', y, down)
    return add_bias(self, 'down_bias', '-', y) if self.bias else y, Aux()


class Block(nn.Module):
  """A residual block: x + out_norm(attention(norm(x))), then the same with `feed_forward`; each norm may be None.

  All blocks are called as `block(x_BTD, context, cache) -> (x_BTD, cache, aux)`. The cache for decoding is what
  `init_cache` returns, a tree of arrays whose first axis is B; without a cache, the returned cache is None. Pre-norm
  has only the first norm of each, post-norm (OLMo 2) only the second, and Gemma 2 both.
  """
  attention: nn.Module
  feed_forward: nn.Module
  attention_norm: nn.Module | None
  feed_forward_norm: nn.Module | None
  attention_out_norm: nn.Module | None = None
  feed_forward_out_norm: nn.Module | None = None
  dropout: float = 0.

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any, Aux]:
    keys = context.keys(3)
    y, cache = self.attention(_normalise(self.attention_norm, x_BTD), context.with_key(keys[2]), cache)
    y = _normalise(self.attention_out_norm, y)
    x_BTD = context.name('residual', x_BTD + dropout(y, self.dropout, keys[0]))
    y, aux = self.feed_forward(_normalise(self.feed_forward_norm, x_BTD), context)
    y = _normalise(self.feed_forward_out_norm, y)
    return context.tap('output', x_BTD + dropout(y, self.dropout, keys[1])), cache, aux

  @nn.nowrap
  def init_cache(self, batch_size: int, slots: int, dtype: Any) -> Any:
    return self.attention.init_cache(batch_size, slots, dtype)


class ParallelBlock(nn.Module):
  """x + attention(norm(x)) + feed_forward(norm(x)), where each has its own norm (GPT-J, GPT-NeoX)."""
  attention: nn.Module
  feed_forward: nn.Module
  attention_norm: nn.Module
  feed_forward_norm: nn.Module
  dropout: float = 0.

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context, cache: Any = None) -> tuple[jax.Array, Any, Aux]:
    keys = context.keys(3)
    y, cache = self.attention(self.attention_norm(x_BTD), context.with_key(keys[2]), cache)
    z, aux = self.feed_forward(self.feed_forward_norm(x_BTD), context)
    x_BTD = x_BTD + dropout(y, self.dropout, keys[0]) + dropout(z, self.dropout, keys[1])
    return context.tap('output', x_BTD), cache, aux

  @nn.nowrap
  def init_cache(self, batch_size: int, slots: int, dtype: Any) -> Any:
    return self.attention.init_cache(batch_size, slots, dtype)


def _normalise(norm: nn.Module | None, x: jax.Array) -> jax.Array:
  return x if norm is None else norm(x)
