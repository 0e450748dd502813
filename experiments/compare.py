"""Which is better, and is it? Arms (an experiment with other knobs) on the same seeds, with equal compute.

  python experiments/compare.py --arms='adamw: optimizer=adamw lr=3e-3; muon: optimizer=muon lr=0.015' \
      --common='layers=2 width=128 heads=2 vocab=2048 length=256 batch=8 steps=300' --seeds=5

The first arm is the one that the others are compared with. Of each arm: bits per byte of the whole validation text, the
difference by pairs of seeds, the speed-up to the baseline's final loss, and a verdict, all with intervals.
Arms that do not learn to predict the next token are brought to it, all arms alike, by --adapt steps.
"""
import pathlib
from typing import Literal

from lm import launch
from lm.studies import comparison

SCRIPT = pathlib.Path(__file__).with_name('pretrain.py')


def main(*, arms: str, common: str = '', experiment: pathlib.Path = SCRIPT, seeds: int = 5,
         equal: Literal['steps', 'tokens', 'flops', 'seconds'] = 'steps', budget: float | None = None, adapt: int = 0,
         adapt_lr: float = 1e-3,
         workdir: pathlib.Path = pathlib.Path('runs/compare'), mesh: str | None = None) -> None:
  """Compares arms.

  Args:
    arms: the arms, as 'name: knob=value knob=value; other: ...'; knobs are the flags of the experiment.
    common: knobs of all arms.
    experiment: the script whose function `experiment` makes the runs.
    seeds: how many, of each arm the same; more can be added later.
    equal: in what arms are equal, steps, tokens, FLOPs of matrix products, or seconds on this machine.
    budget: how much of it each arm gets; none for what the first arm takes as it is.
    adapt: steps of next-token prediction, and of infilling, after which all arms are scored too; 0 for none.
    adapt_lr: the rate at which these begin.
    workdir: where the runs live; one that was stopped goes on from there.
    mesh: the size of each mesh axis, such as data:4,model:2; none puts all devices on data.
  """
  comparison.compare(arms_text=arms, workdir=workdir, experiment=experiment, common=common, seeds=seeds, equal=equal,
                     budget=budget, adapt=adapt, adapt_lr=adapt_lr, mesh=mesh)


if __name__ == '__main__':
  launch.tool(main)
