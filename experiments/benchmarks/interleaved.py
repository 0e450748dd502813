"""Interleaved measurement: each arm of a benchmark is a process; all prepare in turn, then alternate in both orders.

Alternation spreads the noise of a shared machine over all arms. For Linux. An arm is made by a function that returns a
`Prepared`; what that function imports counts in the memory and the start-up time of its arm.
"""
import collections
import concurrent.futures
import contextlib
import functools
import importlib.metadata
import math
import multiprocessing
import os
import pathlib
import platform
import re
import statistics
import tempfile
import threading
import time
import types
from collections.abc import Callable
from typing import Any, NamedTuple

# The sizes of a GPT-2 and of the batch that it trains on.
Shape = collections.namedtuple('Shape', 'vocab width layers heads batch length')
SHAPES = {'tiny': Shape(512, 64, 2, 2, 2, 32), 'small': Shape(8192, 384, 6, 6, 16, 256),
          'large': Shape(50257, 768, 12, 12, 4, 256)}
CACHES = 'JAX_COMPILATION_CACHE_DIR', 'TORCHINDUCTOR_CACHE_DIR'
Prepared = tuple[Callable[[], Any], dict[str, float]]   # a step, which may return a loss; facts for the table


def end_with_parent() -> None:
  """A pool's process outlives a parent that was killed, unless it watches."""
  threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


process = functools.partial(concurrent.futures.ProcessPoolExecutor, 1, multiprocessing.get_context('spawn'),
                            end_with_parent)
_step: Callable[[], Any]   # of the arm whose process this is


class Measurement(NamedTuple):
  rate: float   # units a second, the median of rounds
  cpu: float    # units a second of its threads on a processor: of use where others use the machine too
  loss: float   # of the first step
  peak: float   # GB


def in_process(function: Callable[..., Any], *args: Any) -> Any:
  """Returns `function(*args)`, computed in a process of its own, which then ends."""
  with process() as pool:
    return pool.submit(function, *args).result()


def peak() -> float:
  """GB that this process held at most, since its start or the last call."""
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) * 1024 / 1e9


def measure(steps: int) -> tuple[float, float, float]:
  """In an arm's process: seconds, those of all its threads on a processor, and peak memory."""
  start, busy = time.perf_counter(), time.process_time()
  for _ in range(steps):
    _step()
  return time.perf_counter() - start, time.process_time() - busy, peak()


def prepare(started: float, make: Callable[..., Prepared], *args: Any) -> dict[str, float]:
  """In an arm's process: makes it, and does two steps."""
  global _step
  try:
    _step, facts = make(*args)
    begin = time.time()
    loss = _step() or math.nan
    first = time.time()
    _step()
    if abs(loss - facts.get('expected', math.nan)) > 0.5:
      raise ValueError(f'the first loss is {loss:.3f}, and should be near {facts["expected"]:.3f}')
  except Exception as error:   # as one line, of a type that any process can read
    raise RuntimeError(' '.join(f'{type(error).__name__}: {error}'.split())[:200]) from None
  compiling = max(2 * first - begin - time.time(), 0.)   # what the first step took longer, if not known better
  return {'compile': compiling, 'temp': math.nan, 'weights': 0, **facts, 'first': first - started, 'loss': loss,
          'peak': peak()}


