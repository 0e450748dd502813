"""A small corpus and a model that is large for it: what helps against overfitting, each remedy by itself.

  python experiments/overfit.py

Losses are told in bits per byte of the same held-out text, which is fair across tokenizers: each is trained on the
documents of its arm. 1.1 M parameters on 16 files (0.2 MB, some 10 epochs), 9 minutes on 2 CPU cores, one seed, best
and last bits per byte: plain 2.611 and 2.656; early stopping 2.611, ended at step 360 of 400; L2 2.573; weight decay
2.546; token dropout 2.521 and still falling; dropout of 0.2 learns too slowly to help in so few steps, 2.690; four
times the data is worth more than all of them, 2.174.
"""
import functools
import pathlib

import jax

from lm import launch, optim, sharding, train
from lm.data import dataset, tokenizers
from lm.data.rows import augment
from lm.data.text import corpora, source
from lm.models import stack, transformer
from lm.objectives.next_token import next_token
from lm.optim import schedules
from lm.studies import runs, variants
from lm.workdir import figures

ARMS = ('plain: ; weight decay: weight_decay=1; L2: l2=1e-3; dropout: dropout=0.2 attention_dropout=0.2; '
        'augmentation: token_dropout=0.15; early stopping: patience=3; 4x data: documents=64')


def experiment(*, documents: int = 16, vocab: int = 1024, length: int = 128, layers: int = 2, width: int = 192,
               heads: int = 4, batch: int = 16, steps: int = 400, lr: float = 3e-3, weight_decay: float = 0.,
               l2: float = 0., dropout: float = 0., attention_dropout: float = 0., stochastic_depth: float = 0.,
               token_dropout: float = 0., subword_sampling: float = 0., patience: int | None = None,
               evaluate_every: int = 20) -> train.Run:
  """Trains on so many files of Python's library, of some 830.

  Args:
    documents: files to train on, 13 kB each on average; all others but the held-out ones are left alone.
    vocab: tokens of the SentencePiece tokenizer.
    length: positions a row.
    batch: rows a step.
    weight_decay: of AdamW, decoupled.
    l2: coefficient of half the sum of squares, a part of the loss, whose gradient Adam divides by its size.
    dropout: of the embedding and of what each branch of a layer adds.
    attention_dropout: of the probabilities of attention.
    stochastic_depth: chance of the last layer to be left out of a row; that of others rises to it.
    token_dropout: share of the tokens that are read of which any token of the vocabulary takes the place.
    subword_sampling: share of the merges that the tokenizer leaves out.
    patience: evaluations in a row that are no better than the best, after which training stops there.
  """
  made = ((augment.SubwordSampling, subword_sampling), (functools.partial(augment.TokenDropout, token=None),
                                                        token_dropout))
  rate = schedules.warmup_cosine(lr, steps, warmup=steps // 20)
  return train.Run(
      model=transformer.llama(vocab, width, layers, heads, max_length=length, dropout=dropout,
                              attention_dropout=attention_dropout,
                              layer_dropout=stack.stochastic_depth(layers, stochastic_depth)),
      objective=next_token(),
      data=dataset.Text(source.sample(corpora.python_library(), documents),
                        functools.partial(tokenizers.train_sentencepiece, vocab=vocab), length),
      optimizer=optim.with_penalty(optim.adamw(rate, weight_decay=weight_decay), l2=l2), steps=steps, batch=batch,
      evaluate_every=evaluate_every, evaluate_batches=10, patience=patience,
      augment=tuple(make(value) for make, value in made if value))


def overfit(*, remedies: str = ARMS, common: str = '', seed: int = 0,
            workdir: pathlib.Path = pathlib.Path('runs/overfit')) -> None:
  """Trains each arm, tells its best and its last validation loss, and draws all of them in `overfit.png`.

  Args:
    remedies: the arms, as for `compare.py`.
    common: knobs of all arms.
    seed: of all runs.
    workdir: where the runs live; what was stopped goes on from there.
  """
  arms, mesh = variants.arms(variants.experiment(pathlib.Path(__file__)), remedies, common), sharding.make_mesh()
  with jax.set_mesh(mesh):
    for arm in arms:   # what does not go together says so before anything runs
      train.check(arm.make(seed), mesh)
    continued = [runs.is_continued(workdir / arm.name, 'arm.json', arm.knobs) for arm in arms]
    runs.open_data(workdir, arms)
  for arm, was in zip(arms, continued):
    if not was:
      runs.begin(workdir / arm.name, 'arm.json', arm.knobs)
  curves = {}
  lines = ['| arm | best bits/byte | at step | last bits/byte |', '|---|---|---|---|']
  for i, arm in enumerate(arms):
    print(f'\n--- run {i + 1} of {len(arms)}: {arm.name}', flush=True)
    _, folder, _ = runs.go(workdir, arm, seed, mesh)
    curves[arm.name] = runs.curve(folder)
    step, best = min(curves[arm.name], key=lambda point: point[1])
    lines.append(f'| {arm.name} | {best:.3f} | {step} | {curves[arm.name][-1][1]:.3f} |')
  print('\n' + '\n'.join(lines))
  figures.lines(workdir / 'overfit.png', {'validation': curves}, 'step', 'bits per byte')
  print(f'\nwritten to {workdir}: overfit.png, and a folder for each run')


if __name__ == '__main__':
  launch.tool(overfit)
