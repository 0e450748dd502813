"""Several devices and hosts: the mesh, how arrays are laid out on it, and operations across devices."""
from lm.sharding.axes import (
  check,
  constrain,
  is_on_one_device,
  layout,
  local_rows,
  merge_axes,
  padded_rows,
  parts,
  platform,
  require,
  require_whole_rows,
  row_layout,
  shard_rows,
  spec,
  split_axis,
  store,
  stored_spec,
  whole_rows,
)
from lm.sharding.collectives import (
  exchange_parts,
  insert_rows,
  largest_of_all,
  mark_varying,
  part_index,
  per_device,
  sum_of_parts,
  sum_over_devices,
  take_rows,
  top_k,
)
from lm.sharding.each_stage import custom_vjp
from lm.sharding.host_memory import HOST, abstract_on_host, require_host_memory, to_devices, to_host
from lm.sharding.hosts import join, process_0_first
from lm.sharding.memory_sizes import free_memory, memory_of_host, memory_stats, read_system_file
from lm.sharding.mesh import abstract_mesh, choose_mesh, make_mesh, mesh_text
from lm.sharding.overlap import overlap_options
from lm.sharding.padded_vocabulary import hide_padding, mean_over_vocabulary, vocabulary_of, whole_logits
from lm.sharding.partial import (
  contracted,
  enter,
  gather,
  gradient_spec,
  leave,
  padded_length,
  scale_gradient,
  spread,
  whole,
  zero_gradient,
)
from lm.sharding.pipeline_arrays import idle_shares, number_of_stages, pipeline_groups, pipelined

__all__ = ['check', 'constrain', 'is_on_one_device', 'layout', 'local_rows', 'merge_axes', 'padded_rows', 'parts',
           'platform', 'require', 'require_whole_rows', 'row_layout', 'shard_rows', 'spec', 'split_axis', 'store',
           'stored_spec', 'whole_rows', 'exchange_parts', 'insert_rows', 'largest_of_all', 'mark_varying', 'part_index',
           'sum_of_parts', 'sum_over_devices', 'take_rows', 'top_k', 'HOST', 'abstract_on_host', 'require_host_memory',
           'to_devices', 'to_host', 'join', 'process_0_first', 'abstract_mesh', 'choose_mesh', 'make_mesh', 'mesh_text',
           'overlap_options', 'contracted', 'enter', 'gather', 'gradient_spec', 'leave', 'padded_length', 'spread',
           'scale_gradient', 'whole', 'zero_gradient', 'hide_padding', 'mean_over_vocabulary', 'vocabulary_of',
           'whole_logits', 'per_device', 'custom_vjp', 'idle_shares', 'number_of_stages', 'pipeline_groups',
           'pipelined', 'free_memory', 'memory_of_host', 'memory_stats', 'read_system_file']
