"""Stacks of layers: a pattern of blocks that repeats runs as one scan over stacked parameters."""
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
from lm.models import pipeline
from lm.models.context import Aux, Context, Taps


@dataclasses.dataclass(frozen=True)
class Stack:
  """Layers: the blocks of `pattern` one after the other, and this pattern `repeats` times."""
  pattern: tuple[nn.Module, ...]
  repeats: int


Stacks = tuple[Stack, ...]


@dataclasses.dataclass(frozen=True)
class LayerDropout:
  """Random omission of layers in training: x + keep / (1 - rate) * (layer(x) - x), where keep is 0 or 1.

  `rates` has the probability that keep is 0 for each layer. It is drawn for each row if `by_row` is true, otherwise
  once for the batch.
  """
  rates: tuple[float, ...]
  by_row: bool

  def __post_init__(self):
    for rate in self.rates:
      if not 0 <= rate < 1:
        raise ValueError(f'a layer cannot be left out with probability {rate}: it is not in [0, 1)')

  def __call__(self, x: jax.Array, y: jax.Array, rate: jax.Array, key: jax.Array) -> jax.Array:
    """Returns the output, given the input x and the output y of a layer, both [B, T, D]."""
    shape = (x.shape[0] if self.by_row else 1, 1, 1)
    layout = sharding.spec('B--' if self.by_row else '---')
    keep = jax.random.bernoulli(key, 1 - rate, shape, out_sharding=layout)
    return x + jnp.where(keep, (y - x) / (1 - rate).astype(x.dtype), 0)


def layer_drop(layers: int, rate: float) -> LayerDropout:
  """Returns LayerDrop (Fan et al. 2020): one rate for all layers, drawn once for the batch.

  Unlike in the paper, the layers that are kept are scaled.
  """
  return LayerDropout((float(rate),) * layers, by_row=False)


def stochastic_depth(layers: int, rate: float) -> LayerDropout:
  """Returns stochastic depth (Huang et al. 2016): rates rise linearly to `rate` at the last layer, drawn by row."""
  return LayerDropout(tuple(float(rate) * (i + 1) / layers for i in range(layers)), by_row=True)


