"""The parts of models, but for `attention`: weights, norms, feed-forward, the block. Shape legend: `transformer.py`."""
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import declarations, sharding
from lm.data.batch import Batch
from lm.declarations import Role
from lm.models.context import Aux, Context

Initializer = Callable[..., jax.Array]

# What the backward pass may keep, for `jax.checkpoint`: the results of matrix products that it reads again, and what
# attention gives. The rest (norms, activations, rotations) is cheaper to compute again than to write and read.
keep_products = jax.checkpoint_policies.save_only_these_names(
    'query', 'key', 'value', 'attended', 'residual', 'up', 'gate', 'cross_query', 'cross_key', 'cross_value',
    'cross_residual')


@functools.partial(jax.tree_util.register_dataclass, data_fields=['weight', 'a', 'b'], meta_fields=['scale'])
@dataclasses.dataclass(frozen=True)
class LowRank:
  """A weight with a change of low rank, weight + scale * a b, in the place of a weight among a model's parameters.

  The weight is [*leading, *inputs, *outputs], a is [*leading, *inputs, r], b is [*leading, r, *outputs]; leading are
  layers and experts. The sum is made where the weight is used, so that of stacked layers one at a time is there, and
  one at a time has a gradient.
  """
  weight: jax.Array   # first: Flax compares its shape with the one declared
  a: jax.Array
  b: jax.Array
  scale: float

  def merged(self) -> jax.Array:
    """The sum in float32, laid out as the weight."""
    letters, leading = 'abcdefghijkl', self.a.ndim + self.b.ndim - self.weight.ndim - 2
    axes, inputs = letters[:self.weight.ndim], self.a.ndim - 1
    formula = f'{axes[:inputs]}r,{axes[:leading]}r{axes[inputs:]}->{axes}'
    layout = None if sharding.spec('') is None else jax.typeof(self.weight).sharding
    change = jnp.einsum(formula, self.a, self.b, out_sharding=layout, preferred_element_type=jnp.float32)
    return self.weight.astype(jnp.float32) + self.scale * change


def text_batch(batch: Batch) -> Batch:
  """The batch, laid out on the mesh. ValueError where it has inputs, which models of text alone do not read."""
  if batch.inputs:
    raise ValueError(f'the batch has inputs ({", ".join(batch.inputs)}), which this model does not read; take a model '
                     'that does, or data without them')
  return jax.tree.map(lambda x: sharding.constrain(x, 'BT'), batch)


def weight(module: nn.Module, name: str, axes: str, shape: tuple[int, ...], init: Initializer, dtype=None,
           role: Role | None = None, inputs: str | None = None) -> jax.Array:
  """Declares a float32 parameter, split over the mesh at rest; returns it gathered for use, in the compute `dtype`.

  `role` and `inputs` say what the weight is to optimizers and adapters, see `declarations.declare`: by default a vector
  where there is one axis, else a matrix of the last two axes, [in, out].

  Raises:
    ValueError: an axis does not divide by its mesh axis, or the declaration is not one, see `declarations.declare`.
  """
  sharding.check(axes, shape, name)
  declaration = declarations.declare(axes, role, inputs)

  def new(key):
    return declarations.declared(sharding.constrain(init(key, shape, jnp.float32), axes), declaration)

  value = declarations.plain(module.param(name, new))
  value = value.merged() if isinstance(value, LowRank) else value
  return sharding.gather(value if dtype is None else value.astype(dtype), axes)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 3))
def einsum(formula: str, x: jax.Array, w: jax.Array, dtype: Any = None) -> jax.Array:
  """A product with a gathered weight, whose letters also say how the result is split over the mesh.

  All three products, forward and backward, multiply in the dtype of `x` and add in float32; the result is of `dtype`,
  by default that of `x`.
  """
  return _product(formula, x, w, sharding.spec(formula.split('->')[1])).astype(dtype or x.dtype)


def _product(formula, a, b, layout):
  return jnp.einsum(formula, a, b, out_sharding=layout, preferred_element_type=jnp.float32)


def _einsum_forward(formula, x, w, dtype):
  return einsum(formula, x, w, dtype), (x, w)


def _einsum_backward(formula, dtype, kept, dy):
  (x, w), (left, y_axes) = kept, formula.split('->')
  x_axes, w_axes = left.split(',')
  dy = dy.astype(x.dtype)
  dx = _product(f'{y_axes},{w_axes}->{x_axes}', dy, w, sharding.spec(x_axes))
  order = w_axes
  if sharding.platform() == 'cpu':   # XLA transposes what comes first: let it be the smaller of the two
    order = ''.join(sorted(w_axes, key=lambda a: (a in y_axes) == (x.size <= dy.size)))
  dw = _product(f'{x_axes},{y_axes}->{order}', x, dy, sharding.gathered(order))
  if order != w_axes:
    dw = jax.lax.optimization_barrier(dw).transpose([order.index(a) for a in w_axes])
  return dx.astype(x.dtype), dw.astype(w.dtype)


