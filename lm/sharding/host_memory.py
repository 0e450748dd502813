"""Arrays in the memory of the host that devices can read."""
from typing import Any

import jax

HOST = 'pinned_host'   # its name in JAX


def require_host_memory(what: str, flag: str) -> None:
  """Raises ValueError where devices cannot read the memory of the host; `flag` says that `what` is kept there."""
  device = jax.local_devices()[0]
  kinds = [memory.kind for memory in device.addressable_memories()]
  if HOST not in kinds:
    raise ValueError(f'{what} cannot be kept on the host: devices of {device.platform} have the memories '
                     f'{", ".join(kinds)}, and no {HOST}; leave out {flag}')


def to_host(tree: Any) -> Any:
  """Returns a tree whose arrays are in the memory of the host; scalars stay on the devices."""
  return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Host) if x.ndim else x, tree)


def to_devices(tree: Any) -> Any:
  """Returns a tree whose arrays are in the memory of the devices."""
  return jax.tree.map(lambda x: jax.device_put(x, jax.memory.Space.Device) if x.ndim else x, tree)


def abstract_on_host(tree: Any) -> Any:
  """Returns a tree of `jax.ShapeDtypeStruct` with shardings as `to_host` lays out its arrays."""
  return jax.tree.map(lambda x: x.update(sharding=x.sharding.with_memory_kind(HOST)) if x.ndim else x, tree)