def stacks(blocks: Sequence[nn.Module]) -> Stacks:
  """Groups the blocks of all layers into few stacks of short patterns."""
  result, start = [], 0
  while start < len(blocks):
    remaining = blocks[start:]
    sizes = range(1, min(len(remaining) // 2, 64) + 1)
    size = max(sizes, default=1, key=functools.partial(_preference, remaining))
    result.append(Stack(tuple(remaining[:size]), _repeats(remaining, size)))
    start += size * result[-1].repeats
  return tuple(result)


def _repeats(blocks: Sequence[nn.Module], size: int) -> int:
  """Returns how often the first `size` blocks follow one another from the start."""
  count = 1
  while blocks[count * size:(count + 1) * size] == blocks[:size]:
    count += 1
  return count


def _preference(blocks: Sequence[nn.Module], size: int) -> tuple[int, ...]:
  """Returns the sort key of a pattern size: the most layers in one stack, then the shortest pattern, are preferred."""
  count = _repeats(blocks, size)
  return (count * size, -size) if count > 1 else ()


def layers(stacks: Stacks) -> tuple[nn.Module, ...]:
  """Returns the block of each layer."""
  return tuple(block for stack in stacks for block in stack.pattern * stack.repeats)


def init(stacks: Stacks, key: jax.Array, x: jax.Array, *args: Any) -> dict[str, Any]:
  """Returns new parameters: a tree for each block of each stack, named '0', '1', ..., stacked over the repeats."""
  trees: dict[str, Any] = {}
  for stack, keys in _split(stacks, key):
    for i, block in enumerate(stack.pattern):
      new = functools.partial(_init, block, x, args)
      trees[str(len(trees))] = jax.lax.map(new, keys[:, i])   # `vmap` does not take weights that are reduced
  return trees


def _init(block, x, args, key):
  return declarations.attach_defaults(block.init(key, x, *args)['params'])


def run(stacks: Stacks, params: dict[str, Any], x: jax.Array, context: Context,
        remat: Callable[..., bool] | None = None, dropout: LayerDropout | None = None
        ) -> tuple[jax.Array, Aux, dict[str, Any]]:
  """Applies the blocks without a cache. Each block has its own key, split from that of the context.

  Returns x, the sum of the blocks' auxiliary outputs, and the readings of taps by name, stacked over the layers that
  have the activation. `remat` is a policy of `jax.checkpoint_policies`, which selects what is stored of a layer for the
  backward pass; None stores everything. `dropout` omits layers if there is a key.

  Raises:
    ValueError: `dropout` does not have a rate for each layer, or no layer has an activation that is tapped.
  """
  drops, x = _drops(stacks, dropout, context.key), sharding.spread(x)

  def layer(block, params, x, context):
    x, _, aux, readings = _apply(block, params, x, context)
    return x, aux, readings

  stored_layer = layer
  if remat is not None:
    stored_layer = jax.checkpoint(layer, policy=remat, prevent_cse=False, static_argnums=0)

  def repeat(stack, layer, context, x, xs):
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
    groups = sharding.pipeline_groups(stack.repeats)
    if groups is not None:
      x, aux = _pipeline(functools.partial(repeat, stack, layer), x, context, (trees, keys, stack_drops), groups, remat)
      total = total.plus(aux)
      continue
    count = stack.repeats * len(stack.pattern)
    numbers = first + jnp.arange(count).reshape(stack.repeats, -1) if context.taps else None
    body = functools.partial(repeat, stack, stored_layer, context)
    x, reports = jax.lax.scan(body, x, (trees, keys, stack_drops, numbers))
    for aux, _ in reports:
      total = total.plus(jax.tree.map(lambda each: jnp.sum(each, axis=0), aux))
    read = [reading for _, reading in reports]
    readings += [jax.tree.map(operator.itemgetter(i), read[j]) for i in range(stack.repeats) for j in range(len(read))]
    first += count
  return sharding.constrain(x, 'BTD'), total, _stacked(context.taps, readings)


def _pipeline(repeat, x, context, layers, groups, remat):
  """Applies a stack as a pipeline. Returns x and the auxiliary output: sums over layers, losses being means of parts.

  Each layer has its own key for each microbatch, so that masks of dropout are not those without a pipeline.
  """
  if context.taps:
    raise ValueError(f'activations are tapped, {", ".join(name for name, _ in context.taps)}, in a step on a mesh with '
                     'the axis stage, whose devices have other layers; choose a --mesh without it')

  def visit(layers, microbatch, x, rows):
    trees, keys, drops = layers
    own = jax.vmap(jax.random.fold_in, (0, None))
    keys = None if keys is None else own(keys, microbatch)
    drops = None if drops is None else (drops[0], own(drops[1], microbatch))
    x, reports = repeat(context.with_rows(rows), x, (trees, keys, drops, None))
    return x, functools.reduce(Aux.plus, (aux for aux, _ in reports))

  policy = remat or jax.checkpoint_policies.everything_saveable
  x, aux = pipeline.run(visit, layers, x, context.rows(), groups, policy)
  microbatches = groups * sharding.number_of_stages()
  return x, aux if aux.loss is None else aux._replace(loss=aux.loss / microbatches)


def run_cached(stacks: Stacks, params: Any, x: jax.Array, context: Context, caches: tuple[Any, ...]
               ) -> tuple[jax.Array, tuple[Any, ...], Aux, dict[str, Any]]:
  """Applies the blocks like `run`, each with its cache, and returns the new caches too.

  It does not use a scan, which would copy the weights and the cache of each layer at every step (half of the time on
  CPU).
  """
  def apply(block, params, x, context, cache):   # new in each call, because a trace depends on what is set around it
    return _apply(block, params, x, context, cache)

  new, total, readings, x = [], Aux(), [], sharding.spread(x)
  if isinstance(x, jax.core.Tracer):
    apply = jax.jit(apply, static_argnums=0)   # equal layers are traced once
  for i, (block, tree, cache) in enumerate(zip(layers(stacks), unstacked(stacks, params), caches)):
    x, cache, aux, read = apply(block, tree, x, dataclasses.replace(context, layer=jnp.int32(i)), cache)
    new.append(cache)
    total = total.plus(aux)
    readings.append(read)
  return sharding.constrain(x, 'BTD'), tuple(new), total, _stacked(context.taps, readings)


def _apply(block, params, x, context, cache=None):
  """Applies a layer. Returns x, the layer's cache, its auxiliary output and the readings of its taps."""
  readings: dict[str, Any] = {}
  context = dataclasses.replace(context, readings=readings)
  x, cache, aux = block.apply({'params': declarations.detach(params)}, x, context, cache)
  return x, cache, aux, readings


def _stacked(taps: Taps, readings: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """Returns the readings by name, stacked over layers, without those that are None."""
  names = {name for reading in readings for name in reading}
  for name, _ in taps:
    if name not in names:
      raise ValueError(f'there is a tap of {name!r}, and no layer has an activation of that name')
  stacked = {name: jax.tree.map(lambda *each: jnp.stack(each), *(r[name] for r in readings if name in r))
             for name in sorted(names)}
  return {name: reading for name, reading in stacked.items() if reading is not None}


def _drops(stacks: Stacks, dropout: LayerDropout | None, key: jax.Array | None) -> list[tuple | None]:
  """Returns for each stack the rates and the keys of its layers, [repeats, len(pattern)]; None without dropout."""
  count = len(layers(stacks))
  if dropout is not None and len(dropout.rates) != count:
    raise ValueError(f'{len(dropout.rates)} rates of layer dropout do not fit {count} layers; give one for each layer')
  if dropout is None or key is None or not any(dropout.rates):
    return [None] * len(stacks)
  key = jax.random.fold_in(key, len(dropout.rates))   # differs from the keys of the blocks
  shapes = [(stack.repeats, len(stack.pattern)) for stack in stacks]
  ends = np.cumsum([np.prod(shape) for shape in shapes])[:-1]
  rates = np.split(np.float32(dropout.rates), ends)
  return [(jnp.asarray(stack_rates.reshape(shape)), keys)
          for stack_rates, shape, (_, keys) in zip(rates, shapes, _split(stacks, key))]


def _split(stacks: Stacks, key: jax.Array | None) -> Iterator[tuple[Stack, jax.Array | None]]:
  """Yields each stack with the keys of its layers, [repeats, len(pattern)]; None without a key."""
  keys = None if key is None else jax.random.split(key, len(layers(stacks)))
  first = 0
  for stack in stacks:
    size = stack.repeats * len(stack.pattern)
    yield stack, None if keys is None else keys[first:first + size].reshape(stack.repeats, -1)
    first += size


def _trees(stacks: Stacks, params: dict[str, Any]) -> Iterator[tuple[Any, ...]]:
  """Yields for each stack the parameters of each block of its pattern."""
  first = 0
  for stack in stacks:
    yield tuple(params[str(first + i)] for i in range(len(stack.pattern)))
    first += len(stack.pattern)


def unstacked(stacks: Stacks, params: Any) -> tuple[Any, ...]:
  """Returns parameters with one tree for each layer. Parameters that are unstacked already are returned as they are."""
  return params if isinstance(params, tuple) else _slices(stacks, params)


@functools.partial(jax.jit, static_argnums=0)
def _slices(stacks: Stacks, params: dict[str, Any]) -> tuple[Any, ...]:
  return tuple(jax.tree.map(operator.itemgetter(i), tree) for stack, trees in zip(stacks, _trees(stacks, params))
               for i in range(stack.repeats) for tree in trees)
