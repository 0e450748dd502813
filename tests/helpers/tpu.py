"""TPUs for which programs can be compiled, and not run, where libtpu is installed."""
import os
from typing import Any

import jax
import pytest

KIND = jax.sharding.AbstractDevice('TPU v5 lite', 1, 'tpu')   # programs are lowered for it without libtpu


def devices(topology: str) -> Any:
  """Returns the devices of a slice, such as 'v5e:2x2'; skips the test where libtpu is not installed."""
  pytest.importorskip('libtpu')
  from jax.experimental import topologies
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')   # there is no metadata server to ask
  return topologies.get_topology_desc(platform='tpu', topology_name=topology).devices
