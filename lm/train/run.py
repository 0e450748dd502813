"""What a training run is: a `Run`, its state, and a step of it. Other rooms know these by `train`."""
import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lm import declarations, optim, seeds, sharding
from lm.data.batch import Batch, Special, template
from lm.data.rows.augment import Augmentation
from lm.data.rows.stages import Schedule, Stage
from lm.objectives.objective import Objective
from lm.train import flops
from lm.train.gradient import Gradient, accumulated
from lm.train.guard import Guard
from lm.train.interfaces import Constants, Data, Model
from lm.workdir.describe import describe


@dataclasses.dataclass(frozen=True)
class Run:
  """All that decides what a training run computes, and how often it tells and saves.

  `batch` counts rows of a whole step, over all devices and all `accumulate` parts that it is computed in. Evaluation
  reads `evaluate_batches` batches of the validation split (None: all). The last `keep` checkpoints stay, and the best.
  Training starts from what `start(model)` gives, where that is not None, in place of new parameters; these, or those of
  constants, are for the tokenizer with the fingerprint `start_tokenizer`, where that is given, and another is refused.
  `constants` are parameters that stay as they are. The text of training, not of validation, goes through `augment`.
  Training begins with batches of other shapes where there are `stages`. With `patience`, it stops when so many
  evaluations in a row were no better than the best before them, and the best checkpoint is the result. A `guard` skips
  steps that spike. With `minutes`, steps are left out where they would take longer; `launch` finds how many fit where
  an experiment's knob `steps` is None. `gradient` computes the gradient of a step, see there.
  """
  model: Model
  objective: Objective
  data: Data
  optimizer: optim.Optimizer
  steps: int
  batch: int
  accumulate: int = 1
  seed: int = 0
  evaluate_every: int = 250
  evaluate_batches: int | None = 20
  save_every: int = 1000
  keep: int = 2
  start: Callable[[Model], Any] | None = None
  start_tokenizer: str | None = None
  constants: tuple[Constants, ...] = ()
  augment: tuple[Augmentation, ...] = ()
  stages: tuple[Stage, ...] = ()
  patience: int | None = None
  guard: Guard | None = None
  minutes: float | None = None
  gradient: Gradient = accumulated

  def __post_init__(self):
    for name in ('steps', 'batch', 'accumulate', 'evaluate_every', 'save_every', 'keep'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is not positive')
    seeds.check(self.seed)
    if self.minutes is not None and not 0 < self.minutes < 1e6:
      raise ValueError(f'minutes={self.minutes} is not between 0 and a million')
    if self.evaluate_batches is not None and self.evaluate_batches < 1:
      raise ValueError(f'evaluate_batches={self.evaluate_batches} is not positive; None evaluates all')
    if self.patience is not None and not 0 < self.patience < -(-self.steps // self.evaluate_every):
      raise ValueError(f'patience={self.patience} evaluations, one every {self.evaluate_every} steps, is not positive, '
                       f'or longer than the run of {self.steps} steps; lower evaluate_every, or the patience')
    if self.stages and self.stages[-1].until > self.steps:
      raise ValueError(f'a stage ends at step {self.stages[-1].until}, beyond the {self.steps} steps of the run')

  @functools.cached_property
  def transformation(self) -> optax.GradientTransformationExtraArgs:
    """The optimizer, for the weights that the model declares."""
    return optim.bound(self.optimizer, declarations.of(self.model))

  @property
  def schedule(self) -> Schedule:
    """What each step reads."""
    return Schedule(self.stages, self.batch, self.data.length)


class State(NamedTuple):
  step: jax.Array
  params: Any
  opt_state: Any
  seen: Any = None   # by the guard


def init(run: Run, key: jax.Array | None = None) -> State:
  """The state before the first step; call it inside `jax.jit`. The key is by default that of the run's seed."""
  params = run.model.init(jax.random.fold_in(seeds.key(run.seed) if key is None else key, 0))
  return begin(run, params)


def begin(run: Run, params: Any) -> State:
  return State(jnp.int32(0), params, run.transformation.init(params), run.guard and run.guard.init())


def advance(state: State, steps: int) -> State:
  """The state as if so many steps had been taken, of which none changed the parameters."""
  return state._replace(step=state.step + steps, opt_state=optim.advanced(state.opt_state, steps))


def abstract_state(run: Run, mesh: jax.sharding.Mesh) -> State:
  """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
  def placed(s):
    # A constant, such as the step, carries no sharding.
    return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=sharding.layout(mesh, s.sharding and s.sharding.spec))
  return jax.tree.map(placed, jax.eval_shape(lambda: init(run)))


def load_constants(run: Run) -> dict[str, Any]:
  """The run's constants by name, on the mesh that is set."""
  return {constant.name: constant.load(constant.model) for constant in run.constants}


def abstract_constants(run: Run) -> dict[str, Any]:
  """Their shapes, dtypes and shardings, by name."""
  return {constant.name: jax.eval_shape(lambda constant=constant: constant.model.init(jax.random.key(0)))
          for constant in run.constants}


def with_constants(params: Any, constants: Mapping[str, Any]) -> Any:
  """The parameters that models and objectives are given."""
  return {**params, **constants} if constants else params


def abstract_batch(run: Run, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh,
                   shape: tuple[int, int] | None = None) -> Batch:
  """Shapes and shardings of a batch, packed: of the last stage, or of a shape [B, T] of another."""
  row = template(run.objective, Special(0, 1, 3, (2,) * len(run.objective.control)), run.data.length,
                 run.data.source_length)
  stored = {name: np.zeros((1, run.data.length, *shape), dtype) for name, (dtype, shape) in run.data.columns.items()}
  row = row._replace(columns={**(row.columns or {}), **stored} or None)
  rows, length = shape or (run.batch, run.data.length)
  parts = run.data.length // length
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, x.shape[1] // parts, *x.shape[2:]), x.dtype,
                                                     sharding=sharding.row_layout(mesh)), row)


