"""Draws the learning rate of each schedule of pretrain.py, with the same flags.

  python experiments/schedules.py --only=stable_decay --steps=20_000 --warmup=500 --cooldown=4000
"""
import pathlib
import typing

from lm import launch, options
from lm.options.optimisation import ScheduleName


def main(*, only: list[ScheduleName] = (), lr: float = 1e-3, steps: int = 2000, warmup: int = 100,
         cooldown: int | None = None, milestones: tuple[int, ...] = (), drop: float = 0.1,
         png: pathlib.Path = pathlib.Path('schedules.png')) -> None:
  """Writes a picture.

  Args:
    only: schedules to draw; by default all.
    lr: highest learning rate.
    steps: number of training steps.
    warmup: steps of linear warm-up.
    cooldown: number of final steps in which the rate of stable_decay and one_cycle falls; none for a fifth of all
      steps.
    milestones: steps at which the rate is lowered in the schedule steps; by default at a half and at three quarters of
      all steps.
    drop: factor of the rate at each milestone.
    png: file of the picture.
  """
  import jax

  from lm.workdir import figures
  milestones = milestones or (steps // 2, steps * 3 // 4)
  rates = {}
  for name in only or typing.get_args(ScheduleName):
    falls = {'milestones': milestones, 'drop': drop} if name == 'steps' else {}
    ends = {'cooldown': cooldown} if name in ('stable_decay', 'one_cycle') else {}
    rates[name] = jax.jit(options.Optimizer(schedule=name, lr=lr, **falls, **ends).rate(steps, warmup))
  figures.schedule(rates, steps, png)


if __name__ == '__main__':
  launch.tool(main)
