"""Several devices and hosts: the mesh, how arrays are laid out on it, and operations across devices."""
from lm.sharding.axes import (
  check,
  constrain,
  gather,
  gathered_spec,
  gradient_spec,
  layout,
  local_rows,
  merge_axes,
  padded_rows,
  parts,
  platform,
  require,
  row_layout,
  scale_gradient,
  shard_rows,
  spec,
  split_axis,
  zero_gradient,
)
from lm.sharding.collectives import (
  insert_rows,
  mark_varying,
  part_index,
  rows_of_parts,
  sum_of_parts,
  sum_over_devices,
  sum_rows_of_parts,
  take_rows,
)
from lm.sharding.hosts import join, process_0_first
from lm.sharding.mesh import abstract_mesh, choose_mesh, make_mesh, mesh_text

__all__ = ['abstract_mesh', 'check', 'choose_mesh', 'constrain', 'gather', 'gathered_spec', 'gradient_spec', 'layout',
           'local_rows', 'make_mesh', 'merge_axes', 'mesh_text', 'padded_rows', 'parts', 'platform', 'require',
           'row_layout', 'scale_gradient', 'shard_rows', 'spec', 'split_axis', 'zero_gradient', 'insert_rows',
           'mark_varying', 'part_index', 'rows_of_parts', 'sum_of_parts', 'sum_over_devices', 'sum_rows_of_parts',
           'take_rows', 'join', 'process_0_first']
