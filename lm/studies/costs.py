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
  """Returns what a step costs in `unit`: steps (1), tokens, or FLOPs of matrix products.

  The step is one after the last stage, unless `shape` gives the shape [B, T] of its batch. FLOPs include those of the
  optimizer if `optimizer` is true. They are the mean over steps 1 to 100, because SOAP and Sophia do more work at every
  tenth step; each integer scalar of the state is taken to be the number of the step.
  """
  if unit == 'flops':
    run = run if optimizer else dataclasses.replace(run, optimizer=optax.identity())
    state = jax.eval_shape(lambda: train.init(run))
    inputs = train.abstract_batch(run, mesh, shape), train.abstract_constants(run)
    count = flops.counter(train.make_step(run), state, *inputs)

    def state_of(step):
      return jax.tree.map(lambda x: np.int32(step) if (x.shape, x.dtype) == ((), np.int32) else x, state)

    return statistics.mean(count(state_of(step), *inputs) for step in range(1, 101))
  return {'steps': 1., 'tokens': float(math.prod(shape or (run.batch, run.data.length)))}[unit]


def spending(run: train.Run, unit: str, mesh: jax.sharding.Mesh) -> Callable[[int], float]:
  """Returns a function from a number of steps, counted from the first, to what they cost in `unit`."""
  stages = [(stage.until, cost(run, unit, mesh, shape=run.schedule.shape(stage.until - 1))) for stage in run.stages]
  last = cost(run, unit, mesh)

  def total_cost(steps):
    total = counted = 0
    for until, step_cost in stages:
      total += (min(steps, until) - counted) * step_cost
      counted = min(steps, until)
    return total + (steps - counted) * last
  return total_cost


def equal(arms: list[Arm], unit: str, amount: float | None, mesh: jax.sharding.Mesh) -> tuple[list[Arm], float]:
  """Returns the arms with numbers of steps such that all cost the same, and that cost.

  The cost is `amount` of a unit (steps, tokens, flops, seconds), or, without it, what the first arm costs as it is.
  Stages keep their numbers of steps and are counted at their own cost. ValueError where an experiment has no flag
  `steps`, or where an arm gets no step, or fewer than its other flags need.
  """
  if 'steps' not in arms[0].knobs:
    raise ValueError('the experiment has no knob `steps`, by which arms could be given equal compute; add one')
  if unit == 'seconds':
    if amount is None or not amount > 0:
      raise ValueError(f'--equal=seconds needs a --budget above 0 in seconds, such as 60, not {amount}')
    if staged := [arm.name for arm in arms if arm.make().stages]:
      raise ValueError(f'--equal=seconds measures steps that are all alike, and {staged[0]} begins with smaller ones; '
                       'leave out its warm-up of batch and length, or take equal tokens or flops')
    counts = [budget.fit(lambda steps, arm=arm: arm.make(steps=steps), amount / 60).steps for arm in arms]
    return list(map(fitted, arms, counts)), amount
  if amount is None:
    first = budget.plan(arms[0].make, ())
    amount = spending(first, unit, mesh)(first.steps)
  counts = []
  for arm in arms:
    run = arm.make()
    step = cost(run, unit, mesh)
    saved = run.steps * step - spending(run, unit, mesh)(run.steps) if run.stages else 0.   # by smaller first steps
    counts.append(round((amount + saved) / step))
    if counts[-1] < 1:
      raise ValueError(f'--budget={amount:g} {unit} are less than a step of {arm.name}; raise it')
  return list(map(fitted, arms, counts)), amount


def fitted(arm: Arm, steps: int) -> Arm:
  """Returns the arm with so many steps; ValueError where its other flags do not allow them."""
  try:
    arm.make(steps=steps)
  except ValueError as error:
    raise ValueError(f'{arm.name} gets {steps:,} steps, and {error}') from None
  return arm.with_steps(steps)
