"""Groups of weights, by what the model declares of them or by path: what decays, what learns at a rate of its own.

Optimizers are given the declarations of a model, a tree of `declarations.Weight` like its parameters. A path is the
names down to a parameter, as in 'blocks/0/attention/query'. Patterns are those of `fnmatch`; * matches / too.
"""
import dataclasses
import fnmatch
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import optax
from jax.sharding import PartitionSpec as P

from lm.declarations import Role, Weight

Mask = Callable[[Any], Any]                     # of the declarations: a tree of bool
Selection = str | Callable[[Weight], bool]      # a pattern of paths, or a property of declarations
Optimizer = optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]


def bound(optimizer: Optimizer, weights: Any) -> optax.GradientTransformationExtraArgs:
  """An optimizer for the weights with these declarations; one of Optax, which reads none, is as it is."""
  return optax.with_extra_args_support(optimizer(weights) if callable(optimizer) else optimizer)


def _paths(weights: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
      lambda path, _: jax.tree_util.keystr(path, simple=True, separator='/'), weights)


def _selected(selection: Selection, weights: Any) -> Any:
  """True for the weights that are selected; ValueError if there are none."""
  paths = _paths(weights)
  if callable(selection):
    chosen, text = jax.tree.map(selection, weights), selection.__name__
  else:
    chosen, text = jax.tree.map(lambda path: fnmatch.fnmatchcase(path, selection), paths), repr(selection)
  if not any(jax.tree.leaves(chosen)):
    raise ValueError(f'{text} matches no parameter; there are ' + ', '.join(jax.tree.leaves(paths)))
  return chosen


def matching(*selections: Selection) -> Mask:
  """The mask of the weights that match any of the patterns, or have any of the properties.

  It raises ValueError, with the paths that there are, for a pattern that matches none: when the optimizer that has the
  mask is given the weights, before anything is compiled.
  """
  if not selections:
    raise ValueError('a mask of no patterns is of no parameter; give it one, such as *')

  def mask(weights):
    return jax.tree.map(lambda *each: any(each), *(_selected(selection, weights) for selection in selections))
  return mask


def decayed(weights: Any) -> Any:
  """True for matrices, tables and heads; False for vectors, such as biases and the scales of norms."""
  return jax.tree.map(lambda weight: weight.role not in (Role.VECTOR, Role.CORRECTION), weights)


def hidden(weights: Any) -> Any:
  """True for the matrices inside layers, adapters of theirs included: neither embeddings, nor heads, nor vectors."""
  return jax.tree.map(is_hidden, weights)


def is_hidden(weight: Weight) -> bool:
  """Whether a weight is a matrix of a layer."""
  return weight.role in (Role.MATRIX, Role.ROUTER)


def whole(x: jax.Array) -> jax.Array:
  """An array of which each device has all."""
  return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, P(*(None,) * x.ndim))


def laid_out_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """An array that is split over devices as another is."""
  return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, jax.typeof(like).sharding.spec)


Factors = tuple[tuple[Selection, float], ...]


@dataclasses.dataclass(frozen=True)
class Rates:
  """A learning rate that differs between parameters: a schedule, and (pattern, factor) for some of them.

  The whole step of a parameter is multiplied by the `factors` of all patterns that match it, weight decay included, as
  with the parameter groups of PyTorch; and what is not weight decay by its factors in `updates`, too. A function of a
  declaration may take the place of a pattern. Give it to an optimizer in the place of a schedule. It is not called as
  one, so that an optimizer that does not know of factors refuses it.

  Raises:
    ValueError: for a factor that is negative or not finite; for a pattern that matches nothing, when an optimizer is
      given the weights.
  """
  schedule: Callable[[jax.Array], jax.Array] | float
  factors: Factors = ()
  updates: Factors = ()

  def __post_init__(self):
    for pattern, factor in (*self.factors, *self.updates):
      if not 0 <= factor < math.inf:
        raise ValueError(f'the learning rate of {pattern!r} is {factor} times that of others; take 0 or more')


def factors_of(weights: Any, factors: Factors) -> Any:
  """The product of the factors of each weight, a tree of float; ValueError for a pattern that matches nothing."""
  product = jax.tree.map(lambda _: 1., weights)
  for selection, factor in factors:
    product = jax.tree.map(lambda total, match, factor=factor: total * factor if match else total,
                           product, _selected(selection, weights))
  return product


def parsed(written: Sequence[str]) -> tuple[tuple[str, float], ...]:
  """('embedding=4', 'blocks/*=0.5') as (pattern, factor); ValueError for what is not of this form."""
  def pair(text):
    pattern, separator, factor = text.rpartition('=')
    try:
      return pattern.strip(), float(factor if separator and pattern.strip() else 'none')
    except ValueError:
      raise ValueError(f'{text!r} is not of the form pattern=factor, such as embedding=4') from None
  return tuple(map(pair, written))
