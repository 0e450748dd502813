"""Many hosts as one."""
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
  """Lets process 0 run a block before the others, which then find what it made, where they share its disk."""
  if jax.process_index() > 0:
    multihost_utils.sync_global_devices(what)
  try:
    yield
  finally:   # also after an error: the others come to the same one, rather than wait
    if jax.process_index() == 0:
      multihost_utils.sync_global_devices(what)


def agreed(value: Any) -> Any:
  """The value (JSON) of process 0, in all processes, which all call it: also where their disks hold other files."""
  if jax.process_count() == 1:
    return value
  data = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
  return json.loads(bytes(multihost_utils.broadcast_one_to_all(np.resize(data, size))))


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Joins the cluster that the flags name, or that JAX detects; does nothing on a machine by itself."""
  given = (coordinator_address, num_processes, process_id)
  if any(value is not None for value in given):
    if None in given:
      raise ValueError('--coordinator_address, --num_processes and --process_id are given together or not at all')
    jax.distributed.initialize(*given, cluster_detection_method='deactivate')
  elif any(int(os.environ.get(name, 1)) > 1 for name in ('SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE')):
    jax.distributed.initialize()
  elif os.environ.get('TPU_ML_PLATFORM') == 'JAX' and 'TPU_SKIP_MDS_QUERY' not in os.environ:
    # JAX sets the first on a Cloud TPU host; the second says that there is no metadata server to ask.
    with contextlib.suppress(ValueError):  # a TPU without a cluster around it: no coordinator address
      jax.distributed.initialize()
