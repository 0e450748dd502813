"""What does an optimizer cost? The update alone, and the training step that it is part of, in milliseconds.

  python experiments/benchmarks/optimizer_costs.py --shape=large --rounds=5 --steps=10

The update and the step of each optimizer run in separate processes, which take turns; medians are printed. A round
has a multiple of ten steps, because SOAP and Sophia do extra work at every tenth step. Use the machine for nothing else
meanwhile. Linux only.
"""
import os
import statistics
import time
import typing
from collections.abc import Iterator
from typing import Any, Literal

import interleaved
from interleaved import SHAPES, Prepared, Shape, tokens

from lm import launch  # nothing heavy here: it counts in the start-up time of each process

Optimizer = Literal['adamw', 'adam', 'nadamw', 'rmsprop', 'sgd', 'adafactor', 'lion', 'adan', 'muon', 'soap', 'sophia',
                    'schedule_free']


def prepared(name: str, shape: Shape) -> Prepared:
  """An arm: the training step of an optimizer, or, for a name such as 'adamw/update', only its update."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax
  import numpy as np
  import optax

  from lm import optim, sharding, train
  from lm.data.batch import Batch
  from lm.models import transformer
  from lm.objectives.next_token import next_token
  jax.set_mesh(sharding.make_mesh())
  name, _, alone = name.partition('/')
  optimizer = getattr(optim, name)(lambda step: 1e-4, clip=1.)
  model = transformer.gpt2(*shape[:4], shape.length)
  run = train.Run(model, next_token(), None, optimizer, steps=1, batch=shape.batch)
  ids = tokens(shape.vocab, shape.batch, shape.length + 1)
  batch = sharding.shard_rows(Batch(ids[:, :-1], ids[:, 1:], np.ones(ids[:, 1:].shape, np.float32)),
                              jax.sharding.get_mesh())
  state, start = jax.jit(lambda: train.init(run))(), time.perf_counter()

  def loss(params):
    total, weight, _ = run.objective.loss(model.apply, params, batch, None)
    return total / weight

  if alone:
    def update(grads, state):
      steps, opt_state = run.transformation.update(grads, state.opt_state, state.params, obj_fn=loss)
      return train.State(state.step + 1, optax.apply_updates(state.params, steps), opt_state)
    grads = jax.jit(jax.grad(loss))(state.params)
    step = jax.jit(update, donate_argnums=1).lower(grads, state).compile()
  else:
    step = train.make_step(run).lower(state, batch).compile()
  facts = {'compile': time.perf_counter() - start, 'temp': step.memory_analysis().temp_size_in_bytes / 1e9, 'units': 1.,
           'state': sum(x.nbytes for x in jax.tree.leaves(state.opt_state)) / 1e9}

  def go() -> None:
    nonlocal state
    state = step(grads, state) if alone else step(state, batch)[0]
    jax.block_until_ready(state.step)
  return go, facts


def matrices(shape: Shape) -> Iterator[tuple[int, int]]:
  """Returns the numbers of inputs and of outputs of the matrices in all layers."""
  w = shape.width
  return iter([(w, w)] * 4 * shape.layers + [(w, 4 * w), (4 * w, w)] * shape.layers)


def products(name: str, shape: Shape) -> float:
  """Returns the floating-point operations of the matrix products in an update, by formula, averaged over steps."""
  def muon(m, n):   # five times: X X^T over the shorter side, its square, and their product with X
    m, n = sorted((m, n))
    return 5 * (4 * m * m * n + 2 * m ** 3)

  # G G^T and G^T G; of each side, two rotations into the eigenbasis and one back; at every tenth step, L Q and its QR.
  def soap(m, n):
    return 8 * (m * m * n + m * n * n) + (2 + 8 / 3) * (m ** 3 + n ** 3) / 10
  formula = {'muon': muon, 'soap': soap}.get(name)
  return sum(formula(m, n) for m, n in matrices(shape)) if formula else 0.


def model_products(shape: Shape) -> float:
  """Returns the operations of the model in a step: 6 for each weight and token, and those of causal attention."""
  weights = sum(m * n for m, n in matrices(shape)) + shape.vocab * shape.width
  # Two products with half of the keys, once in the forward pass and twice in the backward pass.
  attention = 6 * shape.layers * shape.width * shape.length
  return shape.batch * shape.length * (6 * weights + attention)


def main(*, only: list[Optimizer] = (), shape: Literal['tiny', 'small', 'large'] = 'large', rounds: int = 5,
         steps: int = 10) -> None:
  """Prints a table.

  Args:
    only: optimizers to measure besides adamw; by default all.
    shape: size of the model, gpt2 with 2, 6 or 12 layers.
    rounds: number of rounds.
    steps: steps in a round, a multiple of 10.
  """
  if rounds < 1 or steps < 1 or steps % 10:
    raise ValueError(f'--rounds={rounds} must be 1 or more, and --steps={steps} a multiple of 10')
  interleaved.machine('jax', 'jaxlib', 'optax')
  size = SHAPES[shape]
  names = [name for name in typing.get_args(Optimizer) if name == 'adamw' or name in only or not only]
  arms = [name + part for name in names for part in ('', '/update')]
  results = interleaved.take_turns(prepared, arms, size, rounds, steps)
  whole = model_products(size)
  print(f'{shape}, {rounds} rounds of {steps} steps of {size.batch} x {size.length} tokens; the model takes '
        f'{whole / 1e9:,.0f} GFLOP a step\n\noptimizer        step ms  update ms   share (of rounds)  step / adamw  '
        'GFLOP of products  of the model\'s  state GB  compile s')
  for name in names:
    (step_seconds, facts), (update_seconds, _) = results[name], results[name + '/update']
    print_row(name, step_seconds, update_seconds, results['adamw'][0], facts, products(name, size), whole)


def print_row(name: str, steps: list[float], updates: list[float], base: list[float], facts: dict[str, Any],
              ours: float, whole: float) -> None:
  shares = sorted(update / step for step, update in zip(steps, updates))
  ratio = statistics.median(a / b for a, b in zip(steps, base))
  print(f'{name:15}{1e3 * statistics.median(steps):9,.1f}{1e3 * statistics.median(updates):11,.1f}'
        f'{statistics.median(shares):8.1%} ({shares[0]:.1%}..{shares[-1]:.1%}){ratio:11.2f}{ours / 1e9:19,.1f}'
        f'{ours / whole:16.1%}{facts["state"]:10.2f}{facts["compile"]:11.1f}', flush=True)


if __name__ == '__main__':
  launch.tool(main)
