"""What does a mesh cost the host? The time in which a step is started, and the time of a step without a mesh.

  python experiments/benchmarks/mesh_costs.py

The first line is the time until the batch is on the devices and the call of the step has returned, while the devices
still compute. The second compares a mesh of one device with no mesh, in turns.
"""
import statistics
import time
from collections.abc import Callable
from typing import Any

import interleaved

from lm import launch


def benchmark(*, steps: int = 50, width: int = 64, layers: int = 2, length: int = 64, batch: int = 8) -> None:
  """Prints a line for each measurement.

  Args:
    steps: the steps of each measurement.
    width: the width of the model.
    layers: its layers.
    length: the positions in a row.
    batch: the rows in a batch.
  """
  import contextlib

  import jax
  import numpy as np

  from lm import optim, sharding, train
  from lm.data import dataset, tokenizers
  from lm.data.batch import Batch
  from lm.data.text import corpora
  from lm.models import transformer
  from lm.objectives.next_token import next_token
  interleaved.machine('jax')
  run = train.Run(transformer.llama(272, width, layers, 4, max_length=length), next_token(),
                  dataset.Text(corpora.python_library(), tokenizers.Bytes, length),
                  optim.adamw(lambda step: 1e-3), steps, batch)
  tokens = np.random.default_rng(0).integers(0, 256, (batch, length)).astype(np.int32)
  rows = Batch(tokens, tokens, np.ones(tokens.shape, np.float32))

  def stepper(mesh: Any) -> Callable[[], tuple[float, float]]:
    """Returns a function that makes a step and returns the seconds until it is started, and until it is done."""
    state, step = None, train.make_step(run)
    mesh_set = lambda: contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with mesh_set():
      state = jax.jit(lambda: train.init(run))()

    def advance():
      nonlocal state
      with mesh_set():
        start = time.perf_counter()
        state, _ = step(state, rows if mesh is None else sharding.shard_rows(rows, mesh), {})
        started = time.perf_counter()
        jax.block_until_ready(state)
      return started - start, time.perf_counter() - start

    advance()
    return advance

  whole = stepper(sharding.make_mesh())
  started = statistics.median(whole()[0] for _ in range(steps))
  print(f'{jax.device_count()} devices: a step is started in {1000 * started:.2f} ms')
  alone, one = stepper(None), stepper(sharding.make_mesh('fsdp:1', jax.devices()[:1]))
  pairs = [(alone()[1], one()[1]) for _ in range(steps)]
  ratio = statistics.median(b / a for a, b in pairs)
  without = statistics.median(a for a, _ in pairs)
  print(f'no mesh: {1000 * without:.2f} ms a step; a mesh of one device: {ratio:.3f} times')


if __name__ == '__main__':
  launch.tool(benchmark)
