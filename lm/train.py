"""Training: a `Run` says what; `train` does it, from where it was left."""
import dataclasses
import functools
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

from lm import averaging, checkpoint, evaluate, optim, records, sharding, track
from lm.data.batches import KINDS, Batch, Special, template
from lm.describe import describe
from lm.guard import Guard
from lm.interfaces import Constants, Data, Model, Opened
from lm.interrupt import Interrupt
from lm.objectives.objective import Objective


@dataclasses.dataclass(frozen=True)
class Run:
  """All that decides what a training run computes, and how often it tells and saves.

  `batch` counts rows of a whole step, over all devices and all `accumulate` parts that it is computed in. Evaluation
  reads `evaluate_batches` batches of the validation split (None: all). The last `keep` checkpoints stay, and the best.
  Training starts from what `start(model)` gives, where that is not None, in place of new parameters. `constants` are
  parameters that stay as they are. With `patience`, training stops when so many evaluations in a row were no better
  than the best before them, and the best checkpoint is the result. A `guard` skips steps that spike.
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
  patience: int | None = None
  guard: Guard | None = None

  def __post_init__(self):
    for name in ('steps', 'batch', 'accumulate', 'evaluate_every', 'save_every', 'keep'):
      if getattr(self, name) < 1:
        raise ValueError(f'{name}={getattr(self, name)} is not positive')
    if not 0 <= self.seed < 2 ** 63:
      raise ValueError(f'seed={self.seed} is not between 0 and 2 ** 63')
    if self.evaluate_batches is not None and self.evaluate_batches < 1:
      raise ValueError(f'evaluate_batches={self.evaluate_batches} is not positive; None evaluates all')
    if self.patience is not None and not 0 < self.patience < -(-self.steps // self.evaluate_every):
      raise ValueError(f'patience={self.patience} evaluations, one every {self.evaluate_every} steps, is not positive, or '
                       f'longer than the run of {self.steps} steps; lower evaluate_every, or the patience')


class State(NamedTuple):
  step: jax.Array
  params: Any
  opt_state: Any
  seen: Any = None   # by the guard


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
  """The loss or the gradient is infinite or not a number, or spikes too often."""


def init(run: Run, key: jax.Array | None = None) -> State:
  """The state before the first step; call it inside `jax.jit`. The key is by default that of the run's seed."""
  params = run.model.init(jax.random.fold_in(jax.random.key(run.seed) if key is None else key, 0))
  return _begin(run, params)


def _begin(run: Run, params: Any) -> State:
  return State(jnp.int32(0), params, run.optimizer.init(params), run.guard and run.guard.init())


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
  """One jitted pure function, `(state, batch, constants={}, key) -> (state, metrics)`; the state is donated."""
  return jax.jit(step_of(run), donate_argnums=0)


def step_of(run: Run) -> Callable[..., tuple[State, dict[str, jax.Array]]]:
  """What `make_step` jits. The last argument is a key, by default that of the run's seed."""
  def step(state: State, batch: Batch, constants: Mapping[str, Any] = types.MappingProxyType({}),
           key: jax.Array | None = None):
    def loss(params, batch, key):
      loss_sum, weight_sum, sums = run.objective.loss(run.model.apply, with_constants(params, constants), batch, key)
      return loss_sum, (weight_sum, sums)

    key = jax.random.key(run.seed) if key is None else key
    key = jax.random.fold_in(jax.random.fold_in(key, 1), state.step)
    totals = _accumulate(jax.value_and_grad(loss, has_aux=True), state.params, batch, key, run.accumulate)
    (loss_sum, (weight_sum, sums)), grads = totals
    weight_sum = jnp.maximum(weight_sum, jnp.finfo(jnp.float32).tiny)
    grads = jax.tree.map(lambda g: g / weight_sum, grads)
    mean, norm = loss_sum / weight_sum, optax.tree.norm(grads)
    updates, opt_state = optax.with_extra_args_support(run.optimizer).update(
        grads, state.opt_state, state.params, value=mean, obj_fn=lambda params: _mean(loss(params, batch, key)))
    new = State(state.step + 1, optax.apply_updates(state.params, updates), opt_state, state.seen)
    metrics = {'loss': mean, 'grad_norm': norm,
               'accuracy': sums['correct'] / jnp.maximum(sums['tokens'], 1),
               **{name: pair[0] / jnp.maximum(pair[1], 1) for name, pair in sums.items() if isinstance(pair, tuple)}}
    if (rate := optim.learning_rate(opt_state)) is not None:
      metrics['learning_rate'] = rate
    if run.guard is not None:
      taken, seen = run.guard.judge(state.seen, mean, norm)
      new = jax.tree.map(functools.partial(jnp.where, taken), new, state._replace(step=new.step))._replace(seen=seen)
      metrics |= {'skipped': seen.total, 'skipped_lately': jnp.sum(seen.skipped)}
    return new, metrics

  return step


