"""Several devices and hosts: the mesh, and how arrays are laid out on it."""
from lm.sharding.axes import (
  abstract_mesh,
  check,
  constrain,
  gather,
  gathered,
  layout,
  local_rows,
  make_mesh,
  merge_axes,
  platform,
  require,
  shard_rows,
  spec,
  split_axis,
  sum_over_devices,
)
from lm.sharding.hosts import join, process_0_first

__all__ = ['abstract_mesh', 'check', 'constrain', 'gather', 'gathered', 'layout', 'local_rows', 'make_mesh',
           'merge_axes', 'platform', 'require', 'shard_rows', 'spec', 'split_axis', 'sum_over_devices', 'join',
           'process_0_first']