def flops_per_token(run: Run, mesh: jax.sharding.Mesh, shape: tuple[int, int] | None = None) -> float:
  """Of a model's training, for the MFU: without the optimizer, and without what the backward pass computes again.

  With batches as `abstract_batch` has them. Attention counts the blocks of scores that causality leaves to compute.
  ValueError for a model whose products cannot be counted.
  """
  # Of devices on which all products are JAX's own: those in loops of CPUs and in fused attention cannot be counted.
  device = jax.sharding.AbstractDevice('TPU v4', 1, 'tpu')
  mesh = sharding.abstract_mesh(sharding.mesh_text(mesh), device)

  def loss(params, batch, constants):
    return run.objective.loss(run.model.apply, with_constants(params, constants), batch, None)

  with jax.sharding.use_abstract_mesh(mesh):
    batch = abstract_batch(run, mesh, shape)
    params = jax.eval_shape(lambda: run.model.init(jax.random.key(0)))
    return flops.training(loss, params, batch, abstract_constants(run)) / math.prod(batch.tokens.shape)


def identity(run: Run, data: str, tokenizer: str) -> dict[str, Any]:
  """What may not change between a checkpoint and a run that goes on from it: the model, what it learns, in which order.

  `data` and `tokenizer` are their fingerprints.
  """
  constants = {'constants': {constant.name: describe(constant) for constant in run.constants}} if run.constants else {}
  more = {name: describe(getattr(run, name)) for name in ('augment', 'stages') if getattr(run, name)}
  if run.gradient is not accumulated:
    more['gradient'] = describe(run.gradient)
  return {'model': describe(run.model), 'objective': describe(run.objective, inside=True), 'batch': run.batch,
          'length': run.data.length, 'seed': run.seed, 'data': data, 'tokenizer': tokenizer, **constants, **more}
