"""Several devices and hosts: the mesh, how arrays are laid out on it, and operations across devices."""
from lm.sharding.axes import (
  abstract_mesh,
  check,
  constrain,
  gather,
  gathered_spec,
  layout,
  local_rows,
  make_mesh,
  merge_axes,
  mesh_text,
  padded_rows,
  parts,
  platform,
  require,
  row_layout,
  shard_rows,
  spec,
  split_axis,
)
from lm.sharding.collectives import insert_rows, mark_varying, part_index, sum_of_parts, sum_over_devices
from lm.sharding.hosts import join, process_0_first

__all__ = ['abstract_mesh', 'check', 'constrain', 'gather', 'gathered_spec', 'layout', 'local_rows', 'make_mesh',
           'merge_axes', 'mesh_text', 'padded_rows', 'parts', 'platform', 'require', 'row_layout', 'shard_rows', 'spec',
           'split_axis', 'insert_rows', 'mark_varying', 'part_index', 'sum_of_parts', 'sum_over_devices', 'join',
           'process_0_first']
