"""Search over the knobs of an experiment, learning rate and batch size first: a grid, at random, or by halving.

  python experiments/sweep.py --knobs='lr=1e-3:3e-2:log; batch=8,16' --method=random --trials=8 \
      --common='layers=2 width=128 heads=2 vocab=2048 length=256 steps=200'

Each trial is a run of its own in the workdir; a sweep that was stopped goes on. Needs `pip install -e '.[sweep]'`.
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
  """Trains an experiment with many knobs.

  Args:
    knobs: what is searched, as 'lr=1e-4:1e-2:log; batch=8,16,32', ranges or lists; the first values of all have to go
      together, other combinations that do not have no result.
    common: the other knobs, as 'layers=2 width=128'.
    experiment: the script whose function `experiment` makes the runs.
    method: all combinations of listed values, points at random, or points at random of which only the best third goes
      on at evaluation 1, 3, 9, and so on.
    trials: how many; none for the whole grid, or 20.
    metric: of the validation split, what is to be low.
    seed: of the runs, and of the points.
    workdir: where the runs live; one that was stopped goes on from there.
    mesh: the size of each mesh axis, such as data:4,model:2; none puts all devices on data.
  """
  sweeps.sweep(knobs=knobs, experiment=experiment, workdir=workdir, common=common, method=method, trials=trials,
               metric=metric, seed=seed, mesh=mesh)


if __name__ == '__main__':
  launch.tool(sweep)
