"""Training: a `Run` says what; `train` does it, from where it was left."""
import contextlib
import functools
import math
import pathlib
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax

from lm import averaging, checkpoint, evaluate, integrity, optim, records, seeds, sharding, track
from lm.data.augment import augmented
from lm.data.batches import Batch
from lm.data.stages import Staged
from lm.describe import fingerprint
from lm.interfaces import Constants, Opened
from lm.interrupt import Interrupt, Stopped
from lm.pace import Pace
from lm.run import (
  Run,
  State,
  abstract_batch,
  abstract_constants,
  abstract_state,
  advance,
  begin,
  check,
  check_vocabulary,
  flops_per_token,
  identity,
  init,
  load_constants,
  make_step,
  step_of,
  with_constants,
)

# What other rooms know by this one.
__all__ = ['Run', 'Constants', 'State', 'Result', 'NotFinite', 'init', 'train', 'check', 'check_vocabulary', 'identity',
           'result_step', 'make_step', 'step_of', 'abstract_batch', 'abstract_constants', 'abstract_state',
           'load_constants', 'with_constants']


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
  signal: int | None = None   # that stopped it
  left_out: int = 0           # steps, to keep to the minutes of the run

  def raise_if_stopped(self) -> None:
    """Raises Stopped, a KeyboardInterrupt, where a signal stopped the run before its end."""
    if self.signal:
      raise Stopped(self.signal)


class NotFinite(FloatingPointError):
  """The loss or the gradient is infinite or not a number, or spikes too often."""


def train(run: Run, workdir: pathlib.Path, mesh: jax.sharding.Mesh,
          watch: Callable[[int, dict[str, float]], bool] | None = None, new_objective: bool = False) -> Result:
  """Trains to `run.steps`, from the newest checkpoint in `workdir` if there is one. `mesh` is the one that is set.

  `watch(step, metrics)` is told of each evaluation, and stops training where it returns True. With `new_objective` the
  checkpoint may be of another objective; the best checkpoint is then the best by the new one.
  SIGINT, SIGTERM or SIGHUP: saves after the present step, or amid a validation, which is made again when the run goes
  on, and returns; a second one ends the process at once. NotFinite if a loss is, or if parameters that were to be saved
  are; what was saved before stays. ValueError, before anything is compiled, if the run does not fit together, or does
  not go on from what the workdir holds.
  """
  phases = track.Phases()
  sharding.require(jax.sharding.get_mesh())
  check(run, mesh)
  stored = checkpoint.stored_facts(workdir / 'checkpoints')
  with phases('prepare data'):
    data = run.data.open(workdir, control=run.objective.control,
                         check=functools.partial(_check_data, run, stored, new_objective))
    check_vocabulary(run, data)
    # Before signals are caught: what data computes first may take long, and is gone on from.
    goal = augmented(run.objective, run.augment, data.tokenizer)
    rows = data.batches('train', goal, run.batch, run.seed)
    for line in rows.summary(run.schedule.rows_before(run.steps)):
      print(line)
    held_out = data.batches('validation', run.objective, run.batch, seed=0, repeat=False)
    print(f'val: {evaluate.reading(held_out, run.evaluate_batches)}')
    batches = Staged(rows, run.schedule), held_out
  facts = identity(run, data.fingerprint, data.tokenizer.fingerprint)
  with (checkpoint.Checkpoints(workdir / 'checkpoints', keep=run.keep, objective=facts['objective']) as checkpoints,
        Interrupt() as interrupt):
    with phases('restore or initialise'):
      constants = load_constants(run)
      state, start, logged = _restore(run, mesh, checkpoints)
    planned = next((record['steps'] for record in reversed(records.read(workdir)) if 'steps' in record), run.steps)
    # Accepted: what opens the run later goes by this.
    records.add(workdir, data=data.fingerprint, steps=run.steps, minutes=run.minutes)
    size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    axes = ' x '.join(f'{length} {name}' for name, length in mesh.shape.items())
    print(f'{size:,} parameters to train on {mesh.size} {mesh.devices.flat[0].device_kind} ({axes}); '
          f'{run.schedule.tokens_before(run.steps):,} positions in {run.steps:,} steps; saved in {workdir}')
    loop = _Loop(run, workdir, mesh, data, batches, constants, checkpoints, facts, interrupt, phases, watch)
    if start >= run.steps and not loop.awaits_validation(start):
      print(f'finished: {workdir} is at step {start} of {run.steps}; more steps (--steps) go on from there')
    elif start and not loop.out_of_patience(start):
      print(f'going on from step {start}')
      if planned != run.steps and (rate := optim.learning_rate(state.opt_state)) is not None:
        loop.former = planned, float(rate)
    with records.kept(workdir):
      return loop.go(state, start, logged)