def read_memory(size: int, times: int) -> Prepared:
  """An arm that reads so many bytes, as often, in as many threads as there are cores: no product can be faster."""
  import numpy as np
  threads = len(os.sched_getaffinity(0))
  parts, pool = np.array_split(np.ones(size // 4, np.float32), threads), concurrent.futures.ThreadPoolExecutor(threads)
  # The maximum: NumPy reads twice as much a second for it as for the sum.
  return lambda: [list(pool.map(np.max, parts)) for _ in range(times)] and None, {}


def read_file(path: pathlib.Path) -> Prepared:
  """An arm that reads a file into memory."""
  import numpy as np
  return lambda: np.fromfile(path, np.uint8) is None or None, {}


def machine(*packages: str) -> set[str]:
  """Prints the processor, its load, and the versions of Python and `packages`; returns those that are missing."""
  versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in packages}
  cpu = re.search(r'model name\s*: (.*)|$', pathlib.Path('/proc/cpuinfo').read_text())
  print(cpu[1] or platform.machine(), f'{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}',
        f'python {platform.python_version()}', *sorted(map(' '.join, versions.items())), sep=', ')
  return {*packages} - {*versions}


def compare(title: str, arms: dict[str, tuple], count: int, rounds: int, steps: int, unit: str = 'tokens'
            ) -> dict[str, Measurement]:
  """Prints a table of the arms `name: (make, *arguments)`, of `count` tokens a step; ratios are to the last.

  Returns those that did not fail.
  """
  print(f'\n{title}, {rounds} rounds of {steps} x {count:,} {unit}', flush=True)
  ready, taken = {}, collections.defaultdict(list)
  with contextlib.ExitStack() as stack:
    os.environ |= dict.fromkeys(CACHES, stack.enter_context(tempfile.TemporaryDirectory()))   # nothing is compiled yet
    for name, arm in arms.items():
      pool = stack.enter_context(process())
      try:
        ready[name] = pool, pool.submit(prepare, time.time(), *arm).result()
      except RuntimeError as error:   # also of a process that died
        print(f'  {name} failed: {error}', flush=True)
    for number in range(rounds):
      for name in list(ready)[::-1 if number % 2 else 1]:
        taken[name].append(ready[name][0].submit(measure, steps).result())
  print(f'{unit + "/s":>24}   ratio (of rounds)  CPU   peak GB  ratio  steps GB  temp GB  compile s  to step 1    loss'
        '   weights')
  rows = {name: (*zip(*taken[name]), facts) for name, (_, facts) in ready.items()}
  for name, (seconds, busy, memory, facts) in rows.items():
    base_seconds, base_busy, base_memory, base_facts = rows[list(rows)[-1]]
    median, most = statistics.median(seconds), max(facts['peak'], *memory)
    ratios = sorted(b / a for a, b in zip(seconds, base_seconds))
    spread = f'({ratios[0]:.2f}..{ratios[-1]:.2f})' if seconds is not base_seconds else ''
    print(f'  {name:13}{count * steps / median:9,.0f}{statistics.median(base_seconds) / median:8.2f} {spread:13}'
          f'{statistics.median(base_busy) / statistics.median(busy):6.2f}'
          f'{most:6.2f}{most / max(base_facts["peak"], *base_memory):7.2f}{max(memory):10.2f}{facts["temp"]:9.2f}'
          f'{facts["compile"]:11.1f}{facts["first"]:11.1f}{facts["loss"]:8.3f}{facts["weights"]:12,}'
          .replace('nan', '  -'), flush=True)
  return {name: Measurement(*(count * steps / statistics.median(times) for times in (seconds, busy)), facts['loss'],
                       max(facts['peak'], *memory)) for name, (seconds, busy, memory, facts) in rows.items()}


def tokens(vocab: int, *shape: int) -> Any:
  import numpy as np
  return np.random.default_rng(0).integers(0, vocab, shape, np.int32)


def documents(vocab: int) -> Any:
  """Random tokens on disk, about as many documents and as long as those of Python's library."""
  import numpy as np
  offsets = np.r_[0, np.cumsum(np.random.default_rng(0).lognormal(7.5, 1.3, 1000).astype(np.int64) + 1)]
  with tempfile.TemporaryFile() as file:   # the map outlives it
    stored = np.memmap(file, np.uint16, 'w+', shape=int(offsets[-1]))
  stored[:] = tokens(vocab, len(stored))
  return types.SimpleNamespace(tokens=stored, offsets=offsets)


def take_turns(make: Callable[..., Prepared], names: list[str], shape: Shape, rounds: int, steps: int
               ) -> dict[str, tuple[list[float], dict[str, float]]]:
  """Returns for each name its seconds for a token seen, a number a round, and its facts."""
  seconds_by_name: dict[str, list[float]] = {name: [] for name in names}
  with contextlib.ExitStack() as stack:
    os.environ |= dict.fromkeys(CACHES, stack.enter_context(tempfile.TemporaryDirectory()))
    pools = {name: stack.enter_context(process()) for name in names}
    facts = {name: pool.submit(prepare, time.time(), make, name, shape).result() for name, pool in pools.items()}
    for number in range(rounds):
      for name in names[::-1 if number % 2 else 1]:
        seconds, *_ = pools[name].submit(measure, steps).result()
        seconds_by_name[name].append(seconds / steps / facts[name]['seen'])
  return {name: (seconds_by_name[name], facts[name]) for name in names}
