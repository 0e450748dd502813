"""The loop of training: steps, and the evaluations, logs and checkpoints between them."""
import contextlib
import dataclasses
import math
import pathlib
import signal
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from lm import seeds
from lm.data.batch import Batch
from lm.optim import averaging
from lm.train import checks, flops, not_finite, validation
from lm.train.guard import GoBack, Skip
from lm.train.interfaces import Feed, OpenData
from lm.train.interrupt import Interrupt
from lm.train.not_finite import NotFinite
from lm.train.pace import Pace
from lm.train.result import Result, result_step
from lm.train.run import Run, State, abstract_state, advance, with_constants
from lm.train.saver import Saver
from lm.train.step import make_step
from lm.workdir import checkpoint, integrity, track
from lm.workdir.describe import fingerprint
from lm.workdir.judge import Judge
from lm.workdir.ledger import Ledger


@dataclasses.dataclass
class Loop:
  """The loop of `train`."""
  run: Run
  workdir: pathlib.Path
  mesh: jax.sharding.Mesh
  data: OpenData
  feed: Feed
  evaluation: validation.Evaluation
  constants: Mapping[str, Any]
  checkpoints: checkpoint.Checkpoints
  judge: Judge                # compares checkpoints
  facts: Mapping[str, Any]    # are stored in every checkpoint
  ledger: Ledger              # has the evaluations of earlier processes
  left_out: not_finite.LeftOutBatches
  interrupt: Interrupt
  phases: track.Phases
  watch: Callable[[int, dict[str, float]], bool] | None

  def __post_init__(self):
    self.shapes: set[tuple[int, int]] = set()   # of batches whose step is compiled
    self.metrics: dict[str, float] = {}
    self.evaluated, self.compiles_evaluation = -1, True
    self.failing: int | None = None   # the first of the last steps, one after the other, that were not finite
    # The steps that were planned before and the last learning rate, where the number of steps has changed.
    self.earlier_plan: tuple[int, float] | None = None

  def train(self, state: State, start: int, logged: list) -> Result:
    """Trains from the step `start`; `logged` are the records of the log until there."""
    run, step = self.run, start
    devices = list(self.mesh.devices.flat)
    train_step, pending, key = make_step(run), None, seeds.key(run.seed)
    with track.Tracker(self.workdir, run.steps, tokens_before=run.schedule.tokens_before, step=start, records=logged,
                       flops_per_token=flops.flops_by_step(run, self.mesh, devices),
                       devices=devices, shown=[run.best]) as self.tracker:
      self.saver = Saver(self.checkpoints, start)
      self.left_out_steps = not_finite.steps_left_out(self.workdir, start) if isinstance(run.not_finite, Skip) else []
      stops = [every for every in (run.evaluate_every, run.save_every, run.keep_every) if every]
      self.pace = run.minutes and Pace(self.workdir, run.steps, 60 * run.minutes, stops, start)
      # `stopped` by a signal, `ended` by the steps or the patience, `declined` by `watch`.
      stopped, declined = self._validate_start(start, state)
      ended = not (stopped or declined) and (step >= run.steps or self.out_of_patience(step))
      while not (ended or stopped or declined):
        batch = self.feed(self.left_out.index(step),
                          state._replace(params=with_constants(state.params, self.constants)))
        compiles = self._compiles(step, batch)
        with self.phases('compile and first step' if compiles else 'train'):
          with self._paused() if compiles else contextlib.nullcontext():
            arguments = batch, self.constants, key, np.int32(step)
            if compiles:
              state, pending = self._report(pending, state), None
              with self._saving_at_signal(step, state):   # the call of the step donates the state, this does not
                train_step.lower(state, *arguments).compile()
            state, metrics = train_step(state, *arguments)
          before, state = state, self._report(pending, state)   # of the step before, while this one runs
          if state is not before:
            pending = None   # the step before was left out, and this one, which did nothing, is computed again
            continue
          step += 1
          pending = step, metrics, batch
          if compiles:
            jax.block_until_ready(state)
        self.saver.check(step)
        skipped = self.pace.next_step(step) - step if self.pace else 0
        if skipped:
          state = self._report(pending, state)
          pending, step, state = None, step + skipped, advance(state, skipped)
          self.tracker.throughput.skip(skipped)
        stopped, ended = self.interrupt.should_stop(step), step == run.steps
        evaluates = self._evaluates(step)
        if stopped or evaluates or self._saves(step):
          with self.phases('train'):
            state = self._report(pending, state)   # before anything is saved
            self._check_finite(step, state)
          pending = None
          improved = False
          if evaluates and not stopped:
            best = self.checkpoints.best_metric()
            stopped, declined = self._validate(step, state)
            improved = not stopped and run.patience is not None and self.judge.prefers(self.metrics[run.best], best)
          if stopped or declined or improved or ended or self._saves(step) or self.out_of_patience(step):
            self._save(step, state)
          ended = not stopped and (ended or self.out_of_patience(step))
      self.saver.finish(step, lambda: self._start_saving(step, state))
      return self._result(state, start, step, ended, stopped, declined)

  def _evaluates(self, step: int) -> bool:
    return step == self.run.steps or step % self.run.evaluate_every == 0

  def _saves(self, step: int) -> bool:
    return step % self.run.save_every == 0 or self._is_permanent(step) or self.saver.is_due(step)

  def _is_permanent(self, step: int) -> bool:
    return self.run.keep_every is not None and step % self.run.keep_every == 0

  def awaits_validation(self, step: int) -> bool:
    """Whether a checkpoint lacks the validation that is due at its step, because a signal cut that short."""
    return step > 0 and self._evaluates(step) and self.checkpoints.metric(step) is None

  def _validate(self, step: int, state: State) -> tuple[bool, bool]:
    """Evaluates a step and logs it. Returns whether a signal cut that short, and whether `watch` stops training.

    Raises:
      ValueError: the metric that compares checkpoints is not evaluated. The step is saved before.
    """
    if not self._evaluate(step, state):
      return True, False
    if self.run.best not in self.metrics:
      self._save(step, state)   # without a metric, so that the step is evaluated again when the run continues
      validation.check_best(self.run.best, self.metrics)
    self.tracker.log(step, self.metrics)
    self.evaluated = step
    return False, self.watch is not None and self.watch(step, self.metrics)

  def _validate_start(self, start: int, state: State) -> tuple[bool, bool]:
    """Does what `_validate` does for the step that training continues from, where that is still to be done."""
    if not self.awaits_validation(start):
      return False, False
    stopped, declined = self._validate(start, state)
    if not stopped:
      self.tracker.commit(start)
      self.checkpoints.set_metric(start, self.metrics[self.run.best])
    return stopped, declined

  def _result(self, state: State, start: int, step: int, ended: bool, stopped: bool, declined: bool) -> Result:
    best = result_step(self.run, self.checkpoints)
    if ended and best not in (None, step):
      early = '' if step == self.run.steps else 'stopped early, '
      print(f'{early}at step {step}; the best checkpoint, of step {best}, is the result')
      with self.phases('restore or initialise'):
        state, self.evaluated = self.checkpoints.restore(abstract_state(self.run, self.mesh), best).state, -1
    left_out, number = self.pace.left_out if self.pace else 0, None
    if ended and left_out:
      print(f'{left_out:,} of {step:,} steps were left out, to keep to the time: steps took longer than planned')
    if ended and self.evaluated < 0:   # the metrics of this state are not known since the start
      stopped = not self._evaluate(step if best is None else best, state)
    if stopped:
      ended, number = False, self.interrupt.signal or signal.SIGTERM   # in a cluster, JAX handles SIGTERM
      print(f'stopped at step {step} of {self.run.steps}: the same command goes on from there')
    elif declined and not ended:
      print(f'left at step {step} of {self.run.steps}')
    return Result(step, start, self._params(state), self.data, self.mesh, self.metrics, ended, self.phases, number,
                  left_out)

  @contextlib.contextmanager
  def _paused(self) -> Iterator[None]:
    """Excludes a block from the time of training."""
    with self.tracker.pause(), self.pace.pause() if self.pace else contextlib.nullcontext():
      yield

  def _params(self, state: State) -> Any:
    return with_constants(averaging.evaluation_params(state.opt_state, state.params), self.constants)

  def out_of_patience(self, step: int) -> bool:
    best, patience = self.checkpoints.best_step(), self.run.patience
    return None not in (best, patience) and step - best >= patience * self.run.evaluate_every

  def _compiles(self, step: int, batch: Batch) -> bool:
    """Whether the batch of a step is the first one of its shape, which is then checked; stages are printed."""
    shape = self.run.schedule.shape(step)
    if shape in self.shapes:
      return False
    checks.check_batch(self.run, self.mesh, shape, batch)
    self.shapes.add(shape)
    if self.run.stages:
      print(f'step {step}: batches of {shape[0]} x {shape[1]} from here on, compiling')
    return True

  def _report(self, pending: tuple[int, dict[str, jax.Array], Batch] | None, state: State) -> State:
    """Logs the metrics of a step. Returns the state; another one where the step is not finite and is left out.

    Raises:
      NotFinite: the loss or gradient of the step is not finite, or too many steps were skipped or left out.
    """
    if pending is None:
      return state
    run, guard, step = self.run, self.run.guard, pending[0]
    metrics = {name: float(value) for name, value in pending[1].items()}
    self.tracker.log(step, metrics)
    self._report_jump(step, metrics.get('learning_rate', 0.))
    is_finite = math.isfinite(metrics['loss'] + metrics['grad_norm'])
    if is_finite:
      self.failing = None
    elif self.failing is None:   # unless the run stops, the state is still the one before the step
      stops, self.failing = guard is None and run.not_finite is None, step
      not_finite.keep(self.workdir, step, None if stops else state, pending[2], metrics)
    if guard and metrics['skipped_lately'] > guard.most:
      raise NotFinite(f'step {step}: {metrics["skipped_lately"]:.0f} of the last {guard.window} steps were skipped, '
                      f'more than {guard.most}; {self.saver.describe_newest()}. Lower the learning rate')
    return state if is_finite else self._leave_out(step, metrics, state)

  def _leave_out(self, step: int, metrics: Mapping[str, float], state: State) -> State:
    """Returns the state after a step that is not finite, and whose update is left out. Raises NotFinite elsewhere."""
    policy, advice = self.run.not_finite, not_finite.advice(self.failing)
    values = f'step {step}: the loss is {metrics["loss"]}, the norm of its gradient {metrics["grad_norm"]}'
    if isinstance(policy, GoBack) or (policy is None and self.run.guard is None):
      raise NotFinite(f'{values}; {self.saver.describe_newest()}. Lower the learning rate, or warm up longer; {advice}',
                      step)
    self.left_out_steps.append(step)
    lately = sum(other > step - policy.window for other in self.left_out_steps) if isinstance(policy, Skip) else 0
    if lately and lately > policy.most:
      raise NotFinite(f'{values}; of the last {policy.window} steps, {lately} were left out, more than {policy.most}; '
                      f'{self.saver.describe_newest()}. Lower the learning rate; {advice}')
    print(f'{values}: its update is left out; {advice}')
    return not_finite.left_out(self.run, state)

  def _report_jump(self, step: int, rate: float) -> None:
    """Prints a line where the learning rate jumps at the first step, because the number of steps has changed."""
    if self.earlier_plan is None:
      return
    steps, earlier_rate = self.earlier_plan
    if abs(rate - earlier_rate) > 0.05 * earlier_rate:
      print(f'the learning rate jumps from {earlier_rate:.2g} to {rate:.2g} at step {step}: its schedule was made '
            f'for {steps:,} steps, and is now for {self.run.steps:,}')
    self.earlier_plan = None

  def _check_finite(self, step: int, state: State) -> None:
    """Raises NotFinite where the update of a step made parameters that are not finite, which its loss does not show."""
    if not integrity.all_finite(state.params):
      raise NotFinite(f'step {step}: the update made parameters whose norm is not finite; '
                      f'{self.saver.describe_newest()}. Lower the learning rate, or warm up longer; '
                      f'{not_finite.advice(step)}', step)

  def _evaluate(self, step: int, state: State) -> bool:
    """Evaluates a step, unless the ledger has its metrics. Returns False where a signal cut that short."""
    # The first evaluation compiles, which does not count for the pace either.
    paused = self._paused() if self.compiles_evaluation else self.tracker.pause()
    with paused, self.phases('validate'), self._saving_at_signal(step, state):
      parameters = fingerprint(averaging.evaluation_params(state.opt_state, state.params))
      metrics = self.ledger.metrics(step, parameters)
      if metrics is None:
        metrics = self.evaluation(self._params(state), step, lambda: self.interrupt.should_stop(step))
        self.compiles_evaluation = False
        if metrics is None:
          return False
        self.ledger.add(step, parameters, metrics)
    self.metrics = metrics
    return True

  def _save(self, step: int, state: State) -> None:
    if step > self.saver.saved:
      with self.tracker.pause(), self.phases('checkpoint'):
        self.saver.save(step, lambda: self._start_saving(step, state))

  def _start_saving(self, step: int, state: State) -> None:
    facts = {**self.facts, 'parameters': fingerprint(state.params)}
    metric = self.metrics[self.run.best] if self.evaluated == step else None
    permanent = any(map(self._is_permanent, range(self.saver.saved + 1, step + 1)))   # one may have failed
    self.checkpoints.save(step, state, facts, metric, self.tracker.commit(step), permanent)

  def _saving_at_signal(self, step: int, state: State) -> contextlib.AbstractContextManager[None]:
    """Saves a step from another thread, and ends the process, where a block does not return soon after a signal.

    Processes of a cluster cannot agree on a step in such a block, so that one of them ends only where nothing is lost.
    """
    if jax.process_count() > 1 and step > self.saver.saved:
      return contextlib.nullcontext()

    def rescue() -> None:
      if step > self.saver.saved:
        with jax.set_mesh(self.mesh):   # each thread has its own
          self._check_finite(step, state)
          self._start_saving(step, state)
      self.checkpoints.wait(alone=True)
      print(f'stopped at step {step} of {self.run.steps}: the same command goes on from there', flush=True)

    return self.interrupt.during(rescue)
