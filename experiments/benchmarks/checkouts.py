"""How fast does this checkout generate text, compared with another one? By CPU time, in turns, on this machine.

  git worktree add ../before 80b2131
  python experiments/benchmarks/checkouts.py --other=../before

A decoder of 4 layers and a width of 256, with a vocabulary of 8,192, writes 128 tokens after prompts of 32. Each
checkout runs in a process of its own, and both have to write the same tokens. Linux only.
"""
import contextlib
import os
import pathlib
import statistics
import subprocess
import sys

from lm import launch

ROOT = pathlib.Path(__file__).resolve().parents[2]
TOKENS = 128
CASES = {'batch 1, greedy': (1, 0, 0.), 'batch 1, top-k 50': (1, 50, 1.), 'batch 8, greedy': (8, 0, 0.),
         'batch 8, top-k 50': (8, 50, 1.)}
# Generates once for each line 'batch top_k temperature': prints seconds of CPU time, and the tokens.
WORKER = f"""
import sys, time
import jax, numpy as np
from lm import generate
from lm.models import transformer
try:
  from lm.data.tokenizers import Bytes
except ImportError:   # an older checkout
  from lm.data.tokenizer import Bytes

class Tokenizer(Bytes):
  vocab_size, eos_ids = 8192, (3,)

model = transformer.llama(8192, 256, 4, 4, max_length=512)
params = jax.jit(model.init)(jax.random.key(0))
prompts = np.random.default_rng(0).integers(10, 8192, (8, 32), np.int32)
for line in sys.stdin:
  batch, top_k, temperature = line.split()
  start = time.process_time()
  rows = generate.tokens(model, params, Tokenizer(), list(prompts[:int(batch)]),
                         generate.Sampling(float(temperature), top_k=int(top_k)), max_tokens={TOKENS}, seed=1)
  print(time.process_time() - start, *np.concatenate(rows).tolist(), flush=True)
"""


def main(*, other: pathlib.Path, rounds: int = 5) -> None:
  """Prints tokens per second of CPU time of both checkouts, and the ratios of the rounds.

  Args:
    other: the folder of the other checkout.
    rounds: how often each case is measured.
  """
  if not (other / 'lm').is_dir():
    raise FileNotFoundError(f'--other={other} is no checkout; "git worktree add {other} COMMIT" makes one')
  if rounds < 1:
    raise ValueError(f'--rounds={rounds} measures nothing; give it 1 at least')
  with contextlib.ExitStack() as stack:
    processes = [stack.enter_context(start(tree)) for tree in (other.resolve(), ROOT)]
    for name, case in CASES.items():
      (_, before), (_, now) = (generate(process, case) for process in processes)   # compiles
      if before != now:
        raise ValueError(f'{name}: the checkouts write different tokens, so that their speed cannot be compared')
      times = []
      for turn in range(rounds):
        first, second = (generate(process, case)[0] for process in processes[::1 if turn % 2 else -1])
        times.append((first, second) if turn % 2 else (second, first))
      show(name, len(now), times)


def start(tree: pathlib.Path) -> subprocess.Popen:
  """A process that generates text with the code of a checkout."""
  environment = {**os.environ, 'PYTHONPATH': str(tree), 'JAX_PLATFORMS': 'cpu'}
  return subprocess.Popen([sys.executable, '-P', '-c', WORKER], env=environment, cwd=tree, text=True,
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE)


def generate(process: subprocess.Popen, case: tuple[int, int, float]) -> tuple[float, list[str]]:
  """Returns the seconds of CPU time that a case takes, and the tokens."""
  print(*case, file=process.stdin, flush=True)
  seconds, *tokens = process.stdout.readline().split()
  return float(seconds), tokens


def show(name: str, tokens: int, times: list[tuple[float, float]]) -> None:
  """Prints a line for the times (other checkout, this one) of the rounds."""
  before, now = (tokens / statistics.median(column) for column in zip(*times))
  ratios = sorted(first / second for first, second in times)
  print(f'{name:18} {before:6.0f} tokens/s there, {now:6.0f} here: {statistics.median(ratios):.2f}x '
        f'({ratios[0]:.2f}-{ratios[-1]:.2f})', flush=True)


if __name__ == '__main__':
  launch.tool(main)
