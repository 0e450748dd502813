"""Adam, AdamW, RMSprop and Muon, each at its tuned rate, on the same seeds with equal FLOPs.

  python experiments/optimizers.py

The rates were found with `sweep.py`, on another seed than those that are compared: 2e-3 to 3.2e-2 for Adam and AdamW,
5e-4 to 8e-3 for RMSprop, 8e-3 to 6.4e-2 for Muon, by factors of two. In 7 minutes on 2 CPU cores (400 steps of 2,048
tokens; Muon 375, since its update costs FLOPs too), 5 seeds: AdamW 2.517 bits per byte [2.412, 2.621]; Muon better by
0.454 [0.320, 0.588], with a speed-up of 3.5 to AdamW's final loss; Adam (+0.014) and RMSprop (-0.111) not
distinguishable from AdamW, which would need 384 and 23 seeds.
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
    arms: the optimizers and their rates, as for `compare.py`; the first is what the others are compared with.
    steps: of the first arm; the others get as many as cost the same FLOPs.
    seeds: of each arm the same; more can be added later.
    workdir: where the runs live; a comparison that was stopped goes on from there.
  """
  comparison.compare(arms_text=arms, experiment=pathlib.Path(__file__).with_name('pretrain.py'),
                     common=f'{COMMON} steps={steps}', seeds=seeds, equal='flops', workdir=workdir)


if __name__ == '__main__':
  launch.tool(optimizers)
