"""pass@k: how likely one of k programs passes the tests of a problem (Chen et al. 2021, arXiv:2107.03374)."""
import concurrent.futures
import dataclasses
import math
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lm.evaluate.measures import Measure, mean
from lm.evaluate.texts.program_sandbox import Sandbox


class Problem(NamedTuple):
  """A programming problem: a program is prompt + completion, and passes if neither it nor the test raises anything."""
  prompt: str
  test: str


class Attempts(NamedTuple):
  """What came of the programs for all problems."""
  measures: list[Measure]
  results: list[list[str]]   # of each program of each problem: 'passed', or why not


def problem(record: Mapping[str, Any]) -> Problem:
  """Returns the problem of a record of HumanEval, of MBPP, or with `test` and perhaps `prompt`.

  Raises ValueError where the record has no tests.
  """
  match record:
    case {'prompt': str(prompt), 'test': str(test), 'entry_point': str(name)}:
      return Problem(prompt, f'{test}\ncheck({name})')
    case {'test_list': [*tests]}:
      return Problem('', '\n'.join([record.get('test_setup_code', ''), *record.get('test_imports', ()), *tests]))
    case {'test': str(test)}:
      return Problem(record.get('prompt', ''), test)
  raise ValueError(f'a problem has test, or test_list as those of MBPP, and this has {", ".join(record) or "nothing"}')


def probability(samples: int, passed: int, k: int) -> float:
  """Returns the share of the sets of k among `samples` programs that have one of those that `passed`.

  It is the unbiased estimate of pass@k. Raises ValueError for fewer samples than k.
  """
  if not 0 < k <= samples or not 0 <= passed <= samples:
    raise ValueError(f'pass@{k} needs at least {k} programs of a problem, and there are {samples}, of which {passed} '
                     'passed')
  return 1 - math.comb(samples - passed, k) / math.comb(samples, k)


@dataclasses.dataclass(frozen=True)
class PassAtK:
  """The mean of pass@k over problems.

  Args:
    orders: the values of k.
    sandbox: in which programs are executed.
    workers: programs at once; none for as many as there are processors.
  """
  orders: tuple[int, ...] = (1,)
  sandbox: Sandbox = Sandbox()   # noqa: RUF009, which is frozen
  workers: int | None = None

  def __post_init__(self):
    if not self.orders or min(self.orders) < 1 or len(set(self.orders)) < len(self.orders):
      raise ValueError(f'k={",".join(map(str, self.orders))} of pass@k is not one or more different numbers from 1 on')

  def __call__(self, completions: Sequence[Sequence[str]], problems: Sequence[Problem]) -> Attempts:
    """Executes the completions of each problem. Raises ValueError for too few, OSError as `Sandbox.check`."""
    if not problems or len(completions) != len(problems):
      raise ValueError(f'there are {len(problems)} problems and programs of {len(completions)}; give some for each')
    fewest = min(map(len, completions))
    if fewest < max(self.orders):
      raise ValueError(f'pass@{max(self.orders)} needs at least {max(self.orders)} programs of each problem, and one '
                       f'has {fewest}')
    self.sandbox.check()
    programs = [(f'{one.prompt}{completion}\n', f'{one.test}\n') for of_problem, one in zip(completions, problems)
                for completion in of_problem]
    results = iter(self._run(programs))
    results = [[next(results) for _ in of_problem] for of_problem in completions]
    counts = [(len(of_problem), of_problem.count('passed')) for of_problem in results]
    sizes = {size for size, _ in counts}
    signature = (f'samples:{fewest if len(sizes) == 1 else "var"}|seconds:{self.sandbox.seconds:g}|'
                 f'memory:{self.sandbox.memory >> 20}M|python:{platform.python_version()}')
    return Attempts([mean(f'pass@{k}', [probability(size, passed, k) for size, passed in counts], 'higher', signature)
                     for k in self.orders], results)

  def _run(self, programs: Sequence[tuple[str, str]]) -> list[str]:
    results, step = [], max(len(programs) // 10, 20)
    with concurrent.futures.ThreadPoolExecutor(self.workers or os.cpu_count()) as executor:
      try:
        for result in executor.map(self.sandbox.run, *zip(*programs)):
          results.append(result)
          if len(results) % step == 0:
            print(f'pass@k: {len(results):,} of {len(programs):,} programs', file=sys.stderr, flush=True)
      except BaseException:
        executor.shutdown(wait=False, cancel_futures=True)
        raise
    return results
