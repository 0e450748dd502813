"""What a finished run came to, printed: its metrics on held-out data, text that it writes, and the next command."""
import pathlib
import shlex
from typing import Any

import jax
import numpy as np

from lm import generate, lora, train
from lm.train.interfaces import Decoder
from lm.workdir import figures

METRICS = 'loss', 'perplexity', 'bits_per_byte', 'accuracy'   # of a run, that are printed
LENGTH = 64   # tokens of the sample, at most
SAMPLING = generate.Sampling(0.8, top_p=0.95)
_EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / 'experiments'


def show(run: train.Run, workdir: pathlib.Path, result: train.Result, script: pathlib.Path, sample: bool) -> None:
  """Draws the curve and prints the metrics; with `sample` a sample too, where the model writes, and the next command.

  `script` made the run. Every process of a cluster calls it, and process 0 prints.
  """
  text = _write(run, result) if sample else None
  if jax.process_index():
    return
  if (workdir / 'metrics.jsonl').exists():
    figures.curve(workdir / 'metrics.jsonl', workdir / 'curve.png')
  print(f'held out: {_held_out(result)}; saved in {workdir}: checkpoints, metrics.jsonl, curve.png')
  for name in result.data.validation_sets:
    print(f'  {name}: {_held_out(result, f"{name}/")}')
  if text:
    prompt, completion = text
    print(f'\nthe model goes on from {prompt!r}, the first words of a held-out document:\n{prompt}{completion}\n')
    print(f'next: {command("generate", workdir, script, prompt=prompt)}')
  elif sample and run.data.kind is np.ndarray:   # documents
    print(f'next: {command("score", workdir, script, split="validation")}')


def _held_out(result: train.Result, prefix: str = '') -> str:
  """The metrics of the validation data, or of one of its sets."""
  names = ((name, f'validation/{prefix}{name}') for name in METRICS)
  return ', '.join(f'{name} {result.metrics[logged]:.4g}' for name, logged in names if logged in result.metrics)


def command(program: str, workdir: pathlib.Path, script: pathlib.Path | None = None, **flags: Any) -> str:
  """A command that opens a run, to be typed as it stands in the present folder; it names a `script` that lies apart."""
  flags = {'workdir': workdir, **flags}
  if script is not None and script.resolve().parent != _EXPERIMENTS:
    flags['script'] = _from_here(script)
  words = [f'--{name}' if value is True else f'--{name}={shlex.quote(str(value))}' for name, value in flags.items()]
  return ' '.join(['python', shlex.quote(_from_here(_EXPERIMENTS / f'{program}.py')), *words])


def _from_here(path: pathlib.Path) -> str:
  """Relative to the present folder, for what lies in it."""
  path = path.resolve()
  return str(path.relative_to(pathlib.Path.cwd()) if path.is_relative_to(pathlib.Path.cwd()) else path)


def _write(run: train.Run, result: train.Result) -> tuple[str, str] | None:
  """The first words of a held-out document, and what the model writes after them; None where it does not write."""
  model, params = lora.merged(run.model, result.params)
  held_out = result.data.stores.get('validation')
  of_documents = run.data.kind is np.ndarray and run.data.source_length is None
  if not isinstance(model, Decoder) or run.objective.prompt is None or held_out is None or not of_documents:
    return None
  tokens = result.data.tokenizer
  prompt = _first_words(tokens.decode(held_out[0][:48]))
  room = model.max_length - 1 - len(tokens.encode(prompt))
  if room < 1:
    return None
  completion, = generate.generate(model, params, tokens, [prompt], SAMPLING, max_tokens=min(LENGTH, room),
                                  mark=run.objective.prompt)
  return prompt, completion


def _first_words(text: str) -> str:
  """In one line, which is empty where the text is."""
  lines = text.strip().splitlines() or ['']
  return ' '.join(lines[0].split()[:5])[:48].rstrip('\ufffd')   # of a character that was cut
