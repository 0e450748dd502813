"""Training: a `Run` says what; `train` does it, from where it was left."""
import contextlib
import dataclasses
import math
import pathlib
import types
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from lm import checkpoint, evaluate, optim, records, sharding, track
from lm.data.augment import Augmentation, augmented
from lm.data.batches import KINDS, Batch, Special, template
from lm.data.stages import Schedule, Stage, Staged
from lm.describe import describe
from lm.interfaces import Constants, Data, Model, Opened
from lm.interrupt import Interrupt
from lm.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class Run:
  """All that decides what a training run computes, and how often it tells and saves.

  `batch` counts rows of a whole step, over all devices and all `accumulate` parts that it is computed in. Evaluation
  reads `evaluate_batches` batches of the validation split (None: all). The last `keep` checkpoints stay, and the best.
  Training starts from what `start(model)` gives, where that is not None, in place of new parameters. `constants` are
  parameters that stay as they are. The text of training, not of validation, goes through `augment`.
  Training begins with batches of other shapes where there are `stages`.
  """
  model: Model
  objective: Objective
  data: Data
  optimizer: optax.GradientTransformation
  steps: int
  batch: int
  accumulate: int = 1
  seed: int = 0
  evaluate_every: int = 250
  evaluate_batches: int | None = 20
  save_every: int = 1000
  keep: int = 2
  start: Callable[[Model], Any] | None = None
  constants: tuple[Constants, ...] = ()
  augment: tuple[Augmentation, ...] = ()
  stages: tuple[Stage, ...] = ()

  def __post_init__(self):
    for name in ('steps', 'batch', 'accumulate', 'evaluate_every', 'save_every', 'keep'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is not positive')
    if not 0 <= self.seed < 2 ** 63:
      raise ValueError(f'seed={self.seed} is not between 0 and 2 ** 63')
    if self.evaluate_batches is not None and self.evaluate_batches < 1:
      raise ValueError(f'evaluate_batches={self.evaluate_batches} is not positive; None evaluates all')
    if self.stages and self.stages[-1].until > self.steps:
      raise ValueError(f'a stage ends at step {self.stages[-1].until}, beyond the {self.steps} steps of the run')

  @property
  def schedule(self) -> Schedule:
    """What each step reads."""
    return Schedule(self.stages, self.batch, self.data.length)


class State(NamedTuple):
  step: jax.Array
  params: Any
  opt_state: Any


class Result(NamedTuple):
  """Where a run stands when `train` returns: at its end, or where it was asked to stop."""
  step: int
  start: int                  # the step that it went on from
  params: Any
  data: Opened
  mesh: jax.sharding.Mesh
  metrics: dict[str, float]   # of the last evaluation
  finished: bool
  phases: track.Phases


class NotFinite(FloatingPointError):
  """The loss or the gradient is infinite or not a number."""


def init(run: Run) -> State:
  """The state before the first step; call it inside `jax.jit`."""
  params = run.model.init(jax.random.fold_in(jax.random.key(run.seed), 0))
  return State(jnp.int32(0), params, run.optimizer.init(params))


def abstract_state(run: Run, mesh: jax.sharding.Mesh) -> State:
  """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
  def placed(s):
    # A constant, such as the step, carries no sharding.
    return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, s.sharding.spec if s.sharding else P()))
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


def make_step(run: Run) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  """One jitted pure function, `(state, batch, constants={}) -> (state, metrics)`; the state is donated."""
  def step(state: State, batch: Batch, constants: Mapping[str, Any] = types.MappingProxyType({})):
    def loss(params, batch, key):
      loss_sum, weight_sum, sums = run.objective.loss(run.model.apply, with_constants(params, constants), batch, key)
      return loss_sum, (weight_sum, sums)

    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(run.seed), 1), state.step)
    totals = _accumulate(jax.value_and_grad(loss, has_aux=True), state.params, batch, key, run.accumulate)
    (loss_sum, (weight_sum, sums)), grads = totals
    weight_sum = jnp.maximum(weight_sum, jnp.finfo(jnp.float32).tiny)
    grads = jax.tree.map(lambda g: g / weight_sum, grads)
    updates, opt_state = run.optimizer.update(grads, state.opt_state, state.params)
    metrics = {'loss': loss_sum / weight_sum, 'grad_norm': optax.tree.norm(grads),
               'accuracy': sums['correct'] / jnp.maximum(sums['tokens'], 1),
               **{name: pair[0] / jnp.maximum(pair[1], 1) for name, pair in sums.items() if isinstance(pair, tuple)}}
    if (rate := optim.learning_rate(opt_state)) is not None:
      metrics['learning_rate'] = rate
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state), metrics

  return jax.jit(step, donate_argnums=0)


def _accumulate(grad: Callable, params: Any, batch: Batch, key: jax.Array, parts: int):
  """Sums of `grad(params, part, key)` over the parts of a batch, one part at a time."""
  if parts == 1:
    return grad(params, batch, key)

  def split(x):   # row i goes to part i % parts, so that each device keeps its rows
    return jnp.moveaxis(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 1, 0)

  def add(total, xs):
    part, key = xs
    return jax.tree.map(jnp.add, total, grad(params, part, key)), None

  stacked = jax.tree.map(split, batch), jax.random.split(key, parts)
  zero = jax.tree.map(jnp.zeros_like, jax.eval_shape(grad, params, *jax.tree.map(lambda x: x[0], stacked)))
  return jax.lax.scan(add, zero, stacked)[0]


def check(run: Run, mesh: jax.sharding.Mesh) -> None:
  """Traces the step without data and devices' memory: whatever does not fit together raises here, in seconds."""
  parts = mesh.shape['data'] * run.accumulate
  shapes = run.schedule.shapes()
  if bad := [rows for rows, _ in ((run.batch, 0), *shapes) if rows % parts]:
    raise ValueError(f'batch={bad[0]} is not a multiple of {parts}: accumulate={run.accumulate} times the '
                     f'{mesh.shape["data"]} devices of the mesh axis data')
  if run.objective.needs is not run.data.kind:
    raise ValueError(f'the objective learns from {KINDS[run.objective.needs]}, and the data holds '
                     f'{KINDS[run.data.kind]}; choose another of either')
  augmented(run.objective, run.augment)
  if run.augment and run.data.columns:
    raise ValueError(f'what is stored with the data, {", ".join(run.data.columns)}, is of text as it is; leave out the '
                     'augmentation')
  if len({length for _, length in shapes}) > 1 and (run.data.source_length or run.data.kind is not np.ndarray):
    raise ValueError('rows of sources and of dialogues cannot be cut into shorter ones; leave out the stages of length')
  for shape in shapes:
    jax.eval_shape(make_step(run), jax.eval_shape(lambda: init(run)), abstract_batch(run, mesh, shape),
                   abstract_constants(run))


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
                                                     sharding=NamedSharding(mesh, P('data'))), row)