def _mean(sums):
  loss_sum, (weight_sum, _) = sums
  return loss_sum / jnp.maximum(weight_sum, jnp.finfo(jnp.float32).tiny)


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
  if run.batch % parts:
    raise ValueError(f'batch={run.batch} is not a multiple of {parts}: accumulate={run.accumulate} times the '
                     f'{mesh.shape["data"]} devices of the mesh axis data')
  if run.objective.needs is not run.data.kind:
    raise ValueError(f'the objective learns from {KINDS[run.objective.needs]}, and the data holds '
                     f'{KINDS[run.data.kind]}; choose another of either')
  jax.eval_shape(make_step(run), jax.eval_shape(lambda: init(run)), abstract_batch(run, mesh), abstract_constants(run))


def abstract_batch(run: Run, mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh) -> Batch:
  """Shapes and shardings of a batch, packed."""
  row = template(run.objective, Special(0, 1, 3, (2,) * len(run.objective.control)), run.data.length,
                 run.data.source_length)
  stored = {name: np.zeros((1, run.data.length, *shape), dtype) for name, (dtype, shape) in run.data.columns.items()}
  row = row._replace(columns={**(row.columns or {}), **stored} or None)
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct((run.batch, *x.shape[1:]), x.dtype,
                                                     sharding=NamedSharding(mesh, P('data'))), row)


def identity(run: Run, data: Opened) -> dict[str, Any]:
  """What may not change between a checkpoint and a run that goes on from it: the model, and the order of the data."""
  constants = {'constants': {constant.name: describe(constant) for constant in run.constants}} if run.constants else {}
  return {'model': describe(run.model), 'batch': run.batch, 'length': run.data.length, 'seed': run.seed,
          'data': data.fingerprint, **constants}


