"""Compares Adam, AdamW, RMSprop and Muon, each at its tuned learning rate, on the same seeds with equal FLOPs.

  python experiments/optimizers.py

The rates were tuned with `sweep.py` on a seed that is not among those compared, in factors of two: 2e-3 to 3.2e-2 for
Adam and AdamW, 5e-4 to 8e-3 for RMSprop, 8e-3 to 6.4e-2 for Muon. Results with 5 seeds, 400 steps of 2,048 tokens (375
for Muon, whose update costs FLOPs too), in 7 minutes on 2 CPU cores: AdamW 2.517 bits per byte [2.412, 2.621]. Muon is
better by 0.454 [0.320, 0.588], with a speed-up of 3.5 to AdamW's final loss. Adam (+0.014) and RMSprop (-0.111) are not
distinguishable from AdamW; this would need 384 and 23 seeds.
"""
import pathlib

from lm import launch
from lm.studies import comparison

ARMS = ('adamw: optimizer=adamw lr=4e-3; adam: optimizer=adam lr=8e-3; rmsprop: optimizer=rmsprop lr=4e-3; '
        'muon: optimizer=muon lr=1.6e-2')
COMMON = ('layers=2 width=64 heads=1 vocab=1024 length=128 batch=16 schedule=linear warmup=20 evaluate_every=50 '
          'evaluate_batches=16')


def optimizers(*, arms: str = ARMS, steps: int = 400, seeds: int = 5,
               workdir: pathlib.Path = pathlib.Path('runs/optimizers')) -> None:
  """Compares optimizers on Python's library.

  Args:
    arms: the optimizers and their learning rates, as for `compare.py`; the first is the baseline.
    steps: training steps of the first arm; the others have as many as cost the same FLOPs.
    seeds: number of seeds, the same for each arm; more can be added later.
    workdir: folder of the runs; a stopped comparison continues from there.
  """
  comparison.compare(arms_text=arms, experiment=pathlib.Path(__file__).with_name('pretrain.py'),
                     common=f'{COMMON} steps={steps}', seeds=seeds, equal='flops', workdir=workdir)


if __name__ == '__main__':
  launch.tool(optimizers)