def identity(run: Run, data: Opened) -> dict[str, Any]:
  """What may not change between a checkpoint and a run that goes on from it: the model, and the order of the data."""
  constants = {'constants': {constant.name: describe(constant) for constant in run.constants}} if run.constants else {}
  more = {name: describe(getattr(run, name)) for name in ('augment', 'stages') if getattr(run, name)}
  return {'model': describe(run.model), 'batch': run.batch, 'length': run.data.length, 'seed': run.seed,
          'data': data.fingerprint, **constants, **more}


def train(run: Run, workdir: pathlib.Path, mesh: jax.sharding.Mesh) -> Result:
  """Trains to `run.steps`, from the newest checkpoint in `workdir` if there is one. `mesh` is the one that is set.

  SIGINT or SIGTERM: saves after the present step and returns; a second one ends the process at once. NotFinite if a
  loss is; what was saved before stays. ValueError, before anything is compiled, if the run does not fit together, or
  does not go on from what the workdir holds.
  """
  phases = track.Phases()
  check(run, mesh)
  with phases('prepare data'):
    data = run.data.open(workdir, control=run.objective.control)
    _check_vocabulary(run, data)
    # Before signals are caught: what data computes first may take long, and is gone on from.
    goal = augmented(run.objective, run.augment, data.tokenizer)
    batches = (Staged(data.batches('train', goal, run.batch, run.seed), run.schedule),
               data.batches('validation', run.objective, run.batch, seed=0, repeat=False))
  facts = identity(run, data)
  with checkpoint.Checkpoints(workdir / 'checkpoints', keep=run.keep) as checkpoints, Interrupt() as interrupt:
    with phases('restore or initialise'):
      constants = load_constants(run)
      state, start = _restore(run, mesh, checkpoints, facts)
    records.add(workdir, data=data.fingerprint, steps=run.steps)   # accepted: what opens the run later goes by this
    if start >= run.steps:
      print(f'finished: {workdir} is at step {start} of {run.steps}; more steps (--steps) go on from there')
    elif start:
      print(f'going on from step {start}')
    loop = _Loop(run, workdir, mesh, data, batches, constants, checkpoints, facts, interrupt, phases)
    return loop.go(state, start)


def _restore(run, mesh, checkpoints, facts) -> tuple[State, int]:
  if not checkpoints.steps():
    if run.start is None:
      return jax.block_until_ready(jax.jit(lambda: init(run))()), 0
    params = run.start(run.model)
    return State(jnp.int32(0), params, jax.block_until_ready(jax.jit(run.optimizer.init)(params))), 0
  checkpoint.check(checkpoints.facts(), facts)
  restored = checkpoints.restore(abstract_state(run, mesh))
  return restored.state, restored.step


