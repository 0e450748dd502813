"""Processes, often on several hosts, that train together."""
import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


@contextlib.contextmanager
def process_0_first(what: str) -> Iterator[None]:
  """Runs a block in process 0 before the others run it, so that they find its files where they share a disk.

  `what` names the block; all processes give the same name.
  """
  if jax.process_index() > 0:
    multihost_utils.sync_global_devices(what)
  try:
    yield
  finally:   # also after an error, which the other processes then raise too, instead of waiting for ever
    if jax.process_index() == 0:
      multihost_utils.sync_global_devices(what)


def from_process_0(value: Any) -> Any:
  """Returns the value of process 0, which JSON can hold, in all processes; all of them must call it.

  So they decide alike even where their clocks or the files on their disks differ.
  """
  if jax.process_count() == 1:
    return value
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(data, size))))


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Joins the cluster that the flags name, or else the one that JAX detects; does nothing where there is none.

  Raises ValueError where only some of the flags are given.
  """
  flags = (coordinator_address, num_processes, process_id)
  if any(value is not None for value in flags):
    if None in flags:
      raise ValueError('only some of --coordinator_address, --num_processes and --process_id are given; give all '
                       'three or none')
    jax.distributed.initialize(*flags, cluster_detection_method='deactivate')
  elif any(int(os.environ.get(name, 1)) > 1 for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')):
    jax.distributed.initialize()
  elif os.environ.get('TPU_ML_PLATFORM') == 'JAX' and 'TPU_SKIP_MDS_QUERY' not in os.environ:
    # JAX sets the first on a Cloud TPU host. The second is set where no metadata server can be asked.
    with contextlib.suppress(ValueError):  # a TPU that is in no cluster has no coordinator address
      jax.distributed.initialize()
