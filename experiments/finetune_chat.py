"""Fine-tune a model to answer. By default: from nothing, on puzzles about letters that are made up.

  python experiments/finetune_chat.py

2 cores of an Intel Xeon, shared with other work: 5.6 minutes of CPU time (on cores of its own perhaps 3 minutes, not
measured), 600 steps of 4,096 positions, seed 0. Of 100 held-out questions 0 are answered exactly before, 99 after;
validation loss 0.100, of which some 0.09 is the toss whether to be polite.

On records of your own, from a run, a Hugging Face folder or the hub:

  python experiments/finetune_chat.py --model=HuggingFaceTB/SmolLM2-135M-Instruct --jsonl='chats/*.jsonl' --lr=2e-5
  python experiments/finetune_chat.py --jsonl=maths.jsonl --prompt=question --completion=answer --tokenizer=bpe

A line holds messages, or a prompt and its completion. What is learned is what the assistant says, and where it ends.
"""
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import Literal

from lm import generate, launch, load, named, options, train
from lm import lora as adapters
from lm.data import tokenizers
from lm.data.chat import conversation, dialogues
from lm.data.chat import messages as said
from lm.data.text import puzzles
from lm.evaluate import question_replies
from lm.launch import outcome
from lm.objectives import objective
from lm.objectives.supervised import supervised

DEFAULT = options.Size('llama', layers=3, width=128, heads=4)
QUESTIONS = 100   # of the held-out ones, that are put to the model before and after


def experiment(*, records: options.Records = options.Records(), messages: str = 'messages', answer: str | None = None,
               model: str | None = None, tokenizer: Literal['bytes', 'bpe'] = 'bytes', vocab: int = 320,
               character_coverage: float | None = None, shape: options.Shape = options.Shape(),
               denominator: Literal['token_mean', 'sequence_mean'] = 'token_mean',
               lora: options.Lora = options.Lora(),
               optimizer: options.Optimizer = options.Optimizer(lr=2e-3, weight_decay=0.01),
               steps: int = 600, batch: int = 16, computation: options.Computation = options.Computation(),
               cadence: options.Cadence = options.Cadence(evaluate_every=200, save_every=200)
               ) -> train.Run | train.Pending:
  """Fine-tunes a decoder on dialogues.

  Most runs set: model, jsonl, prompt, completion, workdir, tokenizer, length, lora_rank, lr, steps, batch, precision.

  Args:
    messages: the field with a whole dialogue, where a line has one.
    answer: what of an answer is compared with that of the record, after training, a regular expression with one group,
      such as '#### (.*)'; none for whole answers.
    model: a run's workdir, a Hugging Face folder, an imported one or an id on the hub, whose tokenizer and chat
      template are used too; none begins from nothing, with the tokenizer and the shape of the flags.
    tokenizer: bytes, or one that is trained on the records.
    vocab: tokens of the model, and of the tokenizer that is trained.
    character_coverage: share of the text whose characters have a token each, from 0.98 to 1, by default 0.9995; rarer
      ones are spelled in bytes.
    layers: how many; none for 3.
    width: of the residual stream; none for 128.
    heads: of attention; none for 4.
    warmup: steps of linear warm-up; none for 50, or a twelfth of the steps where that is less.
    denominator: what a loss is divided by, targets or dialogues.
    steps: of training.
    batch: rows a step.
  """
  coverage = {} if character_coverage is None else {'character_coverage': character_coverage}
  if coverage and (model or tokenizer == 'bytes'):
    raise ValueError(f'--character_coverage={character_coverage} is for --tokenizer=bpe, without a --model')
  if model:
    shape.refuse(DEFAULT, f'--model={model}')
  source = records.source(puzzles.dialogues)
  new = functools.partial(tokenizers.train_sentencepiece, vocab=vocab, **coverage)
  update = optimizer.make(steps, warmup=min(50, steps // 12))

  def build(base: load.BaseModel | None) -> train.Run:
    tokens = base.tokenizer if base else tokenizers.Bytes() if tokenizer == 'bytes' else new
    run = train.Run(
        model=computation.apply(base.model) if base else shape.decoder(DEFAULT, vocab, records.length, computation),
        objective=supervised(getattr(objective, denominator)),
        data=dialogues.Dialogues(
            source, tokens, records.length, template=records.template(base.template if base else None),
            allow_left_out=records.allow_left_out, answer=answer, longest=base.model.max_length if base else math.inf,
            keys=said.Keys(prompt=records.prompt, completion=records.completion, messages=messages)),
        optimizer=update, steps=steps, batch=batch, start=base.start if base else None)
    return lora.adapt(cadence.apply(computation.with_accumulation(run)))
  return train.after_opening(build, base=named.decoder('model', model, computation.dtype) if model else None)


def report(run: train.Run, workdir: pathlib.Path, result: train.Result) -> None:
  """Prints how many held-out questions are answered as in their records, before and after; and some answers."""
  data, room = run.data, run.data.length // 2
  speaker = conversation.Conversation(result.data.tokenizer, data.template)
  questions = question_replies.held_out(data, speaker, QUESTIONS, room)
  if not questions:
    print(f'no held-out question is put to the model: of the first {QUESTIONS} records, none has a question and an '
          f'answer of less than {room} tokens, half of --length={data.length}')
    return
  model, learned = adapters.merge(run.model, result.params)
  replies = {}
  for name, params in (('before', adapters.initial_params(run, result.params)), ('after', learned)):
    replies[name] = generate.generate(model, params, speaker, [question for question, _ in questions],
                                      generate.Sampling(temperature=0), max_tokens=room)
    print(f'{name}: {score(data, [answer for _, answer in questions], replies[name])}')
  question_replies.show(questions, replies, 'record')
  print(f'\nnext: {outcome.command("generate", workdir, chat=True, prompt=questions[0][0][-1]["content"])}')


def score(data: dialogues.Dialogues, answers: Sequence[str], replies: Sequence[str]) -> str:
  """A line that says how many replies are the answers of their records, or agree with them in what `data.answer` finds.

  A record in which that finds nothing is not counted; a reply in which it finds nothing is wrong.
  """
  pairs = [(data.essence(puzzles.solution(answer)), data.essence(puzzles.solution(reply)))
           for answer, reply in zip(answers, replies)]
  right = sum(expected is not None and reply == expected for expected, reply in pairs)
  if data.answer is None:
    return f'{right} of {len(pairs)} held-out questions are answered exactly as their records say'
  without = sum(expected is None for expected, _ in pairs)
  line = f'{right} of {len(pairs) - without} held-out questions are answered as their records say'
  missing = sum(expected is not None and reply is None for expected, reply in pairs)
  line += f', by what --answer={data.answer} finds; it finds nothing in {missing} of these replies'
  return line + (f', and nothing in {without} more records, which are not counted' if without else '')


if __name__ == '__main__':
  launch.run(experiment, report)