def _check_vocabulary(run: Run, data: Opened) -> None:
  """ValueError if the tokenizer has tokens for which the model has no logits."""
  def logits(constants):
    params = with_constants(run.model.init(jax.random.key(0)), constants)
    tokens = jnp.zeros((run.batch, 1), jnp.int32)
    outputs = run.model.apply(params, Batch(tokens, source=None if run.data.source_length is None else tokens))
    return outputs.head(outputs.hidden)
  vocab = jax.eval_shape(logits, abstract_constants(run)).shape[-1]
  if data.tokenizer.vocab_size > vocab:
    raise ValueError(f'the tokenizer has {data.tokenizer.vocab_size} tokens, the model only {vocab}; '
                     'raise the vocabulary of the model')


class _Loop:
  """The loop of `train`: its parts, so that each fits on a screen."""

  def __init__(self, run, workdir, mesh, data, batches, constants, checkpoints, facts, interrupt, phases):
    self.run, self.mesh, self.data, self.facts, self.phases = run, mesh, data, facts, phases
    self.checkpoints, self.interrupt, self.workdir, self.constants = checkpoints, interrupt, workdir, constants
    self.batches, self.held_out = batches
    self.shapes: set[tuple[int, int]] = set()   # that were compiled
    self.evaluate_step = evaluate.make_step(run.model.apply, run.objective, data.tokenizer.byte_lengths())
    self.metrics: dict[str, float] = {}
    self.evaluated = self.saved = -1

  def go(self, state: State, start: int) -> Result:
    run, step = self.run, start
    train_step, pending = make_step(run), None
    with track.Tracker(self.workdir, run.steps, tokens_before=run.schedule.tokens_before, step=start,
                       devices=list(self.mesh.devices.flat)) as self.tracker, ThreadPoolExecutor(1) as reader:
      self.saved = self.start = start
      following = reader.submit(self._read, start)
      while step < run.steps:
        batch = sharding.shard_rows(following.result(), self.mesh)
        following = reader.submit(self._read, step + 1)
        new = self._compiles(step)
        with self.phases('compile and first step' if new else 'train'):
          with self.tracker.pause() if new else contextlib.nullcontext():
            state, metrics = train_step(state, batch, self.constants)
          step += 1
          self._report(pending)      # of the step before, while this one runs
          pending = step, metrics
          if new:
            jax.block_until_ready(state)
        self.checkpoints.check_for_errors()
        stop = self.interrupt.asked(step)
        if stop or step == run.steps or step % run.evaluate_every == 0 or step % run.save_every == 0:
          with self.phases('train'):
            self._report(pending)    # never save, nor judge, what is not finite
          pending = None
          if step == run.steps or step % run.evaluate_every == 0:
            self._evaluate(step, state)
          if stop or step == run.steps or step % run.save_every == 0:
            self._save(step, state)
        if stop and step < run.steps:
          print(f'stopped at step {step} of {run.steps}: the same command goes on from there')
          break
      if self.evaluated < 0 and step == run.steps:
        self._evaluate(step, state)
    params = with_constants(state.params, self.constants)
    return Result(step, start, params, self.data, self.mesh, self.metrics, step >= run.steps, self.phases)

  def _read(self, step: int) -> Batch:
    return self.batches(step, sharding.local_rows(self.run.schedule.shape(step)[0], self.mesh))

  def _compiles(self, step: int) -> bool:
    """Whether the batch of a step is the first of its shape, which is told where there are stages."""
    shape = self.run.schedule.shape(step)
    if shape in self.shapes:
      return False
    self.shapes.add(shape)
    if self.run.stages:
      print(f'step {step}: batches of {shape[0]} x {shape[1]} from here on, compiling')
    return True

  def _report(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
    if pending is None:
      return
    step, metrics = pending[0], {name: float(value) for name, value in pending[1].items()}
    self.tracker.log(step, metrics)
    if not math.isfinite(metrics['loss'] + metrics['grad_norm']):
      raise NotFinite(f'step {step}: the loss is {metrics["loss"]}, the norm of its gradient {metrics["grad_norm"]}; '
                      f'the checkpoints up to step {self.saved} are good. Lower the learning rate, or warm up longer')

  def _evaluate(self, step: int, state: State) -> None:
    with self.tracker.pause(), self.phases('validate'):
      self.metrics = evaluate.evaluate(self.evaluate_step, with_constants(state.params, self.constants), self.held_out,
                                       self.mesh, self.run.evaluate_batches)
    if step > self.start:   # else it is in the log
      self.tracker.log(step, {f'validation/{name}': value for name, value in self.metrics.items()})
    self.evaluated = step

  def _save(self, step: int, state: State) -> None:
    if step > self.saved:
      with self.tracker.pause(), self.phases('checkpoint'):
        self.checkpoints.save(step, state, self.facts, self.metrics['loss'] if self.evaluated == step else None)
      self.saved = step
