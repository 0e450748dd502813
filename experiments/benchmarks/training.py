"""How fast is this on the CPU of this machine, beside PyTorch? Training, start-up, data; decoding: huggingface.py.

  python experiments/benchmarks/training.py --what=training --shape=large --precision=bfloat16

Each arm is a process of its own. They get ready one after the other, then take turns, in both orders; the median
counts. Leave the machine alone meanwhile. For Linux. PyTorch: pip install 'lm[benchmark]', and a C++ compiler.
"""
import itertools
import math
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from typing import Any, Literal, get_args

import interleaved
from interleaved import SHAPES, Prepared, Shape, documents, tokens

from lm import launch  # nothing heavy here: what an arm imports counts in its memory and its start-up time


def ours(shape: Shape, precision: str) -> Any:
  """Our model, on the mesh that is set."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax

  from lm import sharding
  from lm.models import transformer
  jax.set_mesh(sharding.make_mesh())
  return transformer.gpt2(*shape[:4], shape.length, dtype=jax.numpy.dtype(precision))


def ours_training(shape: Shape, precision: str) -> Prepared:
  model = ours(shape, precision)
  import jax
  import numpy as np

  from lm import optim, sharding, train
  from lm.data.batch import Batch
  from lm.objectives.next_token import next_token
  optimizer = optim.adamw(lambda step: 1e-3, weight_decay=0.1, b1=0.9, b2=0.95, clip=1.)
  run = train.Run(model, next_token(), None, optimizer, steps=1, batch=shape.batch)
  ids = tokens(shape.vocab, shape.batch, shape.length + 1)
  batch = Batch(ids[:, :-1], ids[:, 1:], np.ones(ids[:, 1:].shape, np.float32))
  batch = sharding.shard_rows(batch, jax.sharding.get_mesh())
  state = jax.block_until_ready(jax.jit(lambda: train.init(run))())
  start = time.perf_counter()
  step = train.make_step(run).lower(state, batch).compile()
  facts = {'compile': time.perf_counter() - start, 'temp': step.memory_analysis().temp_size_in_bytes / 1e9,
           'weights': sum(x.size for x in jax.tree.leaves(state.params)), 'expected': math.log(shape.vocab)}

  def go():
    nonlocal state
    state, metrics = step(state, batch)
    return float(metrics['loss'])   # waits for the step
  return go, facts


def ours_pipeline(shape: Shape) -> Prepared:
  """Packs documents into rows."""
  from lm.data.batch import Special
  from lm.data.rows.packed_documents import Stream
  from lm.objectives.next_token import next_token
  steps = itertools.count()
  batches = Stream(next_token(), Special(1, 2, shape.vocab, ()), shape.length, shape.batch,
                   store=documents(shape.vocab))
  return lambda: batches(next(steps)) and None, {}


def pytorch() -> Any:
  import torch
  torch.set_num_threads(len(os.sched_getaffinity(0)))
  torch.manual_seed(0)
  return torch


def torch_training(shape: Shape, precision: str, compiled: bool) -> Prepared:
  """The same in PyTorch, with its fused attention: measured faster than the model in transformers."""
  torch = pytorch()
  nn, functional, width = torch.nn, torch.nn.functional, shape.width

  class Attention(nn.Module):
    def __init__(self):
      super().__init__()
      self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
      q, k, v = self.qkv(x).unflatten(-1, (3, shape.heads, -1)).permute(2, 0, 3, 1, 4)
      return self.out(functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))

  class Residual(nn.Sequential):
    def forward(self, x):
      return x + super().forward(x)

  embedding, positions = nn.Embedding(shape.vocab, width), nn.Embedding(shape.length, width)
  blocks = nn.Sequential(*(nn.Sequential(
      Residual(nn.LayerNorm(width), Attention()),
      Residual(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU('tanh'), nn.Linear(4 * width, width)),
  ) for _ in range(shape.layers)), nn.LayerNorm(width))
  parameters = list(nn.ModuleList([embedding, positions, blocks]).parameters())
  matrices, others = ([p for p in parameters if (p.ndim > 1) == matrix] for matrix in (True, False))
  for matrix in matrices:
    nn.init.normal_(matrix, std=0.02)
  optimizer = torch.optim.AdamW([{'params': matrices, 'weight_decay': 0.1}, {'params': others, 'weight_decay': 0.}],
                                lr=1e-3, betas=(0.9, 0.95), fused=True)
  ids = torch.from_numpy(tokens(shape.vocab, shape.batch, shape.length + 1)).long()
  x, y = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

  def forward(x, y):
    hidden = blocks(embedding(x) + positions.weight)
    return functional.cross_entropy(functional.linear(hidden, embedding.weight).flatten(0, 1), y.flatten())
  compute = torch.compile(forward) if compiled else forward

  def go():
    with torch.autocast('cpu', torch.bfloat16, enabled=precision == 'bfloat16'):
      loss = compute(x, y)
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()
  return go, {'weights': sum(p.numel() for p in parameters), 'expected': math.log(shape.vocab)}


def startup(shape: Shape) -> None:
  """Prints what a user waits for: medians of three, and the first step with nothing and with all in the cache."""
  print('\nstart-up, seconds')
  pretrain = str(pathlib.Path(__file__).parents[1] / 'pretrain.py')
  for command in (['-c', 'import jax'], ['-c', 'import lm.train'], [pretrain, '--help']):
    run = lambda command=command: subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
    print(f'{statistics.median(timeit.repeat(run, number=1, repeat=3)):8.2f}  python {" ".join(command)}', flush=True)
  with tempfile.TemporaryDirectory() as folder:
    os.environ |= dict.fromkeys(interleaved.CACHES, folder)
    for name in ('first step', 'first step, from the cache'):
      with interleaved.process() as pool:
        facts = pool.submit(interleaved.prepare, time.time(), ours_training, shape, 'float32').result()
      print(f'{facts["first"]:8.2f}  {name}', flush=True)


What = Literal['training', 'startup', 'pipeline']
Arm = Literal['ours', 'torch_eager', 'torch_compile']


def benchmark(*, what: list[What] = get_args(What), arms: list[Arm] = get_args(Arm),   # noqa: B008
              shape: Literal['tiny', 'small', 'large'] = 'small',
              precision: Literal['float32', 'bfloat16'] = 'float32',
              rounds: int = 5, steps: int = 4) -> None:
  """Measures.

  Args:
    shape: of training.
    precision: what training computes in; parameters stay float32.
    steps: of training, a round. There, all arms take a turn.
  """
  if min(rounds, steps) < 1:
    raise ValueError(f'--rounds={rounds} and --steps={steps} must be 1 or more')
  if missing := interleaved.machine('jax', 'jaxlib', 'flax', 'torch'):
    print(f"without {' and '.join(sorted(missing))}, which are not installed (pip install 'lm[benchmark]')")
  size = SHAPES[shape]
  kept = lambda named: {arm: named[arm] for arm in named if arm in arms and arm.partition('_')[0] not in missing}
  if 'training' in what:
    interleaved.compare(f'training, {shape}, {precision}', kept({
        'ours': (ours_training, size, precision), 'torch_eager': (torch_training, size, precision, False),
        'torch_compile': (torch_training, size, precision, True)}), size.batch * size.length, rounds, steps)
  if 'startup' in what:
    startup(size)
  if 'pipeline' in what:
    interleaved.compare('packing, one core', {'ours': (ours_pipeline, size)}, size.batch * size.length, rounds, 500)


if __name__ == '__main__':
  launch.tool(benchmark)
