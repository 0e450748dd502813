"""Optimizers for trees of arrays that no model makes."""
import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm import declarations, optim


def weights_of(params: Any, declared: Any = None) -> Any:
  """Declarations with the shapes of the parameters; by default each by its number of axes."""
  if declared is None:
    return declarations.of(types.SimpleNamespace(init=lambda key: jax.tree.map(jnp.asarray, params)))
  return jax.tree.map(lambda weight, x: dataclasses.replace(weight, array=jax.ShapeDtypeStruct(x.shape, x.dtype)),
                      declared, params)


def bound(optimizer: optim.Optimizer, params: Any, declared: Any = None) -> optax.GradientTransformationExtraArgs:
  """The optimizer for parameters that are declared so."""
  return optim.bound(optimizer, weights_of(params, declared))
