"""Several devices and hosts: the mesh, how arrays are laid out on it, and operations across devices."""
from lm.sharding.axes import (
  check,
  constrain,
  layout,
  local_rows,
  merge_axes,
  padded_rows,
  parts,
  platform,
  require,
  row_layout,
  shard_rows,
  spec,
  split_axis,
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
from lm.sharding.partial import (
  contracted,
  enter,
  gather,
  gradient_spec,
  leave,
  scale_gradient,
  spread,
  whole,
  zero_gradient,
)

__all__ = ['check', 'constrain', 'layout', 'local_rows', 'merge_axes', 'padded_rows', 'parts', 'platform', 'require',
           'row_layout', 'shard_rows', 'spec', 'split_axis', 'insert_rows', 'mark_varying', 'part_index',
           'rows_of_parts', 'sum_of_parts', 'sum_over_devices', 'sum_rows_of_parts', 'take_rows', 'join',
           'process_0_first', 'abstract_mesh', 'choose_mesh', 'make_mesh', 'mesh_text', 'contracted', 'enter', 'gather',
           'gradient_spec', 'leave', 'spread', 'scale_gradient', 'whole', 'zero_gradient']
