"""The loop of training: its steps, what is judged, evaluated, logged and saved between them, and where it ends."""
import contextlib
import dataclasses
import math
import pathlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from lm import seeds
from lm.data.batch import Batch
from lm.optim import averaging
from lm.train import checks, flops, validation
from lm.train.interfaces import Feed, OpenData
from lm.train.interrupt import Interrupt, Stopped
from lm.train.pace import Pace
from lm.train.run import Run, State, abstract_state, advance, with_constants
from lm.train.step import make_step
from lm.workdir import checkpoint, integrity, track
from lm.workdir.describe import fingerprint
from lm.workdir.judge import Judge


class Result(NamedTuple):
  """Where a run stands when `train` returns: at its end, or where it was asked to stop."""
  step: int
  start: int                  # the step that it went on from
  params: Any
  data: OpenData
  mesh: jax.sharding.Mesh
  metrics: dict[str, float]   # of the last evaluation, by their names in the log
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


def result_step(run: Run, checkpoints: checkpoint.Checkpoints, best: bool = False) -> int | None:
  """The checkpoint that is the result of a run: the best one of a run with patience, or on demand; None: the newest."""
  return checkpoints.best_step() if best or run.patience is not None else None


@dataclasses.dataclass
class Loop:
  """The loop of `train`, and what it is made of."""
  run: Run
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  data: OpenData
  feed: Feed
  evaluation: validation.Evaluation
  constants: Mapping[str, Any]
  checkpoints: checkpoint.Checkpoints
  judge: Judge                # of the checkpoints
  facts: Mapping[str, Any]    # that every checkpoint holds
  interrupt: Interrupt
  phases: track.Phases
  watch: Callable[[int, dict[str, float]], bool] | None

  def __post_init__(self):
    self.shapes: set[tuple[int, int]] = set()   # that were compiled
    self.metrics: dict[str, float] = {}
    self.evaluated = self.saved = -1
    self.compiles_evaluation = True
    self.former: tuple[int, float] | None = None   # where they have changed: the steps before, the last rate

  def go(self, state: State, start: int, logged: list) -> Result:
    run, step = self.run, start
    devices = list(self.mesh.devices.flat)
    train_step, pending, key = make_step(run), None, seeds.key(run.seed)
    with track.Tracker(self.workdir, run.steps, tokens_before=run.schedule.tokens_before, step=start, records=logged,
                       flops_per_token=flops.flops_by_step(run, self.mesh, devices),
                       devices=devices) as self.tracker:
      self.saved = self.start = start
      self.pace = run.minutes and Pace(self.workdir, run.steps, 60 * run.minutes, (run.evaluate_every, run.save_every),
                                       start)
      stopped = left = False
      if self.awaits_validation(start):
        stopped, left = self._validate(start, state)
        if not stopped:
          self.checkpoints.set_metric(start, self.metrics[run.best])
      ended = not (stopped or left) and (step >= run.steps or self.out_of_patience(step))
      while not (ended or stopped or left):
        batch = self.feed(step, state._replace(params=with_constants(state.params, self.constants)))
        new = self._compiles(step, batch)
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
            improved = not stopped and run.patience is not None and self.judge.prefers(self.metrics[run.best], best)
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
    """Evaluates a step and logs it. Returns whether a signal cut that short, and whether `watch` wants to stop.

    ValueError, once the step is saved, where the metric that judges checkpoints is not among those that are evaluated.
    """
    if not self._evaluate(step, state):
      return True, False
    if self.run.best not in self.metrics:
      self._save(step, state)   # without a metric: the step is evaluated again when the run goes on
      validation.check_best(self.run.best, self.metrics)
    self.tracker.log(step, self.metrics)
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
      print(f'{left_out:,} of {step:,} steps were left out, to keep to the time: steps took longer than planned')
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

  def _compiles(self, step: int, batch: Batch) -> bool:
    """Whether the batch of a step is the first of its shape; it is checked, and printed where there are stages."""
    shape = self.run.schedule.shape(step)
    if shape in self.shapes:
      return False
    checks.check_batch(self.run, self.mesh, shape, batch)
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
    # The first evaluation compiles, which the pace does not count for steps either.
    paused = self._paused() if self.compiles_evaluation else self.tracker.pause()
    with paused, self.phases('validate'):
      metrics = self.evaluation(self._params(state), step, lambda: self.interrupt.asked(step))
    self.compiles_evaluation = False
    if metrics is not None:
      self.metrics = metrics
    return metrics is not None

  def _save(self, step: int, state: State) -> None:
    if step > self.saved:
      with self.tracker.pause(), self.phases('checkpoint'):
        facts = {**self.facts, 'parameters': fingerprint(state.params)}
        metric = self.metrics[self.run.best] if self.evaluated == step else None
        self.checkpoints.save(step, state, facts, metric, self.tracker.records(step))
      self.saved = step
