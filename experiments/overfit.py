"""A small corpus and a model that is large for it: what helps against overfitting, one flag at a time.

  python experiments/overfit.py --workdir=runs/overfit-plain
  python experiments/overfit.py --workdir=runs/overfit-dropout --dropout=0.2 --attention_dropout=0.2

Other arms: --weight_decay=1, --stochastic_depth=0.3, --token_dropout=0.1, --subword_sampling=0.1, --documents=160.
Compare in bits per byte, which is fair across tokenizers: each is trained on the documents of its arm.
"""
import functools
import pathlib

from lm import launch, optim, plot, schedules, track, train
from lm.data import augment, corpora, dataset, source, tokenizer
from lm.models import stack, transformer
from lm.objectives.next_token import next_token


def experiment(*, documents: int = 16, vocab: int = 1024, length: int = 256, layers: int = 4, width: int = 256,
               heads: int = 4, batch: int = 16, steps: int = 600, lr: float = 1e-3, weight_decay: float = 0.,
               dropout: float = 0., attention_dropout: float = 0., stochastic_depth: float = 0.,
               token_dropout: float = 0., subword_sampling: float = 0., evaluate_every: int = 25) -> train.Run:
  """Trains on so many files of Python's library, of some 830.

  Args:
    documents: files to train on, 13 kB each on average; all others but the held-out ones are left alone.
    vocab: tokens of the SentencePiece tokenizer.
    length: positions a row.
    batch: rows a step.
    weight_decay: of AdamW.
    dropout: of the embedding and of what each branch of a layer adds.
    attention_dropout: of the probabilities of attention.
    stochastic_depth: chance of the last layer to be left out of a row; that of others rises to it.
    token_dropout: share of the tokens that are read of which any token of the vocabulary takes the place.
    subword_sampling: share of the merges that the tokenizer leaves out.
  """
  made = ((augment.SubwordSampling, subword_sampling), (functools.partial(augment.TokenDropout, token=None),
                                                        token_dropout))
  return train.Run(
      model=transformer.llama(vocab, width, layers, heads, max_length=length, dropout=dropout,
                              attention_dropout=attention_dropout,
                              layer_dropout=stack.stochastic_depth(layers, stochastic_depth)),
      objective=next_token(),
      data=dataset.Text(source.sample(corpora.python_library(), documents),
                        functools.partial(tokenizer.train_sentencepiece, vocab=vocab), length),
      optimizer=optim.adamw(schedules.warmup_cosine(lr, steps, warmup=steps // 20), weight_decay=weight_decay),
      steps=steps, batch=batch, evaluate_every=evaluate_every, evaluate_batches=10,
      augment=tuple(make(value) for make, value in made if value))


def report(run: train.Run, workdir: pathlib.Path, result: train.Result) -> None:
  """Prints where validation was best, and what more steps made of it; draws the curve."""
  rows = track.read_metrics(workdir / 'metrics.jsonl')
  bits = {row['step']: row['validation/bits_per_byte'] for row in rows if 'validation/bits_per_byte' in row}
  if not result.finished or not bits:
    return
  best, last = min(bits, key=bits.get), max(bits)
  train_batches = result.data.batches('train', run.objective, run.batch, run.seed)
  epochs = run.steps * run.batch / train_batches.rows_per_epoch
  print(f'bits per byte of the held-out text: best {bits[best]:.3f} at step {best}, then {bits[last]:.3f} at step '
        f'{last}; {epochs:.1f} epochs')
  plot.curve(workdir / 'metrics.jsonl', workdir / 'curve.png')


if __name__ == '__main__':
  launch.run(experiment, report)
