"""Trains a small T5, or BERT, to fill in hidden parts of a text, in minutes on two CPU cores.

  python experiments/denoise.py
  python experiments/denoise.py --objective=ul2
  python experiments/denoise.py --objective=masked
  python experiments/denoise.py --model=google-t5/t5-small --init=google-t5/t5-small --lr=1e-3

Results of --steps=500 (1 million source positions), on held-out text of the same library, 2 cores of a busy host, JAX
0.10.2. T5: 4.77 nats a target, 23.1% of targets right (including sentinels), 1 of 320 spans exactly right, 1,350 s.
BERT: 6.18 nats a target, 9.4% of masked tokens right, 489 s. After so few steps, both have learned little more than
which tokens are frequent. They need more steps than next-token prediction, which learns from every token.
"""
import dataclasses
import functools
import math
import pathlib
from typing import Literal

import numpy as np

from lm import launch, load, named, options, train
from lm.data import dataset, tokenizers
from lm.evaluate import filled_text
from lm.models import encoder, encoder_decoder
from lm.objectives import span_corruption
from lm.objectives.masked import masked
from lm.objectives.objective import Objective
from lm.objectives.ul2 import ul2
from lm.train import validation

SNIPPETS, SIZE = 64, 96   # number of held-out snippets to fill in, and tokens of each


def make_objective(name: str, tokens: tokenizers.Tokenizer | None, length: int) -> Objective:
  """Returns the objective, with the control tokens of an existing tokenizer, or with ours."""
  names_in_tokenizer = tokens.control_names if tokens else tokenizers.CONTROL
  if name == 'masked':
    masks = [mask for mask in ('[MASK]', '<mask>') if mask in names_in_tokenizer]
    return masked(mask=masks[0] if masks else '<|mask|>')
  extra = tuple(f'<extra_id_{i}>' for i in range(100)) if '<extra_id_0>' in names_in_tokenizer else ()
  if name == 'ul2':   # the tokenizer of T5 has no tokens for modes; its last sentinels are used
    names = {'sentinels': extra[:-3], 'modes': extra[-3:]} if extra else {
        'sentinels': tokenizers.sentinels(max(32, length // 4 + 1))}
    return ul2(layout=span_corruption.ENCODER_DECODER, **names)
  return span_corruption.span_corruption(sentinels=extra or tokenizers.sentinels(max(32, length // 16)))


def experiment(*, objective: Literal['span_corruption', 'ul2', 'masked'] = 'span_corruption',
               model: str | None = None, corpus: options.Corpus = options.Corpus(), vocab: int = 2048,
               length: int = 256, layers: int = 2, width: int = 128,
               heads: int = 2, optimizer: options.Optimizer = dataclasses.replace(options.MUON, lr=0.01),
               budget: options.Budget = options.Budget(), batch: int = 8,
               computation: options.Computation = options.Computation(),
               cadence: options.Cadence = options.Cadence(evaluate_batches=4)) -> train.Run | train.Pending:
  """Trains a small encoder-decoder; for the objective masked, an encoder.

  Most runs set: objective, model, text, init, workdir, minutes, steps, vocab, length, layers, width, heads, batch, lr.

  Args:
    objective: training objective.
    model: use the shape and the tokenizer of this model, a T5 (for masked a BERT) or a run's workdir. The parameters
      are new, unless --init is given too.
    vocab: number of tokens of the SentencePiece tokenizer.
    length: number of positions that the encoder reads.
    layers: number of layers of the encoder, and of the decoder.
    width: size of the residual stream.
    heads: number of heads of attention.
    batch: rows in a batch.
    warmup: steps of linear warm-up; none for a thirtieth of all steps.
  """
  masks, text = objective == 'masked', corpus.source()
  update = optimizer.make(budget.count, warmup=budget.count // 30)

  def build(base: load.BaseModel | None) -> train.Run:
    if base:
      network = base.model
    elif masks:
      network = encoder.bert(vocab, width, layers, heads, length)
    else:
      network = encoder_decoder.t5(vocab, width, layers, heads, width // heads, 4 * width, gated=True, tied=False)
    goal = make_objective(objective, base.tokenizer if base else None, length)
    names = [name for name in goal.control if name not in tokenizers.CONTROL]
    new = functools.partial(tokenizers.train_sentencepiece, vocab=vocab, control=(*tokenizers.CONTROL, *names))
    # The decoder has as many positions as the targets of a full row of the source can need.
    rooms = [] if masks else [form.room for form in goal.forms]
    targets = [math.ceil(r.ratio * (length - r.source_extra) / r.source_ratio + r.extra) for r in rooms]
    data = dataset.Text(text, base.tokenizer if base else new, max(targets, default=length),
                        source_length=None if masks else length)
    run = train.Run(model=computation.apply(network), objective=goal, data=data, optimizer=update,
                    steps=budget.count, batch=batch, minutes=budget.limit)
    return cadence.apply(computation.apply_to_steps(run))
  origin = named.encoder if masks else named.encoder_decoder
  return train.after_opening(build, base=origin('--model', model) if model else None)


def report(run: train.Run, workdir: pathlib.Path, result: train.Result) -> None:
  """Prints the loss on held-out text, and snippets of it that the model fills in."""
  data, rng = result.data, np.random.default_rng(0)
  step = validation.make_step(run.model.apply, run.objective, data.tokenizer)
  held_out = data.batches('validation', run.objective, run.batch, seed=0, repeat=False)
  metrics = validation.evaluate(step, result.params, held_out, result.mesh)
  documents = data.stores['validation']
  large = [i for i in range(len(documents)) if len(documents[i]) > SIZE]
  if large:
    starts = [(i, int(rng.integers(len(documents[i]) - SIZE))) for i in rng.choice(large, SNIPPETS).tolist()]
    snippets = np.stack([np.asarray(documents[i][start:start + SIZE], np.int32) for i, start in starts])
    fill = filled_text.fill_masks if isinstance(run.model, encoder.Encoder) else filled_text.fill_spans
    fill(run, result, snippets)
  print(f'\nheld-out text: {metrics["nll"]:.3f} nats a target, {metrics["accuracy"]:.1%} of targets right, '
        f'in {run.steps} steps of {run.batch} rows; seconds: '
        + ', '.join(f'{name} {seconds:.0f}' for name, seconds in result.phases.items()) + f'; written to {workdir}')


if __name__ == '__main__':
  launch.run(experiment, report)
