"""Kills a small run with `kill -9` again and again, and compares its end with that of a run that nothing stopped.

  python experiments/chaos.py --kills=200 --places=1x2,2x1 --folder=runs/chaos

Half of the kills are at random times, half at named points: inside a save, between an evaluation and its record, and so
on. After each end, the state has to be that of the whole run, bit for bit, and `metrics.jsonl`, TensorBoard and the
ledger of evaluations have each step once. With --move, each life is at the next place, and the losses have to agree to
--bound. The report is a table in `report.txt`.
"""
import pathlib
import sys
from typing import Any

from lm import launch, optim, train
from lm.data import dataset, tokenizers
from lm.data.text.source import Source
from lm.models import transformer
from lm.objectives.next_token import next_token
from lm.optim import schedules
from lm.studies import chaos, lives
from lm.train import guard

TEXTS = [f'{i} is {"ha" * (i % 17)} and then {i * i}' for i in range(400)]


def small_run(*, steps: int = 24) -> train.Run:
  """Trains a tiny decoder with an average, a spike guard and accumulation.

  Args:
    steps: number of training steps.
  """
  tokens = tokenizers.Bytes()
  data = dataset.Text(Source('counting', {'train': TEXTS[40:], 'validation': TEXTS[:40]}, 'counting'), tokens, 32, ())
  return train.Run(
      transformer.llama(tokens.vocab_size, 16, 1, 2, max_length=32, dropout=0.1), next_token(), data,
      optim.with_average(optim.adamw(schedules.warmup_linear(0.02, steps, 2)), 0.9), steps, 16, accumulate=2,
      guard=guard.Guard(window=8, most=4), evaluate_every=3, evaluate_batches=2, save_every=4)


def main(*, kills: int = 20, places: tuple[str, ...] = ('1x2', '2x1'), move: bool = False, bound: float = 1e-5,
         steps: int = 24, seed: int = 0, folder: pathlib.Path = pathlib.Path('runs/chaos')) -> None:
  """Kills runs and prints a table with a line for each life.

  Args:
    kills: number of kills, which the places share.
    places: where runs live, as processes x devices of each, such as 2x4.
    move: let a run go on at the next place in each life, in place of one run after another at each.
    bound: with --move, the largest relative difference of a loss.
    steps: number of steps of a run.
    seed: fixes the moments.
    folder: a new folder for the workdirs and the report.
  """
  if folder.exists() and any(folder.iterdir()):
    raise ValueError(f'{folder} is not empty; give a new --folder')
  if kills < 1:
    raise ValueError(f'--kills={kills} is not positive; give 1 or more')
  small_run(steps=steps)   # refuses a number of steps that it cannot train
  homes = [lives.Place.parse(text) for text in places]
  folder.mkdir(parents=True, exist_ok=True)
  subject = lives.Subject(small_run, {'steps': steps}, folder.absolute())
  tours = [homes] if move else [[home] for home in homes]
  with (folder / 'report.txt').open('w') as file:
    def report(line: Any) -> None:
      for output in (file, sys.stdout):
        print(line, file=output, flush=True)

    report(chaos.HEADER)
    rows = []
    for i, tour in enumerate(tours):
      share = kills // len(tours) + (i < kills % len(tours))
      for row in chaos.kill(subject, tour, share, seed + i, bound if move else 0.):
        rows.append(row)
        report(row)
    report(f'{chaos.summary(rows)}')
  if any(row.faults for row in rows):
    raise ValueError(f'a run that was killed differs from the whole one; see {folder / "report.txt"}')


if __name__ == '__main__':
  launch.tool(main)
