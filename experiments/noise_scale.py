"""Which batch size is efficient for a run? Measures its gradient noise scale (McCandlish et al. 2018).

  python experiments/noise_scale.py --workdir=runs/quickstart --batches=64

Batches much smaller than the noise scale waste no tokens; batches much larger than it save hardly any steps. The noise
scale rises during training.
"""
import pathlib
import time

import jax

from lm import launch, load, sharding
from lm.train import noise_scale


def main(*, workdir: pathlib.Path = pathlib.Path('runs/quickstart'), batches: int = 64, rows: int | None = None,
         best: bool = False, mesh: str | None = None) -> None:
  """Prints the noise scale of the newest checkpoint, on the training text that follows it.

  Args:
    workdir: workdir of the run.
    batches: number of gradients that are compared; each is computed twice.
    rows: rows in a batch; none for as many as in the run.
    best: use the best checkpoint by the metric of the run, mostly the validation loss, instead of the newest.
    mesh: the size of each mesh axis, such as fsdp:4,tensor:2; none puts all devices on fsdp.
  """
  if batches < 3:
    raise ValueError(f'--batches={batches} is too few for an interval; give 3 or more')
  with jax.set_mesh(devices := sharding.make_mesh(mesh)):
    loaded = load.open_trained(workdir, best)
    run, rows = loaded.run, loaded.run.batch if rows is None else rows
    if rows < 1 or rows % sharding.parts('B'):
      raise ValueError(f'--rows={rows} is not a multiple of {sharding.parts("B")}, the parts of a batch on the mesh '
                       f'{sharding.mesh_text(devices)}; give another number of rows')
    data = loaded.open_data(run.objective.control)
    read, first = data.batches('train', run.objective, rows, run.seed), run.schedule.rows_before(loaded.step) // rows
    names = jax.eval_shape(loaded.model.init, jax.random.key(0))
    constants = {name: value for name, value in loaded.params.items() if name not in names}
    gradient = noise_scale.gradient_of(loaded.model.apply, run.objective, constants)
    start = last_print = time.monotonic()

    def progress(count: int) -> None:
      nonlocal last_print
      if count == 1 or time.monotonic() - last_print > 15 or count == 2 * batches:
        last_print = time.monotonic()
        print(f'{count} of {2 * batches} gradients, {last_print - start:.0f} s', flush=True)

    estimate = noise_scale.noise_scale(
        gradient, {name: loaded.params[name] for name in names},
        lambda i: sharding.shard_rows(read(first + i, sharding.local_rows(rows, devices)), devices), batches, progress)
  print(f'step {loaded.step}: noise scale {estimate.tokens:,.0f} tokens (95 %: {estimate.low:,.0f} '
        f'to {estimate.high:,.0f}); rows of {run.data.length} tokens: {estimate.tokens / run.data.length:,.1f}; '
        f'a batch of the run: {run.batch * run.data.length:,} tokens')
  print(f'|G|^2 {estimate.gradient:.3g}  tr(Sigma) {estimate.noise:.3g} for one token')


if __name__ == '__main__':
  launch.tool(main)
