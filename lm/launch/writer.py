"""A model that writes for a program: it is opened by flags, prints texts, answers a file, or talks in the terminal."""
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from lm import generate, load
from lm.data.batch import Batch
from lm.evaluate import rewards
from lm.generate import batch_answers, beam_search, chat_session, prompts_file
from lm.hf import pretrained
from lm.models import kinds
from lm.models.reward import Reward
from lm.objectives.objective import causal_prompt
from lm.options import BestOf, Drawing, Extent, PromptsFile


class Writer(NamedTuple):
  """A model, with its tokenizer, or that of its conversations, and what marks its prompts as in training.

  `grammar` is what each text has to match, and `form` the text of this grammar; both are None for any text.
  """
  name: str
  checkpoint: int | None   # the step of a run
  model: Any
  params: Any
  tokenizer: Any
  mark: Callable[[Batch], Batch]
  shows_prompt: bool       # whether texts are printed with the prompt before them
  form: str | None
  grammar: generate.Grammar | None


def open_writer(workdir: pathlib.Path, model: str | None, best: bool, chat: bool, bos: bool | None,
                form: str | None, check: Callable[[Any], None]) -> Writer:
  """Opens the model of a run, or another one. Raises ValueError where it cannot write what the flags say.

  `check` is called with the model before its parameters are read.
  """
  loaded = pretrained.load(model, check=check) if model else load.open_trained(workdir, best, check)
  mark = causal_prompt if model else loaded.run.objective.prompt
  if mark is None:
    raise ValueError(f'the run in {workdir} was trained to fill in masked tokens, and does not generate text from '
                     'left to right; choose a run with another objective, such as next_token')
  if isinstance(loaded.model, Reward):
    raise ValueError(f'{workdir} is a reward model, which generates no text. To choose among the texts of another '
                     f'model, use --workdir=... --best_of=8 --reward={workdir}')
  reads_source = loaded.model.reads_source
  if bos is not None and reads_source:
    raise ValueError(f'--{"" if bos else "no"}bos is for decoders; the output of an encoder-decoder always begins '
                     'with bos')
  tokens = load.chat_tokenizer(loaded) if chat else loaded.tokenizer
  grammar = None
  if form is not None:
    try:
      grammar = generate.Grammars(tokens, loaded.model.vocab).compile(form)
    except ValueError as error:
      raise ValueError(f'the form of --json_schema or --regex cannot be used: {error}') from None
  return Writer(model or str(workdir), None if model else loaded.step, loaded.model, loaded.params, tokens, mark,
                not (chat or reads_source), form, grammar)


def _check_causal(writer: Writer, flag: str) -> None:
  """Raises ValueError where a scheduler cannot read the prompts of a model."""
  if not writer.model.causal or writer.mark is not causal_prompt:
    raise ValueError(f'{flag} is for models that were trained to write from left to right after any prompt, and '
                     f'{writer.name} is {kinds.in_words(writer.model)} that was not; give --prompt')


def answer_file(writer: Writer, prompts: prompts_file.Prompts, file: PromptsFile, bos: bool | None, chat: bool
                 ) -> None:
  """Writes the answers to the prompts of a file, and prints how many there are about every ten seconds."""
  _check_causal(writer, f'--prompts={file.prompts}')
  answers = prompts_file.AnswersFile(file.out, prompts, {
      'model': writer.name, 'checkpoint': writer.checkpoint, 'chat': chat, 'bos': bos, 'grammar': writer.form})
  start, before = time.monotonic(), len(answers.finished)
  shown = start
  print(f'{before} of {len(prompts.lines)} prompts have answers in {file.out}; the same command continues it where it '
        'is interrupted', file=sys.stderr)

  def report(count: int) -> None:
    nonlocal shown
    now = time.monotonic()
    if now - shown > 10 or count == len(prompts.lines):
      shown = now
      print(f'{count} of {len(prompts.lines)} answers, {(count - before) / (now - start):.3g} a second',
            file=sys.stderr)

  batch_answers.answer_prompts(writer.model, writer.params, writer.tokenizer, prompts, answers, bos, file.rows, report,
                               writer.grammar)


def talk(writer: Writer, drawing: Drawing, extent: Extent) -> None:
  """Holds a conversation in the terminal."""
  _check_causal(writer, '--chat without --prompt')
  if writer.model.reads_source:
    raise ValueError(f'--chat without --prompt is for decoders, and {writer.name} is {kinds.in_words(writer.model)}; '
                     'give --prompt')
  slots = min(writer.model.max_length, 4096)
  scheduler = batch_answers.make_scheduler(writer.model, writer.params, writer.tokenizer, slots, rows=1)
  chat_session.ChatSession(scheduler, writer.tokenizer, drawing.sampling(), extent.max_tokens, tuple(extent.stop),
                           drawing.seed, extent.bos, writer.grammar).run()


def show_room(writer: Writer, prompt: str, extent: Extent) -> None:
  """Says where the context ends a text that has no other limit. Raises ValueError for a prompt that has no room."""
  room = generate.room(writer.model, writer.tokenizer, [prompt], extent.bos)
  if extent.max_tokens is None and not extent.window and room < generate.DEFAULT:
    print(f'up to {room} tokens, to the end of the context; --window continues beyond it', file=sys.stderr)


def print_beams(writer: Writer, prompt: str, settings: beam_search.Beams, extent: Extent) -> None:
  """Prints the texts of the highest scores that beam search finds, the best first."""
  show_room(writer, prompt, extent)
  texts, = beam_search.search(writer.model, writer.params, writer.tokenizer, [prompt], settings,
                              max_tokens=extent.max_tokens, mark=writer.mark, bos=extent.bos)
  _print_ranked(writer, prompt, [(text.text, f'score {text.score:.4f}') for text in texts[:extent.n]])


def _print_ranked(writer: Writer, prompt: str, texts: Sequence[tuple[str, str]]) -> None:
  """Prints texts, the best first, and what is said of each."""
  for place, (text, note) in enumerate(texts):
    print(('' if place == 0 else f'\n{"-" * 80}\n') + (prompt if writer.shows_prompt else '') + text)
    print(note, file=sys.stderr)


def print_best(writer: Writer, prompt: str, drawing: Drawing, extent: Extent, best_of: BestOf) -> None:
  """Prints those of several texts that have the highest rewards, the best first."""
  judge = load.open_trained(best_of.reward)
  if not isinstance(judge.model, Reward):
    raise ValueError(f'--reward={best_of.reward} is {kinds.in_words(judge.model)}, and what is needed is a reward '
                     'model; "experiments/preference.py --method=reward" makes one')
  show_room(writer, prompt, extent)
  texts = generate.generate(writer.model, writer.params, writer.tokenizer, [prompt] * best_of.best_of,
                            drawing.sampling(), seed=drawing.seed, stop=extent.stop, max_tokens=extent.max_tokens,
                            mark=writer.mark, bos=extent.bos, window=extent.window,
                            grammar=writer.grammar)
  template = judge.run.data.template
  values = rewards.Judge(judge.model, judge.params, judge.tokenizer, template).answers([prompt] * len(texts), texts)
  ranked = sorted(range(len(texts)), key=lambda i: -values[i])[:extent.n]
  _print_ranked(writer, prompt, [(texts[i], f'reward {values[i]:.4f}, number {place} of {len(texts)}')
                                 for place, i in enumerate(ranked, 1)])
