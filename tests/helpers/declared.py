"""Optimizers for trees of arrays that belong to no model."""
import dataclasses
import types
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lm import declarations, optim


def weights_of(params: Any, declared: Any = None) -> Any:
  """Returns declarations with the shapes of `params`. Without `declared`, the number of axes gives each its role."""
  if declared is None:
    return declarations.of(types.SimpleNamespace(init=lambda key: jax.tree.map(jnp.asarray, params)))
  return jax.tree.map(lambda weight, x: dataclasses.replace(weight, array=jax.ShapeDtypeStruct(x.shape, x.dtype)),
                      declared, params)


def bound(optimizer: optim.Optimizer, params: Any, declared: Any = None) -> optax.GradientTransformationExtraArgs:
  """Returns the optimizer as an Optax transformation for `params` under these declarations."""
  return optim.bind(optimizer, weights_of(params, declared))