def _check_data(run: Run, stored: Any, new_objective: bool, data: str, tokenizer: str) -> None:
  """ValueError, before anything is made of the data, where the checkpoint in the workdir is of another run.

  Where there is none: where the parameters that training starts from are for another tokenizer.
  """
  if stored is not None:
    stored, now = ({name: value for name, value in facts.items()
                    if name != 'parameters' and not (new_objective and name == 'objective')}
                   for facts in (stored, identity(run, data, tokenizer)))
    checkpoint.check(stored, now)
  elif run.start_tokenizer not in (None, tokenizer):
    raise ValueError(f'the parameters to start from are for another tokenizer (fingerprint {run.start_tokenizer}) than '
                     f'that of this run (fingerprint {tokenizer}): take theirs, or start from them all the same by '
                     '--init_ignore_tokenizer')


def result_step(run: Run, checkpoints: checkpoint.Checkpoints, best: bool = False) -> int | None:
  """The checkpoint that is the result of a run: the best one of a run with patience, or on demand; None: the newest."""
  return checkpoints.best_step() if best or run.patience is not None else None


def _restore(run, mesh, checkpoints) -> tuple[State, int, list]:
  """The state to go on from, its step, and what was logged of that step."""
  if not checkpoints.steps():
    if run.start is None:
      # Seeds are arguments, so that all have the same program, which is compiled once.
      return jax.block_until_ready(jax.jit(functools.partial(init, run))(seeds.key(run.seed))), 0, []
    params = run.start(run.model)
    begun = jax.jit(lambda params: begin(run, params)._replace(params=None))(params)
    return jax.block_until_ready(begun)._replace(params=params), 0, []
  restored = checkpoints.restore(abstract_state(run, mesh))
  return restored.state, restored.step, restored.records


def _flops_by_step(run: Run, mesh: jax.sharding.Mesh, devices: list[Any]) -> Callable[[int], float] | None:
  """FLOPs of a token in each step, by its number; None where there is no MFU, which is said unless devices are CPUs."""
  unknown = sorted({device.device_kind for device in devices if track.peak_flops(device) is None})
  try:
    if not unknown:
      flops = {shape: flops_per_token(run, mesh, shape) for shape in run.schedule.shapes()}
      return lambda step: flops[run.schedule.shape(step - 1)]
    reason = f'the peak FLOP/s of {", ".join(unknown)} is not known; add it in lm/track.py'
  except ValueError as error:
    reason = str(error)
  if unknown != ['cpu']:
    print(f'no MFU is shown: {reason}')
  return None


