"""Prints the outcome of a finished run: metrics on held-out data, a sample of its text, and the next command."""
import pathlib
import shlex
from typing import Any

import jax
import numpy as np

from lm import generate, lora, train
from lm.train.interfaces import Decoder
from lm.workdir import figures

_METRICS = 'loss', 'perplexity', 'bits_per_byte', 'accuracy'
_LENGTH = 64   # the most tokens of a sample
_SAMPLING = generate.Sampling(0.8, top_p=0.95)
_EXPERIMENTS = pathlib.Path(__file__).resolve().parents[2] / 'experiments'


def show(run: train.Run, workdir: pathlib.Path, result: train.Result, script: pathlib.Path, sample: bool) -> None:
  """Draws the loss curve and prints the metrics of a run.

  With `sample`, also prints text that the model writes, if it can, and the next command. `script` is the script of the
  run. All processes of a cluster have to call this function; process 0 prints.
  """
  text = _sample(run, result) if sample else None
  if jax.process_index():
    return
  if (workdir / 'metrics.jsonl').exists():
    figures.curve(workdir / 'metrics.jsonl', workdir / 'curve.png')
  print(f'held out: {_held_out(result)}; saved in {workdir}: checkpoints, metrics.jsonl, curve.png')
  for name in result.data.validation_sets:
    print(f'  {name}: {_held_out(result, f"{name}/")}')
  if text:
    prompt, completion = text
    print(f'\nthe model continues {prompt!r}, the first words of a held-out document:\n{prompt}{completion}\n')
    print(f'next: {command("generate", workdir, script, prompt=prompt)}')
  elif sample and run.data.kind is np.ndarray:   # the records are documents
    print(f'next: {command("score", workdir, script, split="validation")}')


def _held_out(result: train.Result, prefix: str = '') -> str:
  """Returns in words the metrics of the validation data, or of the set that `prefix` names."""
  values = {name: result.metrics.get(f'validation/{prefix}{name}') for name in _METRICS}
  return ', '.join(f'{name} {value:.4g}' for name, value in values.items() if value is not None)


def command(program: str, workdir: pathlib.Path, script: pathlib.Path | None = None, **flags: Any) -> str:
  """Returns a command that opens a run from the present folder.

  `program` is the name of an experiment's script. The command names `script`, which defines the run, where that is not
  in the folder of the experiments.
  """
  flags = {'workdir': workdir, **flags}
  if script is not None and script.resolve().parent != _EXPERIMENTS:
    flags['script'] = _relative(script)
  words = [f'--{name}' if value is True else f'--{name}={shlex.quote(str(value))}' for name, value in flags.items()]
  return ' '.join(['python', shlex.quote(_relative(_EXPERIMENTS / f'{program}.py')), *words])


def _relative(path: pathlib.Path) -> str:
  """Returns a path relative to the present folder where it lies in it, else the whole path."""
  path, folder = path.resolve(), pathlib.Path.cwd()
  return str(path.relative_to(folder) if path.is_relative_to(folder) else path)


def _sample(run: train.Run, result: train.Result) -> tuple[str, str] | None:
  """Returns the first words of a held-out document and their continuation; None for a model that generates no text."""
  model, params = lora.merge(run.model, result.params)
  held_out = result.data.stores.get('validation')
  has_documents = run.data.kind is np.ndarray and run.data.source_length is None
  if not isinstance(model, Decoder) or run.objective.prompt is None or held_out is None or not has_documents:
    return None
  tokens = result.data.tokenizer
  prompt = _first_words(tokens.decode(held_out[0][:48]))
  remaining = model.max_length - 1 - len(tokens.encode(prompt))
  if remaining < 1:
    return None
  completion, = generate.generate(model, params, tokens, [prompt], _SAMPLING, max_tokens=min(_LENGTH, remaining),
                                  mark=run.objective.prompt)
  return prompt, completion


def _first_words(text: str) -> str:
  """Returns the first five words of the first line of a text."""
  lines = text.strip().splitlines() or ['']
  return ' '.join(lines[0].split()[:5])[:48].rstrip('\ufffd')   # the end of the text may cut a character
