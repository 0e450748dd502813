"""How long does a checkpoint keep training waiting? Steps are timed without a save, during saves, and at their start.

  python experiments/benchmarks/checkpoint_stall.py --width=1024 --saves=5

The stall of a save is the time until `save` returns (with the fingerprint of the parameters), and what the steps take
longer until the files are on disk. The last line is its share of a minute, for one checkpoint a minute.
"""
import pathlib
import statistics
import tempfile
import time

import interleaved

from lm import launch


def benchmark(*, width: int = 1024, layers: int = 8, saves: int = 5, folder: pathlib.Path | None = None) -> None:
  """Prints a line for each save, and their median.

  Args:
    width: the width of the model.
    layers: its layers.
    saves: number of saves.
    folder: an existing folder on the file system to measure; none for that of temporary files.
  """
  import jax
  import jax.numpy as jnp
  import optax

  from lm.workdir import checkpoint
  from lm.workdir.describe import fingerprint
  if saves < 1:
    raise ValueError(f'--saves={saves} must be 1 or more')
  interleaved.machine('jax', 'orbax-checkpoint')
  optimizer = optax.adam(1e-4)
  shapes = {str(i): (width, 12 * width) for i in range(layers)}   # 12 D^2 parameters, as of a layer of a decoder
  params = {name: jax.random.normal(jax.random.key(i), shapes[name]) for i, name in enumerate(shapes)}
  state = {'params': params, 'opt_state': optimizer.init(params)}
  x = jnp.ones((256, width))

  def loss(params):
    y = x
    for w in params.values():
      y = jnp.tanh(jnp.tanh(y @ w) @ w.T)
    return jnp.mean(jnp.square(y))

  @jax.jit
  def step(state):
    updates, opt_state = optimizer.update(jax.grad(loss)(state['params']), state['opt_state'])
    return {'params': optax.apply_updates(state['params'], updates), 'opt_state': opt_state}

  def seconds(state):
    start = time.perf_counter()
    state = jax.block_until_ready(step(state))
    return state, time.perf_counter() - start

  (state, _), stalls = seconds(state), []
  with tempfile.TemporaryDirectory(dir=folder) as new, checkpoint.Checkpoints(new, keep=1) as checkpoints:
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    for number in range(1, saves + 1):
      alone = []
      for _ in range(10):
        state, duration = seconds(state)
        alone.append(duration)
      normal, during, start = statistics.median(alone), [], time.perf_counter()
      checkpoints.save(number, state, {'parameters': fingerprint(state['params'])})
      waited = time.perf_counter() - start
      while not checkpoints.is_finished():
        state, duration = seconds(state)
        during.append(duration)
      slower = sum(during) - len(during) * normal
      stalls.append(waited + slower)
      print(f'save {number} of {size / 1e6:,.0f} MB: {waited:.3f} s until it returns, and {slower:.3f} s in '
            f'{len(during)} steps of {1000 * normal:.0f} ms until it is on disk', flush=True)
  median = statistics.median(stalls)
  print(f'stall of a checkpoint: {median:.3f} s, {median / 0.6:.2f} % of a minute (median of {saves})')


if __name__ == '__main__':
  launch.tool(benchmark)
