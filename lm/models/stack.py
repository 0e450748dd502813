"""Layers as stacks: a short pattern of blocks, repeated, runs as one scan over stacked parameters."""
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from lm import declarations, sharding
from lm.models.context import Aux, Context, Taps


@dataclasses.dataclass(frozen=True)
class Stack:
  """Layers: the blocks of `pattern` in turn, all of it `repeats` times."""
  pattern: tuple[nn.Module, ...]
  repeats: int


Stacks = tuple[Stack, ...]


@dataclasses.dataclass(frozen=True)
class LayerDropout:
  """Layers that training leaves out at random: x + keep / (1 - rate) (layer(x) - x), keep being 0 or 1.

  `rates` has the probability of 0 for each layer. Drawn once for the batch, or by row.
  """
  rates: tuple[float, ...]
  by_row: bool

  def __post_init__(self):
    if bad := [rate for rate in self.rates if not 0 <= rate < 1]:
      raise ValueError(f'a layer cannot be left out with probability {bad[0]}: it is not in [0, 1)')

  def __call__(self, x: jax.Array, y: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """What follows a layer that makes y, [B, T, D], of x."""
    shape = (x.shape[0] if self.by_row else 1, 1, 1)
    layout = sharding.spec('B--' if self.by_row else '---')
    keep = jax.random.bernoulli(key, 1 - rate, shape, out_sharding=layout)
    return x + jnp.where(keep, (y - x) / (1 - rate).astype(x.dtype), 0)


def layer_drop(layers: int, rate: float) -> LayerDropout:
  """Each layer at one rate, for the whole batch (LayerDrop, Fan et al. 2020, who do not scale the layers that stay)."""
  return LayerDropout((float(rate),) * layers, by_row=False)


def stochastic_depth(layers: int, rate: float) -> LayerDropout:
  """Rates that rise by the layer up to `rate`, the last one's, for each row (stochastic depth, Huang et al. 2016)."""
  return LayerDropout(tuple(float(rate) * (i + 1) / layers for i in range(layers)), by_row=True)


def stacks(blocks: Sequence[nn.Module]) -> Stacks:
  """The blocks of all layers, as few stacks of short patterns."""
  found, at = [], 0
  while at < len(blocks):
    def repeats(size, at=at):
      n = 1
      while blocks[at + n * size:at + (n + 1) * size] == blocks[at:at + size]:
        n += 1
      return n
    rest = len(blocks) - at
    # The pattern that covers the most layers, the shorter of two; one layer by itself covers none but itself.
    size = max(range(1, min(rest // 2, 64) + 1), default=1,
               key=lambda size: ((n := repeats(size)) > 1) * (n * size, -size))
    found.append(Stack(tuple(blocks[at:at + size]), repeats(size)))
    at += size * found[-1].repeats
  return tuple(found)


def layers(stacks: Stacks) -> tuple[nn.Module, ...]:
  """The block of each layer."""
  return tuple(block for stack in stacks for block in stack.pattern * stack.repeats)


def init(stacks: Stacks, key: jax.Array, x: jax.Array, *args: Any) -> dict[str, Any]:
  """Parameters: for each block of each stack, `'0'` and so on, a tree stacked over the repeats."""
  trees: dict[str, Any] = {}
  for stack, keys in _split(stacks, key):
    for i, block in enumerate(stack.pattern):
      new = functools.partial(_init, block, x, args)
      trees[str(len(trees))] = jax.vmap(new)(keys[:, i])
  return trees


def _init(block, x, args, key):
  return declarations.declared_by_shape(block.init(key, x, *args)['params'])


def run(stacks: Stacks, params: dict[str, Any], x: jax.Array, context: Context,
        remat: Callable[..., bool] | None = None, dropout: LayerDropout | None = None
        ) -> tuple[jax.Array, Aux, dict[str, Any]]:
  """Applies the blocks, without a cache; each has a key of its own, split from that of the context.

  Returns x, what the blocks report in sum, and what taps have read, by name, stacked over the layers that have the
  activation. `remat` says what the backward pass may keep of a layer, as in `jax.checkpoint_policies`; None keeps
  everything. `dropout` leaves layers out where there is a key.

  Raises:
    ValueError: the rates of `dropout` are not as many as the layers, or no layer has an activation that is tapped.
  """
  drops = _drops(stacks, dropout, context.key)

  def layer(block, params, x, context):
    x, _, aux, readings = _apply(block, params, x, context)
    return x, aux, readings

  if remat is not None:
    layer = jax.checkpoint(layer, policy=remat, prevent_cse=False, static_argnums=0)

  def repeat(stack, x, xs):
    trees, keys, drops, numbers = xs
    reports = []
    for i, block in enumerate(stack.pattern):
      own = dataclasses.replace(context, key=None if keys is None else keys[i],
                                layer=None if numbers is None else numbers[i])
      y, *report = layer(block, trees[i], x, own)
      x = y if drops is None else dropout(x, y, drops[0][i], drops[1][i])
      reports.append(report)
    return x, reports

  total, readings, first = Aux(), [], 0
  for (stack, keys), trees, stack_drops in zip(_split(stacks, context.key), _trees(stacks, params), drops):
    count = stack.repeats * len(stack.pattern)
    numbers = first + jnp.arange(count).reshape(stack.repeats, -1) if context.taps else None
    x, reports = jax.lax.scan(functools.partial(repeat, stack), x, (trees, keys, stack_drops, numbers))
    for aux, _ in reports:
      total = total.plus(jax.tree.map(lambda each: jnp.sum(each, axis=0), aux))
    read = [reading for _, reading in reports]
    readings += [jax.tree.map(operator.itemgetter(i), read[j]) for i in range(stack.repeats) for j in range(len(read))]
    first += count
  return x, total, _stacked(context.taps, readings)


def run_cached(stacks: Stacks, params: Any, x: jax.Array, context: Context, caches: tuple[Any, ...]
               ) -> tuple[jax.Array, tuple[Any, ...], Aux, dict[str, Any]]:
  """As `run`, one layer after the other, each with its cache; returns the new caches too.

  It is no scan, which would copy each layer's weights and cache at every step: half of the time on CPU.
  """
  new, total, readings = [], Aux(), []
  for i, (block, tree, cache) in enumerate(zip(layers(stacks), unstacked(stacks, params), caches)):
    x, cache, aux, read = _apply(block, tree, x, dataclasses.replace(context, layer=jnp.int32(i)), cache)
    new.append(cache)
    total = total.plus(aux)
    readings.append(read)
  return x, tuple(new), total, _stacked(context.taps, readings)


def _apply(block, params, x, context, cache=None):
  """A layer: x, its cache, what it reports, and what taps have read in it."""
  readings: dict[str, Any] = {}
  context = dataclasses.replace(context, readings=readings)
  x, cache, aux = block.apply({'params': declarations.plain(params)}, x, context, cache)
  return x, cache, aux, readings


def _stacked(taps: Taps, readings: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """{name: what its tap has read, stacked over layers}; without those that read nothing."""
  known = {name for reading in readings for name in reading}
  if unknown := [name for name, _ in taps if name not in known]:
    raise ValueError(f'there is a tap of {unknown[0]!r}, and no layer has an activation of that name')
  stacked = {name: jax.tree.map(lambda *each: jnp.stack(each), *(r[name] for r in readings if name in r))
             for name in sorted(known)}
  return {name: reading for name, reading in stacked.items() if reading is not None}


def _drops(stacks: Stacks, dropout: LayerDropout | None, key: jax.Array | None) -> list[tuple | None]:
  """For each stack, the rates and the keys of its layers, `[repeats, len(pattern)]`; None where none is left out."""
  if dropout is not None and len(dropout.rates) != (count := len(layers(stacks))):
    raise ValueError(f'{len(dropout.rates)} rates of dropout for {count} layers; give one for each')
  if dropout is None or key is None or not any(dropout.rates):
    return [None] * len(stacks)
  key = jax.random.fold_in(key, len(dropout.rates))   # beside those of the blocks
  shapes = [(stack.repeats, len(stack.pattern)) for stack in stacks]
  ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1]
  rates = np.split(np.float32(dropout.rates), ends)
  return [(jnp.asarray(of.reshape(shape)), keys) for of, shape, (_, keys) in zip(rates, shapes, _split(stacks, key))]


def _split(stacks: Stacks, key: jax.Array | None) -> Iterator[tuple[Stack, jax.Array | None]]:
  """Each stack with a key for each layer, `[repeats, len(pattern)]`."""
  keys, done = None if key is None else jax.random.split(key, len(layers(stacks))), 0
  for stack in stacks:
    size = stack.repeats * len(stack.pattern)
    yield stack, None if keys is None else keys[done:done + size].reshape(stack.repeats, -1)
    done += size


def _trees(stacks: Stacks, params: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
  """For each stack, the parameters of each block of its pattern."""
  done = 0
  for stack in stacks:
    yield tuple(params[str(done + i)] for i in range(len(stack.pattern)))
    done += len(stack.pattern)


def unstacked(stacks: Stacks, params: Any) -> tuple[Any, ...]:
  """Parameters with one tree a layer; they are returned as they are where they are so already."""
  return params if isinstance(params, tuple) else _slices(stacks, params)


@functools.partial(jax.jit, static_argnums=0)
def _slices(stacks: Stacks, params: dict[str, Any]) -> tuple[Any, ...]:
  return tuple(jax.tree.map(operator.itemgetter(i), tree) for stack, trees in zip(stacks, _trees(stacks, params))
               for i in range(stack.repeats) for tree in trees)
