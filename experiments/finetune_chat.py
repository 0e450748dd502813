"""Fine-tunes a decoder on dialogues. By default, trains a new model on generated puzzles about letters.

  python experiments/finetune_chat.py

600 steps of 4,096 positions, seed 0, take 5.6 minutes of CPU time on 2 shared cores of an Intel Xeon. Of 100 held-out
questions, 0 are answered exactly before training, and 99 after it. The validation loss is 0.100, of which about 0.09
comes from answers that are polite at random.

To fine-tune on your own records, starting from a run, a Hugging Face folder or a model on the hub:

  python experiments/finetune_chat.py --model=HuggingFaceTB/SmolLM2-135M-Instruct --jsonl='chats/*.jsonl' --lr=2e-5
  python experiments/finetune_chat.py --jsonl=maths.jsonl --prompt=question --completion=answer --tokenizer=bpe

A line has messages, or a prompt and its completion. The loss is that of the assistant's tokens and of their ends.
"""
import functools
import pathlib
from collections.abc import Sequence
from typing import Literal

from lm import generate, launch, load, named, options, train
from lm import lora as adapters
from lm.data import tokenizers
from lm.data.chat import conversation, dialogues
from lm.data.text import puzzles
from lm.evaluate import question_replies
from lm.launch import outcome
from lm.objectives import objective
from lm.objectives.supervised import supervised

DEFAULT = options.Size('llama', layers=3, width=128, heads=4)
QUESTIONS = 100   # number of held-out questions that the model answers before and after training


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
    messages: field with a whole dialogue.
    answer: regular expression with one group, such as '#### (.*)'. After training, the group is compared between an
      answer and that of the record; none compares whole answers.
    model: initial model, as a run's workdir, a Hugging Face folder, an imported model or an id on the hub. Its
      tokenizer and chat template are used too. none trains a new model with the tokenizer and the shape of the flags.
    tokenizer: tokenizer of a new model; bpe is trained on the records.
    vocab: number of tokens of a new model, and of the tokenizer that is trained.
    character_coverage: share of the text whose characters get tokens of their own, from 0.98 to 1; rarer characters are
      spelled in bytes. none for 0.9995.
    layers: number of layers; none for 3.
    width: size of the residual stream; none for 128.
    heads: number of heads of attention; none for 4.
    warmup: steps of linear warm-up; none for 50, but at most a twelfth of all steps.
    denominator: number that the loss of a batch is divided by, that of its targets (token_mean) or of its dialogues
      (sequence_mean).
    steps: number of training steps.
    batch: rows in a batch.
  """
  coverage = {} if character_coverage is None else {'character_coverage': character_coverage}
  if coverage and (model or tokenizer == 'bytes'):
    raise ValueError(f'--character_coverage={character_coverage} is for --tokenizer=bpe without a --model; leave it '
                     'out')
  if model:
    shape.refuse(DEFAULT, f'--model={model}')
  source = records.source(puzzles.dialogues)
  new = functools.partial(tokenizers.train_sentencepiece, vocab=vocab, **coverage)
  update = optimizer.make(steps, warmup=min(50, steps // 12))

  def build(base: load.BaseModel | None) -> train.Run:
    run = train.Run(
        model=computation.apply(base.model) if base else shape.decoder(DEFAULT, vocab, records.length, computation),
        objective=supervised(getattr(objective, denominator)),
        data=records.dialogues(source, base, tokenizers.Bytes() if tokenizer == 'bytes' else new, answer, messages),
        optimizer=update, steps=steps, batch=batch, start=base.start if base else None)
    return lora.adapt(cadence.apply(computation.apply_to_steps(run)))
  return train.after_opening(build, base=named.decoder('--model', model, computation.dtype) if model else None)


def report(run: train.Run, workdir: pathlib.Path, result: train.Result) -> None:
  """Prints how many held-out questions are answered as in their records, before and after training, and examples."""
  data, room = run.data, run.data.length // 2
  speaker = conversation.Conversation(result.data.tokenizer, data.template)
  questions = question_replies.held_out(data, speaker, QUESTIONS, room)
  if not questions:
    print(f'no held-out question is asked: of the first {QUESTIONS} records, none has a question and an answer of less '
          f'than {room} tokens, half of --length={data.length}')
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
  """Returns a line with the number of replies that equal the answers of their records, or agree in `data.answer`.

  A record that the regular expression does not match is not counted; a reply that it does not match is wrong.
  """
  pairs = [(data.essence(puzzles.solution(answer)), data.essence(puzzles.solution(reply)))
           for answer, reply in zip(answers, replies)]
  right = sum(expected is not None and reply == expected for expected, reply in pairs)
  if data.answer is None:
    return f'{right} of {len(pairs)} held-out questions are answered exactly as their records say'
  without = sum(expected is None for expected, _ in pairs)
  line = f'{right} of {len(pairs) - without} held-out questions are answered as their records say'
  missing = sum(expected is not None and reply is None for expected, reply in pairs)
  line += f', compared by --answer={data.answer}, which does not match {missing} of these replies'
  return line + (f'; {without} further records, which it does not match, are not counted' if without else '')


if __name__ == '__main__':
  launch.run(experiment, report)