einsum.defvjp(_einsum_forward, _einsum_backward)


def lookup(table_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
  """Returns the rows of a table at these tokens, [B, T, D]; where V is split, each shard gives the rows that it holds.
  """
  if sharding.spec('V') is None:
    return table_VD[tokens_BT]

  def local(table, tokens):
    tokens = tokens - sharding.part_index('V') * table.shape[0]
    held = (tokens >= 0) & (tokens < table.shape[0])
    return sharding.sum_of_parts(jnp.where(held[..., None], table[jnp.where(held, tokens, 0)], 0), 'V')

  specs = sharding.spec('V-'), sharding.spec('BT')
  return jax.shard_map(local, in_specs=specs, out_specs=sharding.spec('BTD'))(table_VD, tokens_BT)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
  """Zeroes a share `rate` of the entries and scales the rest (Srivastava et al. 2014); without a key, the identity."""
  if key is None or rate == 0:
    return x
  layout = None if sharding.spec('') is None else jax.typeof(x).sharding
  keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=layout)
  return jnp.where(keep, x / (1 - rate), 0)


class RMSNorm(nn.Module):
  """x / rms(x) * scale, in float32 (Zhang and Sennrich 2019), over the last axes, which `axes` names.

  `offset` is added to the scale, which then starts at 1 - offset; without `learned` there is no scale.
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
  """Broadcasts explicitly, so that no rank promotion happens by accident."""
  return vector.reshape((1,) * (like.ndim - vector.ndim) + vector.shape)


def add_bias(module: nn.Module, name: str, axes: str, y: jax.Array) -> jax.Array:
  """Declares a bias of the last axes of `y` and adds it, in float32: its gradient is a sum over all positions."""
  bias = weight(module, name, axes, y.shape[-len(axes):], nn.initializers.zeros, role=Role.VECTOR)
  return (y.astype(jnp.float32) + row(bias, y)).astype(y.dtype)


def silu_gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.silu(gate) * up


def gelu_gated(gate: jax.Array, up: jax.Array) -> jax.Array:
  return jax.nn.gelu(gate) * up


class FeedForward(nn.Module):
  """down(activation(up(x))); gated, down(activation(gate(x), up(x))) (Shazeer 2020)."""
  hidden: int
  activation: Callable[..., jax.Array] = silu_gated
  gated: bool = True
  bias: bool = False
  std: float = 0.02
  out_std: float = 0.02

  @nn.compact
  def __call__(self, x_BTD: jax.Array, context: Context) -> tuple[jax.Array, Aux]:
    """The output [B, T, D], and what the module reports; as all feed-forward modules."""
    width = x_BTD.shape[-1]

    def up(name):
      w = weight(self, name, 'DF', (width, self.hidden), nn.initializers.normal(self.std), x_BTD.dtype)
      y = einsum('BTD,DF->BTF', x_BTD, w)
      return context.name(name, add_bias(self, name + '_bias', 'F', y) if self.bias else y)

    y = self.activation(up('gate'), up('up')) if self.gated else self.activation(up('up'))
    down = weight(self, 'down', 'FD', (self.hidden, width), nn.initializers.normal(self.out_std), y.dtype)
    y = einsum('BTF,FD->BTD', y, down)
    return add_bias(self, 'down_bias', '-', y) if self.bias else y, Aux()


class Block(nn.Module):
  """Residual block: x + out_norm(attention(norm(x))), then the same with `feed_forward`; a norm may be None.

  As all blocks, it is called as `block(x_BTD, context, cache) -> (x_BTD, cache, aux)`, and `init_cache` makes the cache
  that it is given while it decodes: a tree of arrays that all begin with the axis B. Without a cache, it returns None.
  Pre-norm has the first norm of each, post-norm (OLMo 2) the second, a sandwich (Gemma 2) both.
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
    y, cache = self.attention(_normalised(self.attention_norm, x_BTD), context.with_key(keys[2]), cache)
    y = _normalised(self.attention_out_norm, y)
    x_BTD = context.name('residual', x_BTD + dropout(y, self.dropout, keys[0]))
    y, aux = self.feed_forward(_normalised(self.feed_forward_norm, x_BTD), context)
    y = _normalised(self.feed_forward_out_norm, y)
    return context.tap('output', x_BTD + dropout(y, self.dropout, keys[1])), cache, aux

  @nn.nowrap
  def init_cache(self, batch_size: int, slots: int, dtype: Any) -> Any:
    return self.attention.init_cache(batch_size, slots, dtype)


class ParallelBlock(nn.Module):
  """x + attention(norm(x)) + feed_forward(norm(x)) (GPT-J, GPT-NeoX), each with a norm of its own."""
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


def _normalised(norm: nn.Module | None, x: jax.Array) -> jax.Array:
  return x if norm is None else norm(x)
