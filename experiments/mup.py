"""Does the best learning rate hold over width and depth? One run of a sweep, with muP or the standard parametrisation.

  for lr in 1e-3 2e-3 4e-3 8e-3; do for width in 64 128 256 512; do
    python experiments/mup.py --width=$width --lr=$lr --parametrisation=mup --workdir=runs/mup/$width-$lr; done; done
"""
import functools
from typing import Literal

from lm import groups, launch, optim, schedules, train
from lm.data import corpora, dataset, tokenizer
from lm.models import mup, transformer
from lm.objectives.next_token import next_token


def experiment(*, parametrisation: Literal['mup', 'standard'] = 'mup', width: int = 64, layers: int = 2,
               head_size: int = 32, base_width: int = 64, base_layers: int = 2, lr: float = 4e-3,
               embedding_rate: float = 10., weight_decay: float = 0.1, vocab: int = 2048, length: int = 128,
               steps: int = 500, warmup: int = 50, batch: int = 16, evaluate_every: int = 250) -> train.Run:
  """Trains a decoder on Python's library.

  Args:
    parametrisation: of muP, or of `transformer.llama` untied, which are alike at the base shape.
    head_size: of attention; there are as many heads as the width has room for.
    base_width: for which --lr is meant.
    embedding_rate: of the embedding with muP, whose entries are fifty times as large, times --lr.
  """
  if width % head_size:
    raise ValueError(f'--width={width} is not a multiple of --head_size={head_size}')
  shape = {'vocab': vocab, 'width': width, 'layers': layers, 'heads': width // head_size, 'max_length': length}
  rate = schedules.warmup_linear(lr, steps, warmup)
  if parametrisation == 'mup':
    base = {'base_width': base_width, 'base_layers': base_layers}
    model = mup.llama(**shape, **base)
    rate = groups.Rates(rate, updates=(('embedding', embedding_rate), *mup.rates(width, layers, **base)))
  else:
    model = transformer.llama(**shape, tied=False)
  return train.Run(
      model=model, objective=next_token(),
      data=dataset.Text(corpora.python_library(), functools.partial(tokenizer.train_sentencepiece, vocab=vocab),
                        length),
      optimizer=optim.adamw(rate, weight_decay, eps=1e-12), steps=steps, batch=batch, evaluate_every=evaluate_every)


if __name__ == '__main__':
  launch.run(experiment)
