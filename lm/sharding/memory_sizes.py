"""How much memory the host and its devices have, and how much of it is free."""
import pathlib
from collections.abc import Mapping
from typing import Any

import jax


def read_system_file(path: str) -> str:
  """Returns the text of a file of the system, empty where there is none."""
  try:
    return pathlib.Path(path).read_text()
  except OSError:
    return ''


def memory_of_host() -> tuple[int, int]:
  """Returns the free and the total memory in bytes, within the bound of the control group; (0, 0) if unknown."""
  lines = dict(line.split(':') for line in read_system_file('/proc/meminfo').splitlines() if ':' in line)
  if 'MemAvailable' not in lines:
    return 0, 0
  free, total = (int(lines[name].split()[0]) * 1024 for name in ('MemAvailable', 'MemTotal'))
  bound, used = (read_system_file(f'/sys/fs/cgroup/memory.{name}').strip() for name in ('max', 'current'))
  if bound.isdigit() and used.isdigit() and int(bound) < total:
    files = dict(line.split() for line in read_system_file('/sys/fs/cgroup/memory.stat').splitlines())
    used = int(used) - int(files.get('inactive_file', 0))
    free, total = min(free, int(bound) - used), int(bound)
  return free, total


def memory_stats(device: Any) -> Mapping[str, int]:
  """Returns what JAX knows of the memory of a device, which is nothing for some."""
  try:
    return device.memory_stats() or {}
  except jax.errors.JaxRuntimeError:
    return {}


def free_memory() -> int | None:
  """Returns the free bytes of the devices of the mesh that is set, or of the first device; None if unknown.

  Those of a host's processors are the free bytes of the host.
  """
  mesh = jax.sharding.get_mesh()
  devices = jax.local_devices()[:1] if mesh.empty else list(mesh.devices.flat)
  if devices[0].platform == 'cpu':
    return memory_of_host()[0] or None
  stats = [memory_stats(device) for device in devices if device.process_index == jax.process_index()]
  if not all('bytes_limit' in each for each in stats):
    return None
  return sum(each['bytes_limit'] - each.get('bytes_in_use', 0) for each in stats) * len(devices) // len(stats)
