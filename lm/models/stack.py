"""Layers as stacks: a short pattern of blocks, repeated, runs as one scan over stacked parameters."""
import dataclasses
import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax


@dataclasses.dataclass(frozen=True)
class Stack:
  """Layers: the blocks of `pattern` in turn, all of it `repeats` times."""
  pattern: tuple[nn.Module, ...]
  repeats: int


Stacks = tuple[Stack, ...]


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
  return block.init(key, x, *args)['params']


def run(stacks: Stacks, params: dict[str, Any], x: jax.Array, *args: Any, key: jax.Array | None = None,
        remat: Callable[..., bool] | None = None) -> jax.Array:
  """Applies the blocks: `block(x, *args, cache, key) -> (x, cache)`, without a cache, each with a key of its own.

  `remat` says what the backward pass may keep of a layer, as in `jax.checkpoint_policies`; None keeps everything.
  """
  def layer(block, params, x, key):
    return block.apply({'params': params}, x, *args, None, key)[0]   # no cache

  if remat is not None:
    layer = jax.checkpoint(layer, policy=remat, prevent_cse=False, static_argnums=0)

  def repeat(stack, x, xs):
    trees, keys = xs
    for i, block in enumerate(stack.pattern):
      x = layer(block, trees[i], x, None if keys is None else keys[i])
    return x, None

  for (stack, keys), trees in zip(_split(stacks, key), _trees(stacks, params)):
    x = jax.lax.scan(functools.partial(repeat, stack), x, (trees, keys))[0]
  return x


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
