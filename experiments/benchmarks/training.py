"""How fast is training on this CPU, compared with PyTorch? And how fast are the start of a run, and packing?

  python experiments/benchmarks/training.py --what=training --shape=large --precision=bfloat16

The arms run in separate processes, which take turns; medians are printed. Use the machine for nothing else meanwhile.
Linux only. Install PyTorch with pip install 'lm[benchmark]'; torch.compile needs a C++ compiler too.
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

from lm import launch  # nothing slow here: the imports of an arm count in its memory and its start-up time


def ours(shape: Shape, precision: str) -> Any:
  """Returns our model, on a mesh of all devices, which it sets."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax

  from lm import sharding
  from lm.models import transformer
  jax.set_mesh(sharding.make_mesh())
  return transformer.gpt2(*shape[:4], shape.length, dtype=jax.numpy.dtype(precision))


def ours_training(shape: Shape, precision: str) -> Prepared:
  """An arm that takes training steps."""
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
  """An arm that packs documents into rows."""
  from lm.data.batch import Special
  from lm.data.rows.packed_documents import Stream
  from lm.objectives.next_token import next_token
  steps = itertools.count()
  batches = Stream(next_token(), Special(1, 2, shape.vocab, ()), shape.length, shape.batch,
                   store=documents(shape.vocab))
  return lambda: batches(next(steps)) and None, {}


def torch_training(shape: Shape, precision: str, compiled: bool) -> Prepared:
  """An arm that takes the same steps in PyTorch. With fused attention, this model is faster than transformers'."""
  torch = interleaved.torch_library()
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
  """Prints the seconds of imports and of --help, medians of three, and of a first step without and with a cache."""
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
  """Prints tables.

  Args:
    what: the measurements to make.
    arms: the programs that are compared in training.
    shape: size of the model that is trained, gpt2 with 2, 6 or 12 layers.
    precision: dtype of the computation in training; parameters are float32.
    rounds: number of rounds.
    steps: training steps of each arm in a round.
  """
  if min(rounds, steps) < 1:
    raise ValueError(f'--rounds={rounds} and --steps={steps} must be 1 or more')
  if missing := interleaved.machine('jax', 'jaxlib', 'flax', 'torch'):
    print(f"not installed, and left out: {', '.join(sorted(missing))} (pip install 'lm[benchmark]')")
  size = SHAPES[shape]
  if 'training' in what:
    available = {'ours': (ours_training, size, precision), 'torch_eager': (torch_training, size, precision, False),
                 'torch_compile': (torch_training, size, precision, True)}
    chosen = {name: arm for name, arm in available.items()
              if name in arms and not (name != 'ours' and 'torch' in missing)}
    interleaved.compare(f'training, {shape}, {precision}', chosen, size.batch * size.length, rounds, steps)
  if 'startup' in what:
    startup(size)
  if 'pipeline' in what:
    interleaved.compare('packing, one core', {'ours': (ours_pipeline, size)}, size.batch * size.length, rounds, 500)


if __name__ == '__main__':
  launch.tool(benchmark)
