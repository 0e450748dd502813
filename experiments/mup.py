"""Is the best learning rate the same at all widths? With muP, and with the standard parametrisation.

  python experiments/mup.py

A model is trained at each width and rate on Python's library, for 100 steps of 1,024 tokens, with one seed;
differences below 0.05 bits per byte are noise. This takes 16 minutes on 2 CPU cores. With muP, the curves of widths 64
to 512 lie within 0.03 bits per byte of each other up to a rate of 4e-3, and have their minimum at 1.6e-2 (64, 256) or
3.2e-2 (128, 512). At width 512, the best rate of width 64 loses 0.07. With the standard parametrisation, the best rate
falls from 1.6e-2 at width 64 to 4e-3 at width 512, where the best rate of width 64 loses 0.24.
"""
import functools
import math
import pathlib
from typing import Literal

from lm import launch, optim, train
from lm.data import dataset, tokenizers
from lm.data.text import corpora
from lm.models import mup, transformer
from lm.objectives.next_token import next_token
from lm.optim import groups, schedules
from lm.studies import sweep
from lm.workdir import figures


def experiment(*, parametrisation: Literal['mup', 'standard'] = 'mup', width: int = 64, layers: int = 2,
               head_size: int = 32, base_width: int = 64, base_layers: int = 2, lr: float = 4e-3,
               embedding_rate: float = 10., weight_decay: float = 0.1, vocab: int = 2048, length: int = 128,
               steps: int = 100, batch: int = 8) -> train.Run:
  """Trains a decoder on Python's library.

  Args:
    parametrisation: muP, or that of `transformer.llama` untied; they are equal at the base shape.
    width: size of the residual stream.
    layers: number of layers.
    head_size: size of each head; the number of heads is the width divided by it.
    base_width: width at which --lr was tuned.
    base_layers: number of layers at which --lr was tuned.
    lr: learning rate.
    embedding_rate: factor of the learning rate for the embedding with muP, whose entries are fifty times as large.
    weight_decay: coefficient of decoupled weight decay.
    vocab: number of tokens of the SentencePiece tokenizer.
    length: positions in a row.
    steps: number of training steps.
    batch: rows in a batch.
  """
  if width % head_size:
    raise ValueError(f'--width={width} is not a multiple of --head_size={head_size}; give a width that is')
  shape = {'vocab': vocab, 'width': width, 'layers': layers, 'heads': width // head_size, 'max_length': length}
  rate = schedules.warmup_linear(lr, steps, warmup=steps // 10)
  if parametrisation == 'mup':
    base = {'base_width': base_width, 'base_layers': base_layers}
    model = mup.parametrised(transformer.llama(**shape), **base)
    rate = groups.Rates(rate, updates=(('embedding', embedding_rate), *mup.rates(width, layers, **base)))
  else:
    model = transformer.llama(**shape, tied=False)
  return train.Run(
      model=model, objective=next_token(),
      data=dataset.Text(corpora.python_library(), functools.partial(tokenizers.train_sentencepiece, vocab=vocab),
                        length),
      optimizer=optim.adamw(rate, weight_decay, eps=1e-12), steps=steps, batch=batch,
      evaluate_every=steps, save_every=steps)


def transfer(*, widths: tuple[int, ...] = (64, 128, 256, 512),
             lrs: tuple[float, ...] = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2), steps: int = 100,
             workdir: pathlib.Path = pathlib.Path('runs/mup')) -> None:
  """Trains at each width and rate, prints the best rates, and draws `mup.png`.

  Args:
    widths: widths of the models; the first is the base width of muP.
    lrs: learning rates, each of which is tried at each width.
    steps: training steps of each run.
    workdir: folder of the runs; a stopped study continues from there.
  """
  panels, lines = {}, ['| width | muP | standard |', '|---|---|---|']
  for name in ('mup', 'standard'):
    trials = sweep.sweep(knobs=f'width={",".join(map(str, widths))}; lr={",".join(map(repr, lrs))}',
                         experiment=pathlib.Path(__file__), workdir=workdir / name,
                         common=f'parametrisation={name} base_width={widths[0]} steps={steps}')
    panels[name] = {f'width {width}': sorted((float(t.knobs['lr']), t.value) for t in trials
                                             if t.knobs['width'] == str(width) and math.isfinite(t.value))
                    for width in widths}
  for width in widths:
    best = [min(panels[name][f'width {width}'], key=lambda point: point[1]) for name in panels]
    lines.append(f'| {width} | ' + ' | '.join(f'{lr:g} ({loss:.3f} bits/byte)' for lr, loss in best) + ' |')
  print('\nthe best learning rate\n\n' + '\n'.join(lines))
  figures.lines(workdir / 'mup.png', panels, 'learning rate', 'validation bits per byte', log=True)
  print(f'\nwritten to {workdir}: mup.png, and a folder for each run')


if __name__ == '__main__':
  launch.tool(transfer)
