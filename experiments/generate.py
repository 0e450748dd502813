r"""Generates text with a trained run or a Hugging Face model, and prints it token by token.

  python experiments/generate.py --workdir=runs/quickstart --prompt="def " --temperature=0.8 --max_tokens=200
  python experiments/generate.py --workdir=runs/ahead --prompt="def " --draft=2
  python experiments/generate.py --model=gpt2 --prompt="def " --lookup=4
  python experiments/generate.py --model=gpt2 --prompt="Once" --beams=5 --n=2
  python experiments/generate.py --workdir=runs/finetune_chat --chat
  python experiments/generate.py --workdir=runs/finetune_chat --chat --prompt="Reverse abcd"
  python experiments/generate.py --workdir=runs/finetune_chat --chat --prompt="Reverse abcd" --best_of=8 \
    --reward=runs/reward
  python experiments/generate.py --model=gpt2 --prompts=prompts.jsonl --out=answers.jsonl
  python experiments/generate.py --workdir=runs/quickstart --prompt="x = " --regex="[0-9]{1,4}"
  python experiments/generate.py --model=t5-small --prompt="translate English to German: Hello" --temperature=0
"""
import contextlib
import functools
import pathlib
import sys
from typing import Literal

import jax

from lm import generate, launch, load, sharding
from lm.generate import prompts_file
from lm.launch import writer as writers
from lm.launch.writer import Writer
from lm.models.quantized_decoder import check_weights, with_rounded_weights
from lm.options import BestOf, Drafts, Drawing, Extent, Form, PromptsFile, Search
from lm.options.writing import check_together


def main(*, workdir: pathlib.Path | None = None, model: str | None = None, best: bool = False, prompt: str = '',
         chat: bool = False, weights: Literal['float32', 'int8', 'int4'] = 'float32', mesh: str | None = None,
         drawing: Drawing = Drawing(), extent: Extent = Extent(), form: Form = Form(), drafts: Drafts = Drafts(),
         search: Search = Search(), best_of: BestOf = BestOf(), file: PromptsFile = PromptsFile()) -> None:
  """Prints the prompt and its completions; of an encoder-decoder, only the output.

  Args:
    workdir: workdir of the run; none for runs/quickstart.
    model: a Hugging Face folder, an imported model, an id on the hub or the workdir of a run, in place of --workdir.
    best: use the best checkpoint by the metric of the run, mostly the validation loss, instead of the newest.
    prompt: beginning of the text; an empty prompt begins a new document. For an encoder-decoder, the input.
    chat: use the prompt as the message of a user, with the chat template of the model, and print only the answer.
      Without a prompt, messages are read from the terminal, and answered in turn.
    weights: int8 or int4 rounds the matrices of a decoder, to a quarter or a fifth of the memory. For one device.
    mesh: the size of each mesh axis, such as fsdp:4,tensor:2; none puts all devices on fsdp.
  """
  workdir, model = load.run_or_model(workdir, model, best)
  is_session = chat and not prompt and file.prompts is None
  check_together(is_session, prompt, drawing, extent, drafts, search, best_of, file, form)
  grammar, lines = form.grammar(), None
  if file.prompts is not None:
    defaults = prompts_file.settings_of(drawing.sampling(), extent.max_tokens, drawing.seed, extent.n, extent.stop)
    lines = prompts_file.read_prompts(file.prompts, defaults, chat)
  if weights != 'float32' and best_of.best_of:
    raise ValueError(f'--weights={weights} is not for --best_of={best_of.best_of}; leave one of them out')
  devices = sharding.make_mesh(mesh)
  with jax.set_mesh(devices):
    writer = writers.open_writer(workdir, model, best, chat, extent.bos, grammar,
                                 functools.partial(check_weights, dtype=weights))
  if weights != 'float32':
    params = with_rounded_weights(writer.model, writer.params, weights)
    writer = writer._replace(name=f'{writer.name} ({weights})', params=params)
  with jax.set_mesh(devices) if weights == 'float32' else contextlib.nullcontext():
    if lines is not None:
      writers.answer_file(writer, lines, file, extent.bos, chat)
    elif is_session:
      writers.talk(writer, drawing, extent)
    elif search.beams:
      writers.print_beams(writer, prompt, search.settings(), extent)
    elif best_of.best_of:
      writers.print_best(writer, prompt, drawing, extent, best_of)
    else:
      _print_texts(writer, prompt, drawing, extent, drafts)


def _print_texts(writer: Writer, prompt: str, drawing: Drawing, extent: Extent, drafts: Drafts) -> None:
  """Prints the texts after a prompt, the first of them while it is generated."""
  writers.show_room(writer, prompt, extent)
  drafting = drafts.make()
  shown = prompt if writer.shows_prompt else ''
  texts, prefix = [''] * extent.n, shown
  for pieces in generate.stream(writer.model, writer.params, writer.tokenizer, [prompt] * extent.n, drawing.sampling(),
                                max_tokens=extent.max_tokens, stop=extent.stop, seed=drawing.seed, mark=writer.mark,
                                draft=drafting, bos=extent.bos, window=extent.window,
                                grammar=writer.grammar):
    print(prefix + pieces[0], end='', flush=True)
    prefix = ''
    texts = [text + piece for text, piece in zip(texts, pieces)]
  print()
  for text in texts[1:]:
    print(f'\n{"-" * 80}\n{shown}{text}')
  if drafting is not None:
    print(f'drafts: {drafting.acceptance:.1%} accepted, {drafting.tokens_per_pass:.2f} tokens a forward pass',
          file=sys.stderr)


if __name__ == '__main__':
  launch.tool(main)
