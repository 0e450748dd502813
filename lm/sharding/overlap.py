"""Options of XLA with which devices gather weights while they compute."""
import os

from lm.sharding.axes import platform

# By default, devices of TPU v5e do this, and those of v6e wait for each weight (libtpu 0.0.42, see BUILD_NOTES.md).
_OPTIONS = {'tpu': ('xla_enable_async_all_gather', 'xla_tpu_overlap_compute_collective_tc',
                    'xla_tpu_enable_async_collective_fusion', 'xla_tpu_enable_async_collective_fusion_fuse_all_gather',
                    'xla_tpu_enable_async_collective_fusion_multiple_steps')}


def overlap_options() -> dict[str, bool]:
  """Returns the compiler options for a step on the mesh in use, without those that LIBTPU_INIT_ARGS sets."""
  flags = [flag.partition('=')[0].lstrip('-') for flag in os.environ.get('LIBTPU_INIT_ARGS', '').split()]
  return {name: True for name in _OPTIONS.get(platform(), ()) if name not in flags}
