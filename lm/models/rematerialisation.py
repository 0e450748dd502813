"""Rematerialisation: which activations of a layer are kept for the backward pass, by name, and where."""
import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from lm import sharding
from lm.data.batch import Batch


@dataclasses.dataclass(frozen=True)
class SavePolicy:
  """A policy of `jax.checkpoint`: keeps the activations of these names, and computes all others again.

  Those of `on_host` are kept too, in the memory of the host.
  """
  names: tuple[str, ...] = ()
  on_host: tuple[str, ...] = ()

  def __call__(self, *operation: Any, **params: Any) -> Any:
    if not self.on_host:
      return jax.checkpoint_policies.save_only_these_names(*self.names)(*operation, **params)
    policy = jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[name for name in self.names if name not in self.on_host],
        names_which_can_be_offloaded=list(self.on_host), offload_src='device', offload_dst=sharding.HOST)
    return policy(*operation, **params)

  def check(self, model: Any) -> None:
    """Raises ValueError if the model has no activation of a name, or if its devices have no memory on the host."""
    existing = activation_names(model)
    missing = [name for name in (*self.names, *self.on_host) if name not in existing]
    if missing:
      raise ValueError(f'the model has no activation {", ".join(missing)} to keep; it has {", ".join(existing)}')
    if self.on_host:
      sharding.require_host_memory(', '.join(self.on_host), '--offload')


def activation_names(model: Any) -> list[str]:
  """Returns the names of the activations of a model, from its trace, sorted."""
  def hidden(params):
    tokens = jnp.zeros((sharding.parts('B'), 1), jnp.int32)
    return model.apply(params, Batch(tokens, source=tokens)).hidden

  # Nothing is computed, because the mesh may be one of another machine.
  params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
  return sorted(set(_names(jax.make_jaxpr(hidden)(params))))


def _names(jaxpr: Any) -> Iterator[str]:
  for equation in jaxpr.eqns:
    if equation.primitive.name == 'name':
      yield equation.params['name']
    for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda value: hasattr(value, 'eqns')):
      if hasattr(value, 'eqns'):
        yield from _names(value)
