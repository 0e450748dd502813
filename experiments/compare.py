"""Which setting is better, and is the difference real? Compares arms on the same seeds, with equal compute.

  python experiments/compare.py --arms='adamw: optimizer=adamw lr=3e-3; muon: optimizer=muon lr=0.015' \
      --common='layers=2 width=128 heads=2 vocab=2048 length=256 batch=8 steps=300' --seeds=5

An arm is an experiment with some flags, here called knobs. The first arm is the baseline. The table shows for each arm
the bits per byte of the whole validation text, the paired difference to the baseline, the speed-up to the baseline's
final loss, all with intervals over seeds, and a verdict. If an arm has another objective than next-token prediction,
--adapt first fine-tunes all arms on next tokens for the same number of steps.
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
    arms: the arms, as 'name: knob=value knob=value; other name: ...'; knobs are flags of the experiment.
    common: knobs of all arms.
    experiment: script whose function `experiment` makes the runs.
    seeds: number of seeds, the same for each arm; more can be added later.
    equal: the quantity that is equal for all arms, of which flops counts matrix products, and seconds are those of this
      machine.
    budget: amount of this quantity for each arm; none for the amount that the first arm needs.
    adapt: steps of fine-tuning on next-token prediction, and on infilling, after which all arms are scored too; 0 for
      none.
    adapt_lr: initial learning rate of this fine-tuning.
    workdir: folder of the runs; a stopped comparison continues from there.
    mesh: the size of each mesh axis, such as fsdp:4,tensor:2; none puts all devices on fsdp.
  """
  comparison.compare(arms_text=arms, workdir=workdir, experiment=experiment, common=common, seeds=seeds, equal=equal,
                     budget=budget, adapt=adapt, adapt_lr=adapt_lr, mesh=mesh)


if __name__ == '__main__':
  launch.tool(main)
