"""Fine-tunes a decoder to summarise texts. By default, to write the first line of a docstring of Python's library.

  python experiments/quickstart.py
  python experiments/summarise.py --model=runs/quickstart

100 steps, 205 thousand positions, take 50 s of CPU time on 2 crowded cores of an AMD EPYC. They started from the
quickstart after 2.5 minutes, which were 140 steps there. ROUGE (F) of 81 held-out docstrings, the others of 99 being
longer than three quarters of a row, with 95 % intervals over docstrings:

                   ROUGE-1            ROUGE-2            ROUGE-L
  this model       0.13 [0.10, 0.15]  0.02 [0.01, 0.03]  0.12 [0.10, 0.15]
  first sentence   0.17 [0.14, 0.21]  0.04 [0.02, 0.06]  0.15 [0.12, 0.18]
  random sentence  0.14 [0.11, 0.17]  0.03 [0.02, 0.05]  0.12 [0.10, 0.15]

It is no better than a sentence at random: it has learned the form of a first line, and reads little of the text. All
of these are bad: 'Returns a singleton.' for 'Cannot perform the division adequately.', 'Returns a list of the queue.'
for 'Format a Decimal instance according to the given specifier.', and 'Return the given port is a singleton.' for 'A
buffered interface to random access streams.'
"""
import functools
import pathlib
import random
import re

from lm import generate, launch, load, named, options, train
from lm.data import tokenizers
from lm.data.chat import conversation
from lm.data.text import docstrings
from lm.evaluate import question_replies, texts
from lm.evaluate import report as reports
from lm.evaluate.report import Result
from lm.objectives.supervised import supervised

DEFAULT = options.Size('llama', layers=2, width=128, heads=2)
QUESTIONS = 200   # number of held-out texts that are summarised
METRIC = texts.Rouge(stem=True)


def sentences(text: str) -> list[str]:
  """Returns the sentences of a text, which end at punctuation before white space, or at a blank line.

  Returns one empty sentence for a text without any.
  """
  return [' '.join(part.split()) for part in re.split(r'(?<=[.!?])\s+|\n\s*\n', text) if part.strip()] or ['']


def experiment(*, records: options.Records = options.Records(), model: str | None = None, vocab: int = 2048,
               shape: options.Shape = options.Shape(), optimizer: options.Optimizer = options.MUON, steps: int = 100,
               batch: int = 8, computation: options.Computation = options.Computation(),
               cadence: options.Cadence = options.Cadence(evaluate_every=50, save_every=50)
               ) -> train.Run | train.Pending:
  """Fine-tunes a decoder on texts and their summaries.

  Most runs set: model, jsonl, prompt, completion, workdir, length, lr, steps, batch.

  Args:
    jsonl: files of JSON lines, .gz and .zst too, a glob pattern; none takes docstrings.
    prompt: the field with the text.
    completion: the field with its summary.
    model: initial model, as a run's workdir, a Hugging Face folder, an imported model or an id on the hub. none trains
      a new model, with a tokenizer that is trained on the records.
    vocab: number of tokens of a new model.
    layers: number of layers; none for 2.
    width: size of the residual stream; none for 128.
    heads: number of heads of attention; none for 2.
    warmup: steps of linear warm-up; none for a tenth of all steps.
    steps: number of training steps.
    batch: rows in a batch.
  """
  if model:
    shape.refuse(DEFAULT, f'--model={model}')
  source, update = records.source(docstrings.docstrings), optimizer.make(steps, warmup=steps // 10)
  new = functools.partial(tokenizers.train_sentencepiece, vocab=vocab)

  def build(base: load.BaseModel | None) -> train.Run:
    return cadence.apply(computation.apply_to_steps(train.Run(
        model=computation.apply(base.model) if base else shape.decoder(DEFAULT, vocab, records.length, computation),
        objective=supervised(), data=records.dialogues(source, base, new), optimizer=update, steps=steps, batch=batch,
        start=base.start if base else None)))
  return train.after_opening(build, base=named.decoder('--model', model, computation.dtype) if model else None)


def report(run: train.Run, workdir: pathlib.Path, result: train.Result) -> None:
  """Prints ROUGE of summaries of held-out texts, beside the first sentences of the texts and sentences at random."""
  speaker, room = conversation.Conversation(result.data.tokenizer, run.data.template), run.data.length // 4
  longest = run.data.length - room
  questions = question_replies.held_out(run.data, speaker, QUESTIONS, room, longest=longest)
  if not questions:
    raise ValueError(f'no held-out text has fewer than {longest} tokens, and a summary of fewer than {room}, as '
                     f'--length={run.data.length} has room for')
  prompts, rng = [question for question, _ in questions], random.Random(0)
  sources = [sentences(question[-1]['content']) for question in prompts]
  summaries = {
      'model': generate.generate(run.model, result.params, speaker, prompts, generate.Sampling(temperature=0),
                                 max_tokens=room),
      'first sentence': [parts[0] for parts in sources], 'random sentence': [rng.choice(parts) for parts in sources]}
  question_replies.show(questions, summaries, 'record')
  scores = {name: [measure for measure in METRIC(written, [[answer] for _, answer in questions])
                   if measure.name in ('rouge1', 'rouge2', 'rougeL')] for name, written in summaries.items()}
  print('\n' + reports.table({name: reports.to_json(Result(measures)) for name, measures in scores.items()}))


if __name__ == '__main__':
  launch.run(experiment, report, METRIC.check)
