"""Fine-tunes a decoder to answer the customers of a shop from its records, or to hand over to a person.

  python experiments/customer_service.py
"""
import functools
import pathlib

import numpy as np

from lm import generate, launch, load, named, options, train
from lm.data import tokenizers
from lm.data.chat import conversation, shop_dialogues
from lm.data.chat.shop_dialogues import HAND_OVER
from lm.evaluate import hand_over, question_replies, texts
from lm.evaluate import report as reports
from lm.evaluate.report import Result
from lm.objectives.supervised import supervised

DEFAULT = options.Size('llama', layers=3, width=128, heads=4)
QUESTIONS = 400   # number of held-out questions of each kind


def experiment(*, records: options.Records = options.Records(), messages: str = 'messages',
               answer: str = shop_dialogues.SLOTS, model: str | None = None, vocab: int = 700,
               shape: options.Shape = options.Shape(),
               optimizer: options.Optimizer = options.MUON, steps: int = 400,
               batch: int = 16, computation: options.Computation = options.Computation(),
               cadence: options.Cadence = options.Cadence(evaluate_every=100, save_every=200)
               ) -> train.Run | train.Pending:
  """Fine-tunes a decoder on dialogues with customers.

  Most runs set: model, jsonl, answer, workdir, length, lr, steps, batch.

  Args:
    jsonl: files of JSON lines, .gz and .zst too, a glob pattern; none generates dialogues of a shop.
    messages: field with a whole dialogue.
    answer: regular expression with one group, whose matches in an answer are the values that have to be right.
    model: initial model, as a run's workdir, a Hugging Face folder, an imported model or an id on the hub. none trains
      a new model, with a tokenizer that is trained on the records.
    vocab: number of tokens of a new model.
    layers: number of layers; none for 3.
    width: size of the residual stream; none for 128.
    heads: number of heads of attention; none for 4.
    warmup: steps of linear warm-up; none for a tenth of all steps.
    steps: number of training steps.
    batch: rows in a batch.
  """
  if model:
    shape.refuse(DEFAULT, f'--model={model}')
  source, update = records.source(shop_dialogues.shop), optimizer.make(steps, warmup=steps // 10)
  new = functools.partial(tokenizers.train_sentencepiece, vocab=vocab)

  def build(base: load.BaseModel | None) -> train.Run:
    return cadence.apply(computation.apply_to_steps(train.Run(
        model=computation.apply(base.model) if base else shape.decoder(DEFAULT, vocab, records.length, computation),
        objective=supervised(), data=records.dialogues(source, base, new, answer, messages),
        optimizer=update, steps=steps, batch=batch, start=base.start if base else None)))
  return train.after_opening(build, base=named.decoder('--model', model, computation.dtype) if model else None)


def report(run: train.Run, workdir: pathlib.Path, result: train.Result) -> None:
  """Prints how held-out questions are answered, and how well a threshold on log-probabilities hands them over.

  The threshold is that of every second question, and measured on the others.
  """
  speaker, room = conversation.Conversation(result.data.tokenizer, run.data.template), run.data.length // 2
  measures, questions, replies = {}, [], []
  for split in ('validation', *(f'validation-{name}' for name in result.data.validation_sets)):
    some = question_replies.held_out(run.data, speaker, QUESTIONS, room, split)
    written = generate.generate(run.model, result.params, speaker, [question for question, _ in some],
                                generate.Sampling(temperature=0), max_tokens=room)
    references = [[answer] for _, answer in some]
    measures[split] = [measure for metric in (texts.ExactMatch(), texts.SlotAccuracy(run.data.answer))
                       for measure in metric(written, references)]
    questions, replies = questions + some, replies + written
  if not questions:
    raise ValueError(f'no held-out question has fewer than {room} tokens, half of --length={run.data.length}')
  answers, handed_over = np.array([answer for _, answer in questions]), np.array(replies) == HAND_OVER
  log_p = np.where(handed_over, -np.inf, hand_over.log_probabilities(
      run.model, result.params, speaker, [question for question, _ in questions], replies))
  to_person = (answers == HAND_OVER) | ~handed_over & (np.array(replies) != answers)
  limit = hand_over.threshold(log_p[::2], to_person[::2])
  measures['by itself'] = hand_over.measures(log_p[1::2], to_person[1::2], -np.finfo(float).max)
  measures['by threshold'] = hand_over.measures(log_p[1::2], to_person[1::2], limit)
  for name, places in ('right', ~to_person), ('wrong, or for a person', to_person):
    print(f'\n{name}')
    for i in np.flatnonzero(places)[:: max(places.sum() // 4, 1)][:4]:
      print(f'> {questions[i][0][0]["content"]!r}\n> {questions[i][0][-1]["content"]}\n  model   {replies[i]!r} '
            f'{log_p[i]:.2f}\n  record  {answers[i]!r}')
  print(f'\nanswers with a log-probability below {limit:.3f} are handed over\n\n'
        + reports.table({name: reports.to_json(Result(some)) for name, some in measures.items()}))


if __name__ == '__main__':
  launch.run(experiment, report)
