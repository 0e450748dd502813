"""Fine-tunes a decoder to answer the customers of a shop from its records, or to hand over to a person.

  python experiments/customer_service.py

400 steps of 4,096 positions, seed 0, take 3.9 minutes of CPU time on 2 crowded cores of an AMD EPYC (10 minutes by the
clock), JAX 0.10.2. Brackets are 95 % intervals over dialogues. Of 391 held-out answers, 0.46 [0.41, 0.51] are exactly
those of the records, and of the values in them 0.77 [0.74, 0.80] are right. Of 400 questions of kinds that no training
record has, 0.03 [0.01, 0.05] are answered as they should be, by handing over. The loss was still falling.

Handing over, measured on 395 dialogues, half of them with a new kind of question:

                          precision           recall              errors among answers kept
  by its own words        0.93 [0.79, 1.00]   0.04 [0.02, 0.07]   0.79 [0.75, 0.83]
  by a threshold (-0.619) 0.93 [0.90, 0.96]   0.80 [0.75, 0.84]   0.50 [0.41, 0.59]

With the threshold, a third of the answers is kept, and half of those should not be: so small a model is wrong in four
of five of these dialogues.

  good  'Where do you send the radio?'     'The radio goes to Vienna.'            (three orders)
        'When will it arrive?'             'The table arrives on Saturday.'       (one order)
        'On which day do I get it?'        'The printer arrives on Monday.'       (three orders)
  bad   'What did the kettle cost?'        'The kettle cost 30 euro.'             the price of another order
        'How long can I send it back?'     'The mirror can be returned until 2 April.'   the date of another order
        'Who signed for the drill?'        'The drill cost 70 euro.'              no such value; kind of question is new
"""
import dataclasses
import functools
import pathlib

import numpy as np

from lm import generate, launch, load, named, options, train
from lm.data import tokenizers
from lm.data.chat import ToolTurns, conversation, shop_dialogues
from lm.data.chat.shop_dialogues import HAND_OVER
from lm.evaluate import hand_over, question_replies, texts
from lm.evaluate import report as reports
from lm.evaluate.report import Result
from lm.objectives.supervised import supervised

DEFAULT = options.Size('llama', layers=3, width=128, heads=4)
QUESTIONS = 400   # number of held-out questions of each kind


def experiment(*, records: options.Records = options.Records(), messages: str = 'messages',
               answer: str | None = None, tools: bool = False, model: str | None = None, vocab: int = 700,
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
    answer: regular expression with one group, whose matches in an answer are the values that have to be right; none
      for the items, days and prices of generated dialogues, and with jsonl for no values.
    tools: the records are not in the prompt, and the model calls a function that looks an order up, which
      customer_tools.py executes; for generated dialogues.
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
  if tools and (records.jsonl or records.plain is not None):
    raise ValueError('--tools is for generated dialogues and their template; leave out --jsonl and --plain')
  source = records.source(functools.partial(shop_dialogues.shop, tools=tools))
  update = optimizer.make(steps, warmup=steps // 10)
  new = functools.partial(tokenizers.train_sentencepiece, vocab=vocab)
  slots = answer if answer or records.jsonl else shop_dialogues.SLOTS

  def build(base: load.BaseModel | None) -> train.Run:
    data = records.dialogues(source, base, new, slots, messages)
    if tools:
      data = dataclasses.replace(data, template=ToolTurns())
    return cadence.apply(computation.apply_to_steps(train.Run(
        model=computation.apply(base.model) if base else shape.decoder(DEFAULT, vocab, records.length, computation),
        objective=supervised(), data=data, optimizer=update, steps=steps, batch=batch,
        start=base.start if base else None)))
  return train.after_opening(build, base=named.decoder('--model', model, computation.dtype) if model else None)


def report(run: train.Run, workdir: pathlib.Path, result: train.Result) -> None:
  """Prints how held-out questions are answered, and how well a threshold on log-probabilities hands them over.

  The threshold is chosen on every second question, and the numbers are measured on the other questions.
  """
  speaker, room = conversation.Conversation(result.data.tokenizer, run.data.template), run.data.length // 8
  longest = run.data.length - room
  measures, questions, replies = {}, [], []
  for split in ('validation', *(f'validation-{name}' for name in result.data.validation_sets)):
    some = question_replies.held_out(run.data, speaker, QUESTIONS, room, split, longest)
    if not some:
      raise ValueError(f'no held-out question of {split} has fewer than {longest} tokens, and an answer of fewer than '
                       f'{room}, as --length={run.data.length} has room for')
    written = generate.generate(run.model, result.params, speaker, [question for question, _ in some],
                                generate.Sampling(temperature=0), max_tokens=room)
    references = [[answer] for _, answer in some]
    measures[split] = texts.ExactMatch()(written, references)
    if run.data.answer:
      measures[split] += texts.SlotAccuracy(run.data.answer)(written, references)
    questions, replies = questions + some, replies + written
  answers, handed_over = [answer for _, answer in questions], np.array([reply == HAND_OVER for reply in replies])
  log_p = np.where(handed_over, -np.inf, hand_over.log_probabilities(
      run.model, result.params, speaker, [question for question, _ in questions], replies))
  to_person = np.array([answer == HAND_OVER or reply not in (answer, HAND_OVER)
                        for answer, reply in zip(answers, replies)])
  limit = hand_over.threshold(log_p[::2], to_person[::2])
  measures['by itself'] = hand_over.measures(log_p[1::2], to_person[1::2], -np.finfo(float).max)
  measures['by threshold'] = hand_over.measures(log_p[1::2], to_person[1::2], limit)
  for name, places in ('right', ~to_person), ('wrong, or for a person', to_person):
    print(f'\n{name}')
    for i in np.flatnonzero(places)[:: max(places.sum() // 4, 1)][:4]:
      first, *others = [message['content'] for message in questions[i][0]]
      print('\n'.join([f'> {first!r}', *(f'> {text}' for text in others[-3:]),
                       f'  model   {replies[i]!r} {log_p[i]:.2f}', f'  record  {answers[i]!r}']))
  which = 'all answers' if np.isinf(limit) else f'answers with a log-probability below {limit:.3f}'
  print(f'\n{which} are handed over\n\n'
        + reports.table({name: reports.to_json(Result(some)) for name, some in measures.items()}))


if __name__ == '__main__':
  launch.run(experiment, report)
