"""What helps against overfitting? Trains a model on a corpus that is too small for it, with one remedy at a time.

  python experiments/overfit.py

Each arm trains a tokenizer on its own documents; bits per byte of the same held-out text are comparable across
tokenizers. Results for 1.1 M parameters on 16 files (0.2 MB, about 10 epochs), one seed, 9 minutes on 2 CPU cores, best
bits per byte: plain 2.611 (2.656 at the end); early stopping 2.611, stopped at step 360; L2 2.573; weight decay 2.546;
token dropout 2.521, still falling; dropout of 0.2 learns too slowly to help in so few steps, 2.690. Four times the data
helps more than all of them, 2.174.
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
  """Trains on some files of Python's library, which has about 830.

  Args:
    documents: number of files to train on, 13 kB each on average; of the others, only the held-out ones are used.
    vocab: number of tokens of the SentencePiece tokenizer.
    length: positions in a row.
    layers: number of layers.
    width: size of the residual stream.
    heads: number of heads of attention.
    batch: rows in a batch.
    steps: number of training steps.
    lr: highest learning rate.
    weight_decay: coefficient of decoupled weight decay.
    l2: coefficient of a penalty on half the sum of squares, which is a part of the loss.
    dropout: dropout rate of the embedding, and of the output of attention and of feed-forward in each layer.
    attention_dropout: dropout rate of the attention probabilities.
    stochastic_depth: probability that the last layer is skipped for a row; it rises linearly from the first layer.
    token_dropout: share of the input tokens that are replaced by random tokens.
    subword_sampling: share of the merges that the tokenizer skips.
    patience: training stops after this many evaluations in a row without a new best; none for never.
    evaluate_every: steps between evaluations.
  """
  rates = ((augment.SubwordSampling, subword_sampling),
           (functools.partial(augment.TokenDropout, token=None), token_dropout))
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
      augment=tuple(augmentation(value) for augmentation, value in rates if value))


def overfit(*, remedies: str = ARMS, common: str = '', seed: int = 0,
            workdir: pathlib.Path = pathlib.Path('runs/overfit')) -> None:
  """Trains each arm, prints its best and its last validation loss, and draws the curves in `overfit.png`.

  Args:
    remedies: the arms, as for `compare.py`.
    common: knobs of all arms.
    seed: seed of all runs.
    workdir: folder of the runs; a stopped study continues from there.
  """
  arms, mesh = variants.arms(variants.experiment(pathlib.Path(__file__)), remedies, common), sharding.make_mesh()
  with jax.set_mesh(mesh):
    for arm in arms:   # contradictory flags raise an error before any run begins
      train.check(arm.make(seed), mesh)
    continued = [runs.is_continued(workdir / arm.name, 'arm.json', arm.knobs) for arm in arms]
    runs.open_data(workdir, arms)
  for arm, is_continued in zip(arms, continued):
    if not is_continued:
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
