"""Searches for the best flags of an experiment, such as its learning rate: on a grid, at random, or by halving.

  python experiments/sweep.py --knobs='lr=1e-3:3e-2:log; batch=8,16' --method=random --trials=8 \
      --common='layers=2 width=128 heads=2 vocab=2048 length=256 steps=200'

Flags of the experiment are called knobs here. Each trial is a run in the workdir; a stopped sweep continues with the
same command. Needs `pip install -e '.[sweep]'`.
"""
import pathlib
from typing import Literal

from lm import launch
from lm.studies import sweep as sweeps

SCRIPT = pathlib.Path(__file__).with_name('pretrain.py')


def sweep(*, knobs: str, common: str = '', experiment: pathlib.Path = SCRIPT,
          method: Literal['grid', 'random', 'halving'] = 'grid', trials: int | None = None,
          metric: Literal['bits_per_byte', 'loss'] = 'bits_per_byte', seed: int = 0,
          workdir: pathlib.Path = pathlib.Path('runs/sweep'), mesh: str | None = None) -> None:
  """Trains an experiment with many settings.

  Args:
    knobs: ranges or lists of values to search, as 'lr=1e-4:1e-2:log; batch=8,16,32'. The first values must be a valid
      combination; a later combination that is not valid has no result.
    common: the other knobs, as 'layers=2 width=128'.
    experiment: script whose function `experiment` makes the runs.
    method: grid tries all combinations of listed values, random tries random points, and halving tries random points
      of which only the best third continues after evaluation 1, 3, 9, and so on.
    trials: number of trials; none for the whole grid, or for 20.
    metric: validation metric to minimise.
    seed: seed of the runs and of the random points.
    workdir: folder of the runs; a stopped sweep continues from there.
    mesh: the size of each mesh axis, such as fsdp:4,tensor:2; none puts all devices on fsdp.
  """
  sweeps.sweep(knobs=knobs, experiment=experiment, workdir=workdir, common=common, method=method, trials=trials,
               metric=metric, seed=seed, mesh=mesh)


if __name__ == '__main__':
  launch.tool(sweep)
