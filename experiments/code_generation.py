"""Measures how often a model writes lines and bodies of Python functions that pass tests (pass@k).

  python experiments/infill.py
  python experiments/code_generation.py --workdir=runs/infill --execute_code
  python experiments/code_generation.py --model=models/coder --problems=HumanEval.jsonl.gz --execute_code

The second command takes 29 s of CPU time. The model of infill.py after 2.5 minutes passes none of 34 functions of
Python's library, neither bodies nor lines, with 5 programs each; the library's own code passes all of them. Most of
what it writes is no valid Python, or uses names that do not exist. docs/applications.md has examples.
"""
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from lm import generate, launch, load, sharding
from lm.evaluate import code_holes, report, texts
from lm.evaluate.code_holes import Hole
from lm.evaluate.report import Result
from lm.evaluate.texts import text_files
from lm.evaluate.texts.pass_at_k import Attempts
from lm.hf import pretrained
from lm.objectives import infill


def measure(*, workdir: pathlib.Path | None = None, model: str | None = None, problems: pathlib.Path | None = None,
            limit: int | None = None, samples: int = 5, k: tuple[int, ...] = (1, 5), temperature: float = 0.6,
            max_tokens: int = 64, seed: int = 0, execute_code: bool = False, seconds: float = 10.,
            allow_no_isolation: bool = False, out: pathlib.Path | None = None, best: bool = False) -> None:
  """Lets a model write code, and executes it.

  Args:
    workdir: of the run; none for runs/quickstart. A run of infill.py writes single lines too, from what is before and
      after them.
    model: a Hugging Face folder, an imported one, an id on the hub or the workdir of a run, in place of --workdir.
    problems: the file of HumanEval or MBPP, such as HumanEval.jsonl.gz; none takes functions of Python's library.
    limit: the first so many problems; none for all.
    samples: programs of each problem.
    k: the values of k, of pass@k.
    temperature: divides the logits.
    max_tokens: tokens that are written for each program, of which those after its end are not used.
    seed: of the draws.
    execute_code: allows what the model wrote to be executed, each program in a process of its own; it is needed.
    seconds: that a program may take.
    allow_no_isolation: execute without namespaces, with limits alone, where the system has none.
    out: the folder for the results; none for the folder `code_generation` of the run, and nowhere for another model.
    best: take the best checkpoint, not the newest.
  """
  if not execute_code:
    raise ValueError('pass@k executes what a model wrote, which nobody has read; --execute_code allows it')
  if limit is not None and limit < 1:
    raise ValueError(f'limit={limit} must be at least 1')
  if max(k) > samples:
    raise ValueError(f'k={max(k)} of pass@k is more than samples={samples}; raise --samples, or lower --k')
  metric = texts.PassAtK(k, texts.Sandbox(seconds=seconds, isolated=not allow_no_isolation))
  metric.sandbox.check()
  workdir, model = load.run_or_model(workdir, model, best)
  results, holes = {}, holes_of(problems, limit)
  with jax.set_mesh(sharding.make_mesh()):
    loaded = pretrained.load(model) if model else load.open_trained(workdir, best)
    if loaded.model.max_length < max_tokens + 8:
      raise ValueError(f'max_tokens={max_tokens} leaves no room for a program in the {loaded.model.max_length} tokens '
                       'that the model reads at once; give fewer')
    # The tokenizer of any run has these tokens, and only some objectives teach what they mean.
    if not set(infill.NAMES) <= set(loaded.tokenizer.control_names if model else loaded.run.objective.control):
      holes.pop('line', None)
    for kind, several in holes.items():
      write = fill if kind == 'line' else go_on
      written = np.array(write(loaded, [hole for hole in several for _ in range(samples)],
                               generate.Sampling(temperature), max_tokens, seed), object).reshape(-1, samples)
      attempts = passed(metric, several, written)
      results[kind] = report.to_json(Result(attempts.measures))
      answers = [[hole.answer] for hole in several]
      own = passed(texts.PassAtK((1,), metric.sandbox), several, answers)
      results[f'{kind} of its author'] = report.to_json(Result(own.measures))
      show(kind, several, written, attempts)
  print(f'\n{report.table(results)}')
  folder = out or (None if model else workdir / 'code_generation')
  if folder:
    folder.mkdir(parents=True, exist_ok=True)
    report.write(folder, {'model': model or workdir.name, 'problems': str(problems), 'samples': samples,
                          'temperature': temperature, 'seed': seed, 'max_tokens': max_tokens}, results)
    print(f'written to {folder}')


def holes_of(problems: pathlib.Path | None, limit: int | None) -> dict[str, Sequence[Hole]]:
  """Returns the holes of each kind: those of a file of problems, or of Python's library."""
  if problems:
    return {problems.name.split('.')[0]: code_holes.of_records(text_files.read(problems))[:limit]}
  return {'body': code_holes.bodies()[:limit], 'line': code_holes.lines()[:limit]}


def show(kind: str, holes: Sequence[Hole], written: Sequence[Sequence[str]], attempts: Attempts) -> None:
  """Prints one program of each hole, which passes if any does, and what came of it."""
  for hole, row, outcomes in zip(holes, written, attempts.results):
    place = outcomes.index('passed') if 'passed' in outcomes else 0
    print(f'{kind} {hole.name}: {hole.cut(row[place])[:200]!r} {outcomes[place][:60]}')


def passed(metric: texts.PassAtK, holes: Sequence[Hole], written: Sequence[Sequence[str]]) -> Attempts:
  """Executes the programs with what was written for each hole."""
  programs = [[hole.cut(text) + hole.after for text in row] for hole, row in zip(holes, written)]
  return metric(programs, [hole.problem for hole in holes])


def go_on(loaded: Any, holes: Sequence[Hole], sampling: generate.Sampling, max_tokens: int, seed: int) -> list[str]:
  """Returns what a model writes after the text before each hole. It reads the end of a text that does not fit."""
  room = loaded.model.max_length - max_tokens - 1
  encoded = loaded.tokenizer.encode_batch([hole.before for hole in holes])
  prompts = [hole.before if len(ids) <= room else loaded.tokenizer.decode(ids[-room:])
             for hole, ids in zip(holes, encoded)]
  return generate.generate(loaded.model, loaded.params, loaded.tokenizer, prompts, sampling, max_tokens=max_tokens,
                           stop=holes[0].stop, seed=seed)


def fill(loaded: Any, holes: Sequence[Hole], sampling: generate.Sampling, max_tokens: int, seed: int) -> list[str]:
  """Returns what a model of `infill.py` writes in each hole. It reads as much of the text around it as fits."""
  tokens = loaded.tokenizer
  room = (loaded.model.max_length - max_tokens - 4) // 2   # bos and the three tokens of an arrangement
  parts = [(tokens.encode(hole.before)[-room:], np.zeros(0, np.int32), tokens.encode(hole.after)[:room])
           for hole in holes]
  prompts = [infill.arrange(part, [tokens.control_id(name) for name in infill.NAMES], spm=True) for part in parts]
  written = generate.tokens(loaded.model, loaded.params, tokens, prompts, sampling, max_tokens=max_tokens, seed=seed)
  return [tokens.decode(ids) for ids in written]


if __name__ == '__main__':
  launch.tool(measure)
