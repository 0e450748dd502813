"""Measures how often a model writes lines and bodies of functions of Python's library that pass tests (pass@k).

  python experiments/infill.py
  python experiments/library_code.py --workdir=runs/infill --execute_code
"""
import pathlib

import jax
import numpy as np

from lm import generate, launch, load, sharding
from lm.data.text import library_functions
from lm.evaluate import report, texts
from lm.evaluate.report import Result
from lm.objectives.infill import NAMES, arrange


def first_line(text: str) -> str:
  """Returns a text up to the end of its first line."""
  return text.partition('\n')[0]


def indented(text: str) -> str:
  """Returns the lines of a text before the first one that is neither indented nor blank: the body of a function."""
  lines = text.splitlines(keepends=True)
  end = next((i for i, line in enumerate(lines) if line.strip() and line[0] not in ' \t'), len(lines))
  return ''.join(lines[:end])


def measure(*, workdir: pathlib.Path = pathlib.Path('runs/infill'), samples: int = 10, k: tuple[int, ...] = (1, 10),
            temperature: float = 0.6, max_tokens: int = 48, seed: int = 0, execute_code: bool = False,
            seconds: float = 10., allow_no_isolation: bool = False, out: pathlib.Path | None = None,
            best: bool = False) -> None:
  """Lets a model write code of 35 functions, and executes it.

  Args:
    workdir: of the run. A model that fills in (infill.py) writes lines too, from what is before and after them.
    samples: programs of each problem.
    k: the values of k, of pass@k.
    temperature: divides the logits.
    max_tokens: tokens of a line or of a body.
    seed: of the draws.
    execute_code: allows what the model wrote to be executed, each program in a process of its own; it is needed.
    seconds: that a program may take.
    allow_no_isolation: execute without namespaces, with limits alone, where the system has none.
    out: the folder for the results; none for the folder `library_code` of the run.
    best: take the best checkpoint, not the newest.
  """
  if not execute_code:
    raise ValueError('pass@k executes what a model wrote; --execute_code allows it')
  if max(k) > samples:
    raise ValueError(f'k={max(k)} of pass@k is more than samples={samples}; raise --samples, or lower --k')
  metric = texts.PassAtK(k, texts.Sandbox(seconds=seconds, isolated=not allow_no_isolation))
  metric.sandbox.check()
  folder = out or workdir / 'library_code'
  folder.mkdir(parents=True, exist_ok=True)
  with jax.set_mesh(sharding.make_mesh()):
    loaded = load.open_trained(workdir, best)
    model, tokens = loaded.model, loaded.tokenizer
    kinds = {'body': (library_functions.body, indented)}
    if set(NAMES) <= set(loaded.run.objective.control):
      kinds['line'] = library_functions.line, first_line
    results = {}
    for kind, (make, cut) in kinds.items():
      cases = [make(name) for name in library_functions.CALLS]
      problems = [texts.Problem(case.setup + case.before, case.test) for case in cases]
      room = (model.max_length - max_tokens - 4) // len(kinds)
      prompts = [prompt(tokens, case, room, kind == 'line') for case in cases for _ in range(samples)]
      written = generate.tokens(model, loaded.params, tokens, prompts, generate.Sampling(temperature),
                                max_tokens=max_tokens, seed=seed)
      middles = np.array([cut(tokens.decode(ids)) for ids in written], object).reshape(len(cases), samples)
      programs = [[middle + case.after for middle in row] for case, row in zip(cases, middles)]
      attempts = metric(programs, problems)
      results[kind] = report.to_json(Result(attempts.measures))
      for case, row, outcomes in zip(cases, middles, attempts.results):
        print(f'{kind} {case.name}: {row[0]!r:.80} {outcomes[0]:.60}')
  report.write(folder, {'workdir': workdir.name, 'step': loaded.step, 'temperature': temperature, 'seed': seed,
                        'max_tokens': max_tokens}, results)
  print(f'\n{report.table(results)}\n\nwritten to {folder}')


def prompt(tokens, case: library_functions.Case, room: int, fills: bool) -> np.ndarray:
  """Returns the tokens before what is to be written: `room` of what is before it and, if `fills`, of what is after."""
  before = np.int32(tokens.encode(case.before)[-room:])
  if not fills:
    return before
  after = np.int32(tokens.encode(case.after)[:room])
  return arrange((before, np.zeros(0, np.int32), after), [tokens.control_id(name) for name in NAMES], spm=True)


if __name__ == '__main__':
  launch.tool(measure)
