"""Interleaved measurement: each arm of a benchmark is a process; the arms prepare in turn, then alternate.

Rounds go through the arms forwards and backwards in turn, which spreads the noise of a shared machine over all arms.
Linux only. An arm is a function that returns a `Prepared`. Its imports count in the memory and the start-up time of
the arm, so libraries are imported inside functions.
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
Prepared = tuple[Callable[[], Any], dict[str, float]]   # a step, which may return a loss; numbers for the table


def end_with_parent() -> None:
  """Ends this process when its parent ends. Without this, the process of a pool outlives a parent that is killed."""
  threading.Thread(target=lambda: (multiprocessing.parent_process().join(), os._exit(1)), daemon=True).start()


process = functools.partial(concurrent.futures.ProcessPoolExecutor, 1, multiprocessing.get_context('spawn'),
                            end_with_parent)
_step: Callable[[], Any]   # the step of the arm whose process this is


class Measurement(NamedTuple):
  """The result of an arm.

  Args:
    rate: units per second, the median over rounds.
    cpu: units per second of CPU time, which other programs on the machine disturb less.
    loss: loss of the first step.
    peak: peak memory in GB.
  """
  rate: float
  cpu: float
  loss: float
  peak: float


def in_process(function: Callable[..., Any], *args: Any) -> Any:
  """Returns `function(*args)`, computed in a separate process, which then ends."""
  with process() as pool:
    return pool.submit(function, *args).result()


def peak() -> float:
  """Returns the peak memory of this process in GB, since its start or the last call."""
  lines = pathlib.Path('/proc/self/status').read_text().splitlines()
  with contextlib.suppress(OSError):
    pathlib.Path('/proc/self/clear_refs').write_text('5')
  return next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) * 1024 / 1e9


def measure(steps: int) -> tuple[float, float, float]:
  """Returns the seconds of `steps` steps, their CPU seconds, and the peak memory. Runs in the process of an arm."""
  start, busy = time.perf_counter(), time.process_time()
  for _ in range(steps):
    _step()
  return time.perf_counter() - start, time.process_time() - busy, peak()


def prepare(started: float, function: Callable[..., Prepared], *args: Any) -> dict[str, float]:
  """Prepares an arm and runs two steps. Returns the numbers for the table. Runs in the process of the arm.

  Raises:
    RuntimeError: with any error of the arm on one line.
  """
  global _step
  try:
    _step, facts = function(*args)
    begin = time.time()
    loss = _step() or math.nan
    first = time.time()
    _step()
    if abs(loss - facts.get('expected', math.nan)) > 0.5:
      raise ValueError(f'the first loss is {loss:.3f}, and should be near {facts["expected"]:.3f}')
  except Exception as error:   # the parent may not have the library whose error this is
    raise RuntimeError(' '.join(f'{type(error).__name__}: {error}'.split())[:200]) from None
  compiling = max(2 * first - begin - time.time(), 0.)   # the first step minus the second, unless the arm measures it
  return {'compile': compiling, 'temp': math.nan, 'weights': 0, **facts, 'first': first - started, 'loss': loss,
          'peak': peak()}


def read_memory(size: int, times: int) -> Prepared:
  """An arm that reads `size` bytes of memory `times` times, with a thread for each core.

  Its rate is an upper bound for matrix products that read as much.
  """
  import numpy as np
  threads = len(os.sched_getaffinity(0))
  parts, pool = np.array_split(np.ones(size // 4, np.float32), threads), concurrent.futures.ThreadPoolExecutor(threads)
  # NumPy computes the maximum of an array twice as fast as the sum.
  return lambda: [list(pool.map(np.max, parts)) for _ in range(times)] and None, {}


def read_file(path: pathlib.Path) -> Prepared:
  """An arm that reads a file into memory."""
  import numpy as np
  return lambda: np.fromfile(path, np.uint8) is None or None, {}


def machine(*packages: str) -> set[str]:
  """Prints the processor, its load, and the versions of Python and `packages`. Returns the packages not installed."""
  versions = {d.name: d.version for d in importlib.metadata.distributions() if d.name in packages}
  cpu = re.search(r'model name\s*: (.*)|$', pathlib.Path('/proc/cpuinfo').read_text())
  print(cpu[1] or platform.machine(), f'{len(os.sched_getaffinity(0))} cores, load {os.getloadavg()[0]:.1f}',
        f'python {platform.python_version()}', *sorted(map(' '.join, versions.items())), sep=', ')
  return {*packages} - {*versions}


def compare(title: str, arms: dict[str, tuple], count: int, rounds: int, steps: int, unit: str = 'tokens'
            ) -> dict[str, Measurement]:
  """Measures the arms `name: (function, *arguments)`, and prints a table. Ratios are to the last arm.

  `count` is the number of units that a step processes. Returns the results of the arms that did not fail.
  """
  print(f'\n{title}, {rounds} rounds of {steps} x {count:,} {unit}', flush=True)
  pools, facts, samples = {}, {}, collections.defaultdict(list)
  with contextlib.ExitStack() as stack:
    os.environ |= dict.fromkeys(CACHES, stack.enter_context(tempfile.TemporaryDirectory()))   # empty caches
    for name, arm in arms.items():
      pool = stack.enter_context(process())
      try:
        facts[name] = pool.submit(prepare, time.time(), *arm).result()
        pools[name] = pool
      except RuntimeError as error:   # includes the error of a process that died
        print(f'  {name} failed: {error}', flush=True)
    for number in range(rounds):
      for name in list(pools)[::-1 if number % 2 else 1]:
        samples[name].append(pools[name].submit(measure, steps).result())
  print(f'{unit + "/s":>24}   ratio (of rounds)  CPU   peak GB  ratio  steps GB  temp GB  compile s  to step 1    loss'
        '   weights')
  results: dict[str, Measurement] = {}
  seconds_by_name = {}
  for name in facts:
    seconds, busy, memory = zip(*samples[name])
    seconds_by_name[name] = seconds
    results[name] = Measurement(count * steps / statistics.median(seconds), count * steps / statistics.median(busy),
                                facts[name]['loss'], max(facts[name]['peak'], *memory))
  for name, result in results.items():
    base = list(results)[-1]
    ratios = sorted(b / a for a, b in zip(seconds_by_name[name], seconds_by_name[base]))
    spread = f'({ratios[0]:.2f}..{ratios[-1]:.2f})' if name != base else ''
    memory = max(sample[2] for sample in samples[name])
    print(f'  {name:13}{result.rate:9,.0f}{result.rate / results[base].rate:8.2f} {spread:13}'
          f'{result.cpu / results[base].cpu:6.2f}{result.peak:6.2f}{result.peak / results[base].peak:7.2f}'
          f'{memory:10.2f}{facts[name]["temp"]:9.2f}{facts[name]["compile"]:11.1f}{facts[name]["first"]:11.1f}'
          f'{facts[name]["loss"]:8.3f}{facts[name]["weights"]:12,}'.replace('nan', '  -'), flush=True)
  return results


def torch_library() -> Any:
  """Returns the module `torch`, which uses all cores."""
  import torch
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  return torch


def transformers_library() -> Any:
  """Returns the module `transformers`, without progress bars."""
  torch_library()
  import transformers
  transformers.utils.logging.disable_progress_bar()
  return transformers


def open_folder(folder: pathlib.Path, sets_mesh: bool = True) -> tuple[Any, Any]:
  """Returns our model and the parameters of a Hugging Face folder, on a mesh of all devices if it sets one."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax

  from lm import sharding
  from lm.hf import files, weights
  if sets_mesh:
    jax.set_mesh(sharding.make_mesh())
  model, family = weights.open_model(folder)
  with files.Weights(folder) as tensors:
    return model, weights.load_params(model, family, tensors)


