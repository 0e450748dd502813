"""Trains a small language model on Python's own library, in minutes on two CPU cores.

  python experiments/quickstart.py
"""
import functools
import pathlib

from lm import generate, launch, optim, options, train
from lm.data import dataset, tokenizers
from lm.data.text import corpora
from lm.evaluate import compression
from lm.launch import outcome
from lm.models import transformer
from lm.objectives.next_token import next_token
from lm.optim import schedules
from lm.train import validation

PROMPTS = ('def ', 'class ', 'import ', '"""Return ')


def experiment(*, budget: options.Budget = options.Budget(minutes=3.), vocab: int = 2048, length: int = 256,
               layers: int = 2, width: int = 128, heads: int = 2, batch: int = 8, lr: float = 0.015,
               embedding_rate: float = 4., cadence: options.Cadence = options.Cadence(evaluate_batches=4)) -> train.Run:
  """Trains a small decoder.

  Args:
    vocab: number of tokens of the SentencePiece tokenizer.
    length: positions in a row.
    layers: number of layers.
    width: size of the residual stream.
    heads: number of heads of attention.
    batch: rows in a batch.
    lr: learning rate of the matrices, which Muon trains.
    embedding_rate: factor of the learning rate for all other parameters.
  """
  steps = budget.count
  schedule = schedules.warmup_linear(lr, steps, warmup=steps // 30)
  run = train.Run(
      model=transformer.llama(vocab, width, layers, heads, max_length=length),
      objective=next_token(),
      data=dataset.Text(corpora.python_library(),
                        functools.partial(tokenizers.train_sentencepiece, vocab=vocab), length),
      optimizer=optim.muon(schedule, other_rate=embedding_rate),
      steps=steps, batch=batch, minutes=budget.limit)
  return cadence.apply(run)


def report(run: train.Run, workdir: pathlib.Path, result: train.Result) -> None:
  """Prints the bits per byte of the model and of file compressors, and samples of generated text."""
  data, phases = result.data, result.phases
  with phases('evaluate'):
    step = validation.make_step(run.model.apply, run.objective, data.tokenizer)
    held_out = data.batches('validation', run.objective, run.batch, seed=None, repeat=False,
                            context=run.data.length // 2)
    metrics = validation.evaluate(step, result.params, held_out, result.mesh)
  with phases('compress'):
    text, training_text = (data.text(split).encode() for split in ('validation', 'train'))
    others = compression.compress(text, training_text)
  with phases('sample'):
    room = run.data.length - 1 - max(map(len, data.tokenizer.encode_batch(PROMPTS)))
    samples = generate.generate(run.model, result.params, data.tokenizer, PROMPTS, generate.Sampling(0.8, top_p=0.95),
                                max_tokens=min(96, room)) if room > 0 else []
  for prompt, sample in zip(PROMPTS, samples):
    print(f'\n--- {prompt!r}\n{prompt}{sample}')
  print(f'\nbits per byte of the held-out text ({len(text):,} bytes; lower is better)')
  print(f'this model reads {validation.describe_batches(held_out)}; val and score.py --split=validation give it no '
        'such context\n')
  print('             alone  primed with the training text')
  for name, (alone, primed) in others.items():
    print(f'  {name:9}  {alone:.3f}  {primed:.3f}')
  print(f'  this model         {metrics["bits_per_byte"]:.3f}   perplexity {metrics["perplexity"]:.2f} a token, '
        f'{metrics["accuracy"]:.1%} of tokens right\n')
  steps = run.steps - result.left_out
  print(f'{steps * run.batch * run.data.length:,} tokens in {steps} steps; seconds: '
        + ', '.join(f'{name} {seconds:.0f}' for name, seconds in phases.items()))
  if phases.get('train'):   # the steps of this call, without the first one, which compiles
    steps = result.step - result.start - 1
    print(f'{steps * run.batch * run.data.length / phases["train"]:,.0f} tokens a second')
  print(f'\nwritten to {workdir}: curve.png, metrics.jsonl, tensorboard, run.json, checkpoints, data/tokenizer, '
        f'data/tokens\nnext: {outcome.command("generate", workdir, prompt="def ", temperature=0.8)}')


if __name__ == '__main__':
  launch.run(experiment, report)
