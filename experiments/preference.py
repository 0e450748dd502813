"""Aligns a model with preferences by DPO and its variants, or KTO, or trains a reward model.

  python experiments/finetune_chat.py
  python experiments/preference.py --method=dpo

The first command trains the initial model of the second, which answers puzzles politely half of the time; the pairs
prefer polite answers. 40 steps, seed 0, take 20 to 28 seconds of CPU time on 2 shared cores of an Intel Xeon. Of 67
held-out answers, 25 are exactly the chosen one before training, and after it 59 (dpo), 63 (kto), 34 (ipo), 64 (orpo)
and 63 (simpo), all with default flags. The rewards of DPO order 95.5% of the held-out pairs correctly, with a mean
margin of 0.34. The pairs and the rate were tuned with DPO on the same 67 answers (see BUILD_NOTES.md); the other
methods were run once.

To train on your own pairs, starting from another model:

  python experiments/preference.py --model=HuggingFaceTB/SmolLM2-135M-Instruct --jsonl='pairs/*.jsonl' --lr=1e-6

A line has a prompt with a chosen and a rejected answer, or two transcripts with the same beginning. KTO learns from
each answer separately, or from lines with one answer and a --label, true or false.
"""
import pathlib
from typing import Any, Literal

import numpy as np

from lm import generate, launch, load, named, options, train
from lm import lora as adapters
from lm.data.batch import Pair, Rated
from lm.data.chat import conversation, dialogues, messages
from lm.data.text import puzzles
from lm.evaluate import annotate, question_replies
from lm.models.reward import Reward
from lm.objectives import preference

QUESTIONS = 100   # number of held-out questions that the model answers before and after training
BASE = 'runs/finetune_chat'


def experiment(*, method: Literal['dpo', 'cdpo', 'ipo', 'kto', 'orpo', 'simpo', 'reward'] = 'dpo', model: str = BASE,
               records: options.Records = options.Records(), chosen: str = 'chosen', rejected: str = 'rejected',
               label: str | None = None, beta: float | None = None, smoothing: float = 0.1, gamma: float = 1.,
               lora: options.Lora = options.Lora(),
               optimizer: options.Optimizer = options.Optimizer(lr=1e-4, schedule='linear', weight_decay=0.),
               steps: int = 40, batch: int = 8, computation: options.Computation = options.Computation(),
               cadence: options.Cadence = options.Cadence(evaluate_every=20, save_every=100)
               ) -> train.Run | train.Pending:
  """Trains on preferences.

  Most runs set: method, model, jsonl, label, workdir, beta, length, lora_rank, lr, steps, batch, precision.

  Args:
    method: the loss. reward trains a reward model; orpo and simpo need no reference model.
    model: initial model, which is the reference too, as a run's workdir, a Hugging Face folder or an id on the hub.
    prompt: field with the prompt.
    completion: field with the rated answer, with --label.
    chosen: field with the better answer.
    rejected: field with the worse answer.
    label: field with the rating of an answer, true or false, for kto; none for pairs, of which both answers are used.
    warmup: steps of linear warm-up; none for 10, but at most a quarter of all steps.
    beta: weight of the distance to the reference model, or scale of the rewards; none for the default of the method.
    smoothing: share of the pairs whose labels are assumed to be wrong, for cdpo.
    gamma: margin between the rewards of a pair, for simpo.
    steps: number of training steps.
    batch: pairs, or rated answers, in a batch.
  """
  if label and method != 'kto':
    raise ValueError(f'--label={label} is for --method=kto, and {method} learns from pairs; leave it out')
  if lora.lora_rank and method == 'reward':
    raise ValueError(f'--lora_rank={lora.lora_rank} does not go with --method=reward, which trains a new output layer '
                     'too; leave it out')
  keys = messages.Keys(prompt=records.prompt, completion=records.completion, chosen=chosen, rejected=rejected,
                       label=label or 'label')
  source = records.source(puzzles.preferences)
  if method == 'kto' and not label:
    source = messages.unpaired(source, keys)
  scale = {} if beta is None else {'beta': beta}
  objective = {'dpo': lambda: preference.preference(preference.dpo(**scale)),
               'cdpo': lambda: preference.preference(preference.dpo(**scale, smoothing=smoothing)),
               'ipo': lambda: preference.preference(preference.ipo(**scale)),
               'orpo': lambda: preference.preference(preference.orpo(**scale)),
               'simpo': lambda: preference.preference(preference.simpo(**scale, gamma=gamma)),
               'kto': lambda: preference.kto(**scale), 'reward': preference.reward}[method]()
  update = optimizer.make(steps, warmup=min(10, steps // 4))

  def build(base: load.BaseModel) -> train.Run:
    data: Any = dialogues.Dialogues(source, base.tokenizer, records.length, Rated if method == 'kto' else Pair,
                                    records.template(base.template), keys, allow_left_out=records.allow_left_out,
                                    longest=base.model.max_length)
    if method in ('dpo', 'cdpo', 'ipo', 'kto'):
      data = annotate.Annotated(data, train.Constants('reference', base.model, base.start), preference.COLUMNS,
                                preference.reference)
    trained, scores = computation.apply(base.model), method == 'reward'
    run = train.Run(
        model=Reward(trained) if scores else trained, objective=objective, data=data, optimizer=update, steps=steps,
        batch=batch,
        start=(lambda model: model.start(base.start)) if scores else base.start)
    return lora.adapt(cadence.apply(computation.apply_to_steps(run)))
  return train.after_opening(build, base=named.decoder('--model', model, computation.dtype))


def report(run: train.Run, workdir: pathlib.Path, result: train.Result) -> None:
  """Prints the metrics of held-out pairs, and answers of the model before and after training."""
  prefix = 'validation/preference/'
  print('held out: ' + ', '.join(f'{name.removeprefix(prefix)} {value:.4f}' for name, value in result.metrics.items()
                                 if name.startswith(prefix)))
  data = run.data
  if isinstance(run.model, Reward):
    return
  speaker, room = conversation.Conversation(result.data.tokenizer, data.template), data.length // 2
  questions = question_replies.held_out(data, speaker, QUESTIONS, room)
  if not questions:
    return
  model, learned = adapters.merge(run.model, result.params)
  replies = {}
  for name, params in (('before', adapters.initial_params(run, result.params)), ('after', learned)):
    replies[name] = generate.generate(model, params, speaker, [question for question, _ in questions],
                                      generate.Sampling(temperature=0), max_tokens=room)
    exact = sum(reply == answer for reply, (_, answer) in zip(replies[name], questions))
    print(f'{name}: {exact} of {len(questions)} answers are exactly the chosen one; '
          f'{np.mean([len(reply) for reply in replies[name]]):.1f} characters each')
  question_replies.show(questions, replies, 'chosen')


if __name__ == '__main__':
  launch.run(experiment, report)