def tokens(vocab: int, *shape: int) -> Any:
  """Returns random tokens, int32."""
  import numpy as np
  return np.random.default_rng(0).integers(0, vocab, shape, np.int32)


def documents(vocab: int) -> Any:
  """Returns a store of random tokens on disk, whose documents are about as many and as long as Python's library."""
  import numpy as np
  offsets = np.r_[0, np.cumsum(np.random.default_rng(0).lognormal(7.5, 1.3, 1000).astype(np.int64) + 1)]
  with tempfile.TemporaryFile() as file:   # the memory map stays valid after the file is closed
    stored = np.memmap(file, np.uint16, 'w+', shape=int(offsets[-1]))
  stored[:] = tokens(vocab, len(stored))
  return types.SimpleNamespace(tokens=stored, offsets=offsets)


def take_turns(function: Callable[..., Prepared], names: list[str], shape: Shape, rounds: int, steps: int
               ) -> dict[str, tuple[list[float], dict[str, float]]]:
  """Measures the arms `function(name, shape)`.

  Returns for each name the seconds per unit in each round, and its numbers for the table, of which 'units' is the
  number of units that a step processes.
  """
  seconds_by_name: dict[str, list[float]] = {name: [] for name in names}
  with contextlib.ExitStack() as stack:
    os.environ |= dict.fromkeys(CACHES, stack.enter_context(tempfile.TemporaryDirectory()))
    pools = {name: stack.enter_context(process()) for name in names}
    facts = {name: pool.submit(prepare, time.time(), function, name, shape).result() for name, pool in pools.items()}
    for number in range(rounds):
      for name in names[::-1 if number % 2 else 1]:
        seconds, *_ = pools[name].submit(measure, steps).result()
        seconds_by_name[name].append(seconds / steps / facts[name]['units'])
  return {name: (seconds_by_name[name], facts[name]) for name in names}