def train(run: Run, workdir: pathlib.Path, mesh: jax.sharding.Mesh,
          watch: Callable[[int, dict[str, float]], bool] | None = None) -> Result:
  """Trains to `run.steps`, from the newest checkpoint in `workdir` if there is one. `mesh` is the one that is set.

  `watch(step, metrics)` is told of each evaluation, and stops training where it returns True.
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
    batches = (data.batches('train', run.objective, run.batch, run.seed),
               data.batches('validation', run.objective, run.batch, seed=0, repeat=False))
  facts = identity(run, data)
  with checkpoint.Checkpoints(workdir / 'checkpoints', keep=run.keep) as checkpoints, Interrupt() as interrupt:
    with phases('restore or initialise'):
      constants = load_constants(run)
      state, start = _restore(run, mesh, checkpoints, facts)
    records.add(workdir, data=data.fingerprint, steps=run.steps)   # accepted: what opens the run later goes by this
    loop = _Loop(run, workdir, mesh, data, batches, constants, checkpoints, facts, interrupt, phases, watch)
    if start >= run.steps:
      print(f'finished: {workdir} is at step {start} of {run.steps}; more steps (--steps) go on from there')
    elif start and not loop.out_of_patience(start):
      print(f'going on from step {start}')
    return loop.go(state, start)


def _restore(run, mesh, checkpoints, facts) -> tuple[State, int]:
  if not checkpoints.steps():
    if run.start is None:
      # Seeds are arguments, so that all have the same program, which is compiled once.
      return jax.block_until_ready(jax.jit(functools.partial(init, run))(jax.random.key(run.seed))), 0
    params = run.start(run.model)
    begun = jax.jit(lambda params: _begin(run, params)._replace(params=None))(params)
    return jax.block_until_ready(begun)._replace(params=params), 0
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

  def __init__(self, run, workdir, mesh, data, batches, constants, checkpoints, facts, interrupt, phases, watch):
    self.run, self.mesh, self.data, self.facts, self.phases, self.watch = run, mesh, data, facts, phases, watch
    self.checkpoints, self.interrupt, self.workdir, self.constants = checkpoints, interrupt, workdir, constants
    self.batches, self.held_out = batches
    self.rows = sharding.local_rows(run.batch, mesh)
    self.evaluate_step = evaluate.make_step(run.model.apply, run.objective, data.tokenizer.byte_lengths())
    self.metrics: dict[str, float] = {}
    self.evaluated = self.saved = -1

  def go(self, state: State, start: int) -> Result:
    run, step = self.run, start
    train_step, pending, key = make_step(run), None, jax.random.key(run.seed)
    with track.Tracker(self.workdir, run.steps, tokens_per_step=run.batch * run.data.length, step=start,
                       devices=list(self.mesh.devices.flat)) as self.tracker, ThreadPoolExecutor(1) as reader:
      self.saved = self.start = start
      ended = step >= run.steps or self.out_of_patience(step)
      following = reader.submit(self.batches, start, self.rows)
      while not ended:
        batch = sharding.shard_rows(following.result(), self.mesh)
        following = reader.submit(self.batches, step + 1, self.rows)
        with self.phases('compile and first step' if step == start else 'train'):
          state, metrics = train_step(state, batch, self.constants, key)
          step += 1
          self._report(pending)      # of the step before, while this one runs
          pending = step, metrics
          if step == start + 1:
            jax.block_until_ready(state)
        self.checkpoints.check_for_errors()
        stop, ended = self.interrupt.asked(step), step == run.steps
        evaluates = ended or step % run.evaluate_every == 0
        if stop or evaluates or step % run.save_every == 0:
          with self.phases('train'):
            self._report(pending)    # never save, nor judge, what is not finite
          pending = None
          improved = False
          if evaluates:
            self._evaluate(state)
            self.tracker.log(step, {f'validation/{name}': value for name, value in self.metrics.items()})
            self.evaluated = step
            improved = run.patience is not None and self.metrics['loss'] < self.checkpoints.best_metric()
            stop = stop or self.watch is not None and self.watch(step, self.metrics)
          if stop or improved or ended or step % run.save_every == 0 or self.out_of_patience(step):
            self._save(step, state)
          ended = ended or self.out_of_patience(step)
        if stop and not ended:
          print(f'stopped at step {step} of {run.steps}: the same command goes on from there')
          break
      return self._result(state, start, step, ended)

  def _result(self, state: State, start: int, step: int, ended: bool) -> Result:
    best = self.checkpoints.best_step()
    if ended and self.run.patience is not None and best not in (None, step):
      print(f'{"at" if step == self.run.steps else "stopped early, at"} step {step}; the best checkpoint, of step {best}, '
            'is the result')
      with self.phases('restore or initialise'):
        state, self.evaluated = self.checkpoints.restore(abstract_state(self.run, self.mesh), best).state, -1
    if ended and self.evaluated < 0:   # what is in the log is of another state, or of an earlier start
      self._evaluate(state)
    return Result(step, start, self._params(state), self.data, self.mesh, self.metrics, ended, self.phases)

  def _params(self, state: State) -> Any:
    return with_constants(averaging.evaluated(state.opt_state, state.params), self.constants)

  def out_of_patience(self, step: int) -> bool:
    best, patience = self.checkpoints.best_step(), self.run.patience
    return None not in (best, patience) and step - best >= patience * self.run.evaluate_every

  def _report(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
    if pending is None:
      return
    step, metrics = pending[0], {name: float(value) for name, value in pending[1].items()}
    self.tracker.log(step, metrics)
    guard = self.run.guard
    if guard and metrics['skipped_lately'] > guard.most:
      raise NotFinite(f'step {step}: {metrics["skipped_lately"]:.0f} of the last {guard.window} steps were skipped, more than '
                      f'{guard.most}; the checkpoints up to step {self.saved} are good. Lower the learning rate')
    if not guard and not math.isfinite(metrics['loss'] + metrics['grad_norm']):
      raise NotFinite(f'step {step}: the loss is {metrics["loss"]}, the norm of its gradient {metrics["grad_norm"]}; '
                      f'the checkpoints up to step {self.saved} are good. Lower the learning rate, or warm up longer')

  def _evaluate(self, state: State) -> None:
    with self.tracker.pause(), self.phases('validate'):
      self.metrics = evaluate.evaluate(self.evaluate_step, self._params(state), self.held_out, self.mesh,
                                       self.run.evaluate_batches)

  def _save(self, step: int, state: State) -> None:
    if step > self.saved:
      with self.tracker.pause(), self.phases('checkpoint'):
        self.checkpoints.save(step, state, self.facts, self.metrics['loss'] if self.evaluated == step else None)
      self.saved = step
