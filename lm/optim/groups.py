"""Groups of parameters, by path: those that decay, those that learn at a rate of their own, those that are matrices.

A path is the names down to a leaf, as in 'blocks/0/attention/query'. Patterns are those of `fnmatch`; * matches / too.
A mask is a function of the parameters, or of their shapes, that returns a tree of bool.
"""
import dataclasses
import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

Mask = Callable[[Any], Any]


def map_with_path(function: Callable[..., Any], params: Any, *others: Any) -> Any:
  """`jax.tree.map` of a function that is given the path of each leaf first."""
  return jax.tree_util.tree_map_with_path(
      lambda path, *leaves: function(jax.tree_util.keystr(path, simple=True, separator='/'), *leaves), params, *others)


def _paths(params: Any) -> Any:
  return map_with_path(lambda path, _: path, params)


def _matches(pattern: str, paths: Any) -> Any:
  """True for the leaves that match; ValueError if there are none."""
  found = jax.tree.map(lambda path: fnmatch.fnmatchcase(path, pattern), paths)
  if not any(jax.tree.leaves(found)):
    raise ValueError(f'{pattern!r} matches no parameter; there are ' + ', '.join(jax.tree.leaves(paths)))
  return found


def matching(*patterns: str) -> Mask:
  """The mask of the parameters that match any of the patterns.

  It raises ValueError, with the paths that there are, for a pattern that matches none: when the optimizer that has the
  mask makes its state, before anything is compiled.
  """
  if not patterns:
    raise ValueError('a mask of no patterns is of no parameter; give it one, such as *')

  def mask(params):
    paths = _paths(params)
    return jax.tree.map(lambda *found: any(found), *(_matches(pattern, paths) for pattern in patterns))
  return mask


def decayed(params: Any) -> Any:
  """True for matrices and tables, False for vectors, such as biases and the scales of norms: what weight decay is for.
  """
  return map_with_path(lambda path, _: not is_vector(path), params)


def hidden(params: Any) -> Any:
  """True for the matrices inside blocks, adapters of theirs included: neither embeddings, nor heads, nor vectors."""
  return map_with_path(is_hidden, params)


# What the axes of a weight mean is read from its name, and from these lists alone.
_VECTORS = 'bias', 'scale', 'sinks', 'correction'                            # names that end so
_TO_HEADS = 'query', 'key', 'value', 'query_up', 'key_up', 'value_up'        # [..., in, heads, size]
_FROM_HEADS = 'out',                                                         # [..., heads, size, out]


def is_vector(path: str) -> bool:
  return path.endswith(_VECTORS)


def is_stacked(path: str) -> bool:
  """Whether a leaf has layers as its first axis: it lies in blocks, whatever these are a part of."""
  return not {'blocks', 'depths'}.isdisjoint(path.split('/')[:-1])


def is_hidden(path: str, leaf: Any) -> bool:
  """Whether a leaf is a matrix of each layer."""
  return is_stacked(path) and not is_vector(path) and leaf.ndim > 2


def matrix_axes(path: str, leaf: Any) -> tuple[int, int]:
  """Where the axes of a matrix begin that its inputs have, after layers and experts, and those of its outputs.

  Of the adapters of a matrix, A has its inputs and B its outputs; the other axis of each is the rank.
  """
  *above, name = path.split('/')
  owner = above[-1] if above and name in ('A', 'B', 'kernel') else name
  inputs = 2 if owner in _FROM_HEADS and name != 'B' else 1
  outputs = 2 if owner in _TO_HEADS and name != 'A' else 1
  return leaf.ndim - outputs - inputs, leaf.ndim - outputs


def whole(x: jax.Array) -> jax.Array:
  """An array of which each device has all."""
  return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, P(*(None,) * x.ndim))


def laid_out_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """An array that is split over devices as another is."""
  return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, jax.typeof(like).sharding.spec)


Factors = tuple[tuple[str, float], ...]


@dataclasses.dataclass(frozen=True)
class Rates:
  """A learning rate that differs between parameters: a schedule, and (pattern, factor) for some of them.

  The whole step of a parameter is multiplied by the `factors` of all patterns that match it, weight decay included, as
  with the parameter groups of PyTorch; and what is not weight decay by its factors in `updates`, too. Give it to an
  optimizer in the place of a schedule. It is not called as one, so that an optimizer that does not know of factors
  refuses it.

  Raises:
    ValueError: for a factor that is negative or not finite; for a pattern that matches nothing, when an optimizer makes
      its state.
  """
  schedule: Callable[[jax.Array], jax.Array] | float
  factors: Factors = ()
  updates: Factors = ()

  def __post_init__(self):
    for pattern, factor in (*self.factors, *self.updates):
      if not 0 <= factor < math.inf:
        raise ValueError(f'the learning rate of {pattern!r} is {factor} times that of others; take 0 or more')


def factors_of(params: Any, factors: Factors) -> Any:
  """The product of the factors of each parameter, a tree of float; ValueError for a pattern that matches nothing."""
  paths = _paths(params)
  found = jax.tree.map(lambda _: 1., paths)
  for pattern, factor in factors:
    found = jax.tree.map(lambda total, match, factor=factor: total * factor if match else total,
                         found, _matches(pattern, paths))
  return found


def parsed(written: Sequence[str]) -> Factors:
  """('embedding=4', 'blocks/*=0.5') as (pattern, factor); ValueError for what is not of this form."""
  def pair(text):
    pattern, separator, factor = text.rpartition('=')
    try:
      return pattern.strip(), float(factor if separator and pattern.strip() else 'none')
    except ValueError:
      raise ValueError(f'{text!r} is not of the form pattern=factor, such as embedding=4') from None
  return tuple(map(pair, written))
