"""Groups of weights that decay, or that learn at a rate of their own.

Optimizers are given the declarations of a model: a tree of `declarations.Weight` with the structure of its parameters.
A group is chosen by a property of declarations, or by a pattern of paths, such as 'blocks/*/attention/query'. Patterns
are those of `fnmatch`, where * matches / too.
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

Mask = Callable[[Any], Any]                     # from the declarations to a tree of bool
Selection = str | Callable[[Weight], bool]      # a pattern of paths, or a property of declarations
Optimizer = optax.GradientTransformation | Callable[[Any], optax.GradientTransformation]


def bind(optimizer: Optimizer, weights: Any) -> optax.GradientTransformationExtraArgs:
  """Returns the transformation of an optimizer for declared weights; a transformation of Optax needs no declarations.
  """
  return optax.with_extra_args_support(optimizer(weights) if callable(optimizer) else optimizer)


def _paths(weights: Any) -> Any:
  return jax.tree_util.tree_map_with_path(
      lambda path, _: jax.tree_util.keystr(path, simple=True, separator='/'), weights)


def _selected(selection: Selection, weights: Any) -> Any:
  """Returns a tree that is True for the selected weights. Raises ValueError where there are none."""
  paths = _paths(weights)
  if callable(selection):
    chosen, text = jax.tree.map(selection, weights), selection.__name__
  else:
    chosen, text = jax.tree.map(lambda path: fnmatch.fnmatchcase(path, selection), paths), repr(selection)
  if not any(jax.tree.leaves(chosen)):
    raise ValueError(f'{text} matches no parameter; there are ' + ', '.join(jax.tree.leaves(paths)))
  return chosen


def matching(*selections: Selection) -> Mask:
  """Returns the mask of the weights that match any of the patterns, or have any of the properties.

  Raises:
    ValueError: there is no pattern; or, when the mask is applied to weights, which happens before anything is compiled,
      a pattern matches none. The message lists the paths.
  """
  if not selections:
    raise ValueError('a mask without a pattern selects no parameter; give it a pattern, such as *')

  def mask(weights):
    return jax.tree.map(lambda *each: any(each), *(_selected(selection, weights) for selection in selections))
  return mask


def decay_mask(weights: Any) -> Any:
  """Returns True for matrices, tables and heads; False for vectors, such as biases and the scales of norms."""
  return jax.tree.map(lambda weight: weight.role not in (Role.VECTOR, Role.CORRECTION), weights)


def hidden_mask(weights: Any) -> Any:
  """Returns True for the matrices inside layers and their adapters; False for embeddings, heads and vectors."""
  return jax.tree.map(is_hidden, weights)


def is_hidden(weight: Weight) -> bool:
  """Whether a weight is a matrix inside a layer."""
  return weight.role in (Role.MATRIX, Role.ROUTER)


def replicated(x: jax.Array) -> jax.Array:
  """Returns an array with a whole copy on each device."""
  return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, P(*(None,) * x.ndim))


def laid_out_like(x: jax.Array, like: jax.Array) -> jax.Array:
  """Returns an array with the sharding of another one."""
  return x if jax.sharding.get_abstract_mesh().empty else jax.sharding.reshard(x, jax.typeof(like).sharding.spec)


Factors = tuple[tuple[Selection, float], ...]


@dataclasses.dataclass(frozen=True)
class Rates:
  """A learning rate that differs between parameters. Optimizers take it in place of a schedule.

  It cannot be called as a schedule, so that an optimizer which knows nothing of factors refuses it.

  Attributes:
    schedule: the learning rate of parameters that no pattern matches.
    factors: pairs (pattern, factor). The whole step of a parameter, weight decay included, is multiplied by the factors
      of all patterns that match it, as with the parameter groups of PyTorch. A property of declarations may take the
      place of a pattern.
    updates: such pairs, which multiply the step without its weight decay.

  Raises:
    ValueError: a factor is negative or not finite; or, when an optimizer is given the weights, a pattern matches none.
  """
  schedule: Callable[[jax.Array], jax.Array] | float
  factors: Factors = ()
  updates: Factors = ()

  def __post_init__(self):
    for pattern, factor in (*self.factors, *self.updates):
      if not 0 <= factor < math.inf:
        raise ValueError(f'the factor {factor} of the learning rate of {pattern!r} is negative or not finite; take 0 '
                         'or more')


def factors_of(weights: Any, factors: Factors) -> Any:
  """Returns the product of the factors of each weight. Raises ValueError for a pattern that matches none."""
  product = jax.tree.map(lambda _: 1., weights)
  for selection, factor in factors:
    product = jax.tree.map(lambda total, match, factor=factor: total * factor if match else total,
                           product, _selected(selection, weights))
  return product


def parse_factors(texts: Sequence[str]) -> tuple[tuple[str, float], ...]:
  """Returns (pattern, factor) of texts such as 'blocks/*=0.5'. Raises ValueError for a text of another form."""
  return tuple(map(_parse_factor, texts))


def _parse_factor(text: str) -> tuple[str, float]:
  pattern, _, factor = text.rpartition('=')
  try:
    number = float(factor)
  except ValueError:
    number = None
  if number is None or not pattern.strip():
    raise ValueError(f'{text!r} is not of the form pattern=factor, such as embedding=4')
  return pattern.strip(), number
