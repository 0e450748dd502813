"""Probes of the machine: devices, memory, how devices are connected, versions, and settings that are known to hurt."""
import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from lm import sharding
from lm.doctor.findings import Finding, Verdict, judge
from lm.doctor.subject import Subject

GB = 1e9
# Variables of the environment, the values that hurt, and what they do.
VARIABLES = (
    ('JAX_DISABLE_JIT', ('1', 'true'), 'nothing is compiled'),
    ('JAX_DISABLE_MOST_OPTIMIZATIONS', ('1', 'true'), 'programs are compiled without optimisations'),
    ('JAX_DEBUG_NANS', ('1', 'true'), 'each result is read back, so that devices wait'),
    ('JAX_ENABLE_CHECKS', ('1', 'true'), 'JAX checks itself at each call'),
    ('JAX_ENABLE_X64', ('1', 'true'), 'numbers have 64 bits where nothing says otherwise'),
    ('CUDA_LAUNCH_BLOCKING', ('1',), 'the host waits for each kernel'),
    ('XLA_PYTHON_CLIENT_ALLOCATOR', ('platform',), 'memory is allocated anew for each array, which is slow'),
    ('NCCL_P2P_DISABLE', ('1',), 'GPUs exchange data through the memory of the host'),
    ('NCCL_IB_DISABLE', ('1',), 'hosts exchange data without InfiniBand'),
    ('OMP_NUM_THREADS', ('1',), 'libraries of the host use one core'),
    ('TF_CPP_MAX_VLOG_LEVEL', ('1', '2', '3'), 'XLA writes what it does into the log'),
)  # yapf: disable
XLA_FLAGS = (
    ('--xla_dump_to', 'each program is written to disk'),
    ('--xla_backend_optimization_level=0', 'programs are compiled without optimisations'),
    ('--xla_force_host_platform_device_count', 'the devices are simulated and share the cores of this machine'),
    ('--xla_cpu_use_fusion_emitters=false', 'programs for CPUs are fused by the older emitters'),
    ('--xla_gpu_autotune_level=0', 'kernels of GPUs are not tuned'),
)  # yapf: disable
TPU_FLAGS = tuple((f'--{name}=false', 'devices wait for each weight that they gather') for name in (
    'xla_tpu_enable_latency_hiding_scheduler', 'xla_tpu_enable_async_collective_fusion', 'xla_enable_async_all_gather',
    'xla_tpu_enable_async_collective_fusion_fuse_all_gather'))


def devices(subject: Subject) -> Finding:
  """The devices of the mesh, their memory, and how they are connected."""
  used = list(subject.mesh.devices.flat)
  kinds = sorted({device.device_kind for device in used})
  parts = [f'{len(used)} {" and ".join(kinds)}']
  limits = [stats['bytes_limit'] for device in used if device.process_index == jax.process_index()
            if 'bytes_limit' in (stats := sharding.memory_stats(device))]
  if limits:
    parts.append(f'{min(limits) / GB:.0f} GB each')
  parts.append(_connection(used))
  idle = len(jax.devices()) - len(used)
  text = ', '.join(filter(None, parts))
  if idle:
    return judge(False, text, f'{idle} further devices are not used by the mesh', Verdict.WARNING)
  if used[0].platform == 'cpu' and pathlib.Path('/dev/nvidia0').exists():
    return judge(False, text, 'this machine has a GPU, which JAX does not use; install JAX for CUDA, or look at '
                 'JAX_PLATFORMS', Verdict.WARNING)
  return judge(True, text)


def _connection(used: Sequence[Any]) -> str:
  """Says in words how devices are connected, as far as JAX knows."""
  hosts = len({device.process_index for device in used})
  slices = len({getattr(device, 'slice_index', 0) for device in used})
  parts = [f'on {hosts} hosts' if hosts > 1 else '', f'in {slices} slices, between which is the data-centre network'
           if slices > 1 else '']
  coordinates = [device.coords for device in used if getattr(device, 'coords', None) is not None]
  if coordinates:
    sizes = [max(axis) - min(axis) + 1 for axis in zip(*coordinates)]
    parts.append(f'in a torus of {" x ".join(map(str, sizes))} chips')
  elif used[0].platform in ('gpu', 'cuda') and len(used) > 1:
    parts.append('connection unknown (nvidia-smi topo -m shows it)')
  return ' '.join(filter(None, parts))


def host(subject: Subject) -> Finding:
  """The cores and the memory of this host."""
  del subject
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  quota = _cpu_quota()
  text = f'{cores} cores' + (f', of which a container may use {quota:.1f}' if quota and quota < cores else '')
  free, total = sharding.memory_of_host()
  if total:
    text = f'{text}; {free / GB:.1f} of {total / GB:.1f} GB of memory free'
  return judge(not total or free > 0.1 * total, text, 'the run may be ended for want of memory', Verdict.WARNING)


def _cpu_quota() -> float | None:
  """Returns the number of cores that the control group may use; None without a bound."""
  words = sharding.read_system_file('/sys/fs/cgroup/cpu.max').split()
  return int(words[0]) / int(words[1]) if len(words) == 2 and words[0] != 'max' else None


def versions(subject: Subject) -> Finding:
  """The versions of Python and of the libraries."""
  del subject
  numbers = {name: importlib.metadata.version(name) for name in ('jax', 'jaxlib', 'flax', 'optax', 'numpy')}
  text = f'Python {platform.python_version()}, ' + ', '.join(f'{name} {number}' for name, number in numbers.items())
  return judge(numbers['jax'].split('.')[:2] == numbers['jaxlib'].split('.')[:2], text,
               'jax and jaxlib are of different releases; install them again together', Verdict.WARNING)


def settings(subject: Subject) -> Finding:
  """Variables of the environment, and flags of XLA, that are known to make training slow or its results different."""
  return judge_settings(os.environ, subject.mesh.devices.flat[0].platform)


def judge_settings(environment: Mapping[str, str], device: str) -> Finding:
  """Returns the finding for an environment on devices of a platform, such as 'cpu'."""
  hurting = [f'{name}={environment[name]} ({effect})' for name, values, effect in VARIABLES
             if environment.get(name, '').lower() in values]
  for variable, flags in (('XLA_FLAGS', XLA_FLAGS), ('LIBTPU_INIT_ARGS', TPU_FLAGS)):
    hurting += [f'{variable} {flag} ({effect})' for flag, effect in flags if flag in environment.get(variable, '')]
  precision = environment.get('JAX_DEFAULT_MATMUL_PRECISION', '')
  if precision in ('highest', 'float32') and device != 'cpu':
    hurting.append(f'JAX_DEFAULT_MATMUL_PRECISION={precision} (products take several passes)')
  return judge(not hurting, '; '.join(hurting) or 'no variable or flag is set that is known to hurt',
               otherwise=Verdict.WARNING)
