"""What runs cost, in steps, tokens, FLOPs or seconds; and runs that cost the same."""
import dataclasses
import math
import statistics
from collections.abc import Callable

import jax
import numpy as np
import optax

from lm import train
from lm.studies.variants import Arm
from lm.train import budget, flops


def cost(run: train.Run, unit: str, mesh: jax.sharding.Mesh, optimizer: bool = True,
         shape: tuple[int, int] | None = None) -> float:
  """Of a step, in `unit`: 1 for steps; tokens; FLOPs of its matrix products, with the optimizer's or without.

  After the stages, or of a batch of another shape [B, T]. FLOPs are the mean of steps 1 to 100, since SOAP and
  Sophia do more at every tenth: all whole scalars of the state are taken for the number of the step.
  """
  if unit == 'flops':
    run = run if optimizer else dataclasses.replace(run, optimizer=optax.identity())
    state, more = jax.eval_shape(lambda: train.init(run)), (train.abstract_batch(run, mesh, shape),
                                                            train.abstract_constants(run))
    program = flops.counter(train.make_step(run), state, *more)
    at = lambda step: jax.tree.map(lambda x: np.int32(step) if (x.shape, x.dtype) == ((), np.int32) else x, state)
    return statistics.mean(program(at(step), *more) for step in range(1, 101))
  return {'steps': 1., 'tokens': float(math.prod(shape or (run.batch, run.data.length)))}[unit]


def spending(run: train.Run, unit: str, mesh: jax.sharding.Mesh) -> Callable[[int], float]:
  """The cost of so many first steps, in `unit`, with each stage at its own."""
  stages = [(stage.until, cost(run, unit, mesh, shape=run.schedule.shape(stage.until - 1))) for stage in run.stages]
  last = cost(run, unit, mesh)

  def spent(steps):
    total = done = 0
    for until, each in stages:
      total += (min(steps, until) - done) * each
      done = min(steps, until)
    return total + (steps - done) * last
  return spent


def equal(found: list[Arm], unit: str, amount: float | None, mesh: jax.sharding.Mesh) -> tuple[list[Arm], float]:
  """The arms with as many steps as cost the same: `amount` of a unit (steps, tokens, flops, seconds), or what the first
  arm costs as it is.

  Stages keep their steps, at their own cost. ValueError where an experiment has no knob `steps`, or an arm gets no step
  or fewer than its knobs need.
  """
  if 'steps' not in found[0].knobs:
    raise ValueError('the experiment has no knob `steps`, by which arms could be given equal compute; add one')
  if unit == 'seconds':
    if amount is None or not amount > 0:
      raise ValueError(f'--equal=seconds needs a --budget above 0 in seconds, such as 60, not {amount}')
    if staged := [arm.name for arm in found if arm.make().stages]:
      raise ValueError(f'--equal=seconds measures steps that are all alike, and {staged[0]} begins with smaller ones; '
                       'leave out its warm-up of batch and length, or take equal tokens or flops')
    counts = [budget.fit(lambda steps, arm=arm: arm.make(steps=steps), amount / 60).steps for arm in found]
    return list(map(fitted, found, counts)), amount
  if amount is None:
    first = budget.planned(found[0].make, ())
    amount = spending(first, unit, mesh)(first.steps)
  counts = []
  for arm in found:
    run = arm.make()
    step = cost(run, unit, mesh)
    saved = run.steps * step - spending(run, unit, mesh)(run.steps) if run.stages else 0.   # by smaller first steps
    counts.append(round((amount + saved) / step))
    if counts[-1] < 1:
      raise ValueError(f'--budget={amount:g} {unit} are less than a step of {arm.name}; raise it')
  return list(map(fitted, found, counts)), amount


def fitted(arm: Arm, steps: int) -> Arm:
  """The arm with so many steps; ValueError where its other knobs do not go with them."""
  try:
    arm.make(steps=steps)
  except ValueError as error:
    raise ValueError(f'{arm.name} gets {steps:,} steps, and {error}') from None
  return arm.with_steps(steps)