class _Loop:
  """The loop of `train`: its parts, so that each fits on a screen."""

  def __init__(self, run, workdir, mesh, data, batches, constants, checkpoints, facts, interrupt, phases, watch):
    self.run, self.mesh, self.data, self.facts, self.phases, self.watch = run, mesh, data, facts, phases, watch
    self.checkpoints, self.interrupt, self.workdir, self.constants = checkpoints, interrupt, workdir, constants
    self.batches, self.held_out = batches
    self.shapes: set[tuple[int, int]] = set()   # that were compiled
    self.evaluate_step = evaluate.make_step(run.model.apply, run.objective, data.tokenizer)
    self.metrics: dict[str, float] = {}
    self.evaluated = self.saved = -1
    self.former: tuple[int, float] | None = None   # where they have changed: the steps before, the last rate

  def go(self, state: State, start: int, logged: list) -> Result:
    run, step = self.run, start
    devices = list(self.mesh.devices.flat)
    train_step, pending, key = make_step(run), None, seeds.key(run.seed)
    with track.Tracker(self.workdir, run.steps, tokens_before=run.schedule.tokens_before, step=start, records=logged,
                       flops_per_token=_flops_by_step(run, self.mesh, devices),
                       devices=devices) as self.tracker, ThreadPoolExecutor(1) as reader:
      self.saved = self.start = start
      self.pace = run.minutes and Pace(self.workdir, run.steps, 60 * run.minutes, (run.evaluate_every, run.save_every),
                                       start)
      stopped = left = False
      if self.awaits_validation(start):
        stopped, left = self._validate(start, state)
        if not stopped:
          self.checkpoints.set_metric(start, self.metrics['loss'])
      ended = not (stopped or left) and (step >= run.steps or self.out_of_patience(step))
      following = reader.submit(self._read, start)
      while not (ended or stopped or left):
        batch = sharding.shard_rows(following.result(), self.mesh)
        following = reader.submit(self._read, step + 1)
        new = self._compiles(step)
        with self.phases('compile and first step' if new else 'train'):
          with self._paused() if new else contextlib.nullcontext():
            state, metrics = train_step(state, batch, self.constants, key)
          step += 1
          self._report(pending)      # of the step before, while this one runs
          pending = step, metrics
          if new:
            jax.block_until_ready(state)
        self.checkpoints.check_for_errors()
        if self.pace and (skipped := self.pace.after(step) - step):
          self._report(pending)
          pending, step, state = None, step + skipped, advance(state, skipped)
          self.tracker.throughput.skip(skipped)
          following = reader.submit(self._read, step)
        stopped, ended = self.interrupt.asked(step), step == run.steps
        evaluates = self._evaluates(step)
        if stopped or evaluates or step % run.save_every == 0:
          with self.phases('train'):
            self._report(pending)    # never save, nor judge, what is not finite
            self._check_finite(step, state)
          pending = None
          improved = False
          if evaluates and not stopped:
            best = self.checkpoints.best_metric()
            stopped, left = self._validate(step, state)
            improved = not stopped and run.patience is not None and self.metrics['loss'] < best
          if stopped or left or improved or ended or step % run.save_every == 0 or self.out_of_patience(step):
            self._save(step, state)
          ended = not stopped and (ended or self.out_of_patience(step))
      return self._result(state, start, step, ended, stopped, left)

  def _evaluates(self, step: int) -> bool:
    return step == self.run.steps or step % self.run.evaluate_every == 0

  def awaits_validation(self, step: int) -> bool:
    """Whether the checkpoint of a step was saved without the validation that is due there: a signal cut it short."""
    return step > 0 and self._evaluates(step) and self.checkpoints.metric(step) is None

  def _validate(self, step: int, state: State) -> tuple[bool, bool]:
    """Evaluates a step and logs it. Returns whether a signal cut that short, and whether `watch` wants to stop."""
    if not self._evaluate(step, state):
      return True, False
    self.tracker.log(step, {f'validation/{name}': value for name, value in self.metrics.items()})
    self.evaluated = step
    return False, self.watch is not None and self.watch(step, self.metrics)

  def _result(self, state: State, start: int, step: int, ended: bool, stopped: bool, left: bool) -> Result:
    best = result_step(self.run, self.checkpoints)
    if ended and best not in (None, step):
      early = '' if step == self.run.steps else 'stopped early, '
      print(f'{early}at step {step}; the best checkpoint, of step {best}, is the result')
      with self.phases('restore or initialise'):
        state, self.evaluated = self.checkpoints.restore(abstract_state(self.run, self.mesh), best).state, -1
    left_out = self.pace.left_out if self.pace else 0
    if ended and left_out:
      print(f'{left_out:,} of {step:,} steps were left out, to keep to the time: the machine became slower')
    if ended and self.evaluated < 0:   # what is in the log is of another state, or of an earlier start
      stopped = not self._evaluate(step, state)
    number = None
    if stopped:
      ended, number = False, self.interrupt.signal or signal.SIGTERM   # the latter in a cluster
      print(f'stopped at step {step} of {self.run.steps}: the same command goes on from there')
    elif left and not ended:
      print(f'left at step {step} of {self.run.steps}')
    return Result(step, start, self._params(state), self.data, self.mesh, self.metrics, ended, self.phases, number,
                  left_out)

  @contextlib.contextmanager
  def _paused(self) -> Iterator[None]:
    """Time inside is no time of training."""
    with self.tracker.pause(), self.pace.pause() if self.pace else contextlib.nullcontext():
      yield

  def _params(self, state: State) -> Any:
    return with_constants(averaging.evaluated(state.opt_state, state.params), self.constants)

  def out_of_patience(self, step: int) -> bool:
    best, patience = self.checkpoints.best_step(), self.run.patience
    return None not in (best, patience) and step - best >= patience * self.run.evaluate_every

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
    self._tell_jump(step, metrics.get('learning_rate', 0.))
    guard = self.run.guard
    if guard and metrics['skipped_lately'] > guard.most:
      raise NotFinite(f'step {step}: {metrics["skipped_lately"]:.0f} of the last {guard.window} steps were skipped, '
                      f'more than {guard.most}; {self._kept()}. Lower the learning rate')
    if not guard and not math.isfinite(metrics['loss'] + metrics['grad_norm']):
      raise NotFinite(f'step {step}: the loss is {metrics["loss"]}, the norm of its gradient {metrics["grad_norm"]}; '
                      f'{self._kept()}. Lower the learning rate, or warm up longer')

  def _tell_jump(self, step: int, rate: float) -> None:
    """Prints a line, at the first step of a run whose end has moved, where the learning rate is not what it was."""
    if self.former and abs(rate - self.former[1]) > 0.05 * self.former[1]:
      print(f'the learning rate jumps from {self.former[1]:.2g} to {rate:.2g} at step {step}: its schedule was made '
            f'for {self.former[0]:,} steps, and is now for {self.run.steps:,}')
    self.former = None

  def _check_finite(self, step: int, state: State) -> None:
    """Raises NotFinite where the update of a step, which its loss does not show, has ruined the parameters."""
    if not integrity.all_finite(state.params):
      raise NotFinite(f'step {step}: the update made parameters whose norm is not finite; {self._kept()}. '
                      'Lower the learning rate, or warm up longer')

  def _kept(self) -> str:
    return f'the checkpoint of step {self.saved} is good' if self.saved else 'no checkpoint was saved before'

  def _evaluate(self, step: int, state: State) -> bool:
    """Whether it was done: a signal cuts it short."""
    with self.tracker.pause(), self.phases('validate'):
      metrics = evaluate.evaluate(self.evaluate_step, self._params(state), self.held_out, self.mesh,
                                  self.run.evaluate_batches, lambda: self.interrupt.asked(step))
    if metrics is not None:
      self.metrics = metrics
    return metrics is not None

  def _save(self, step: int, state: State) -> None:
    if step > self.saved:
      with self.tracker.pause(), self.phases('checkpoint'):
        self.checkpoints.save(step, state, {**self.facts, 'parameters': fingerprint(state.params)},
                              self.metrics['loss'] if self.evaluated == step else None, self.tracker.records(step))
      self.saved = step
