"""Trains a run: opens its data, restores its newest checkpoint, and enters the loop."""
import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax

from lm import optim, seeds, sharding
from lm.sharding import hosts
from lm.train import validation
from lm.train.checks import check, check_vocabulary
from lm.train.feed import DataFeed
from lm.train.guard import GoBack
from lm.train.interfaces import Feed, OpenData
from lm.train.interrupt import Interrupt
from lm.train.loop import Loop, Result
from lm.train.not_finite import LeftOutBatches, NotFinite
from lm.train.run import Run, State, abstract_state, begin, identity, init, load_constants, run_to_json
from lm.workdir import checkpoint, mismatch, records, track
from lm.workdir.judge import Judge
from lm.workdir.ledger import Ledger


class Start(NamedTuple):
  """A run that is ready for its next step.

  Attributes:
    run: the run.
    data: its data, opened.
    feed: gives the batch of each step.
    mesh: the mesh, which is also the one that is set.
    state: the state before the next step.
    constants: the constants of the run, by name.
    step: the number of steps so far.
  """
  run: Run
  data: OpenData
  feed: Feed
  mesh: jax.sharding.Mesh
  state: State
  constants: Mapping[str, Any]
  step: int


def train(run: Run, workdir: pathlib.Path, mesh: jax.sharding.Mesh,
          watch: Callable[[int, dict[str, float]], bool] | None = None, new_objective: bool = False,
          examine: Callable[[Start], None] | None = None) -> Result:
  """Trains a run to `run.steps`, from the newest checkpoint in its workdir if there is one.

  At SIGINT, SIGTERM or SIGHUP, training saves after the present step and returns. A validation is cut short, and
  repeated when the run continues. A second signal ends the process at once.

  Args:
    run: the run.
    workdir: the folder of its checkpoints, data and log.
    mesh: the mesh to train on, which is also the one that is set.
    watch: called as `watch(step, metrics)` after each evaluation; training stops where it returns True.
    new_objective: whether the checkpoint may be of another objective; the best checkpoint is then the best by this one.
    examine: called before the next step; an error that it raises ends the run.

  Raises:
    NotFinite: a loss, or the parameters to be saved, are not finite. Earlier checkpoints stay.
    ValueError: parts of the run do not fit together, or it cannot continue from the checkpoint; this is raised before
      anything is compiled.
  """
  phases = track.Phases()
  sharding.require(jax.sharding.get_mesh())
  with sharding.idle_shares() as shares:
    check(run, mesh)
  _print_idle(run, mesh, shares)
  # Signals are not caught yet: preparing the data may take long, and the next start continues it.
  with hosts.ending_with_peers(), phases('prepare data'):
    hosts.connect(mesh)
    run, data, feed, evaluation = _open_data(run, workdir, mesh, new_objective)
  facts = {**identity(run, data.fingerprint, data.tokenizer.fingerprint), 'run': run_to_json(run)}
  judge = Judge(facts['objective'], run.best, run.better)
  with (checkpoint.Checkpoints(workdir / 'checkpoints', keep=run.keep, judged_by=judge) as checkpoints,
        Interrupt() as interrupt, contextlib.closing(feed), hosts.ending_with_peers()):
    with phases('restore or initialise'), interrupt.during(_say_nothing_is_lost):
      constants = load_constants(run)
    batches = LeftOutBatches(workdir)
    while True:
      run = _within_data(run, feed, batches.total)
      with phases('restore or initialise'), interrupt.during(_say_nothing_is_lost):
        state, start, logged = _restore(run, mesh, checkpoints)
      _print_size(run, mesh, state, workdir)
      if examine is not None:
        with phases('examine'), interrupt.during(_say_nothing_is_lost):
          examine(Start(run, data, feed, mesh, state, constants, start))
      planned = next((record['steps'] for record in reversed(records.read(workdir)) if 'steps' in record), run.steps)
      # Only a record with these facts is a run that was accepted, which can be opened later, and continued.
      records.add(workdir, data=data.fingerprint, steps=run.steps, minutes=run.minutes)
      loop = Loop(run, workdir, mesh, data, feed, evaluation, constants, checkpoints, judge, facts,
                  Ledger(workdir, evaluation.fingerprint), batches, interrupt, phases, watch)
      _announce(loop, state, start, planned)
      try:
        with records.preserve(workdir):
          return loop.train(state, start, logged)
      except NotFinite as error:
        if not isinstance(run.not_finite, GoBack) or error.step is None:
          raise
        checkpoints.wait()   # the one in progress is good too
        batches.go_back(run.not_finite, error, max(checkpoints.steps(), default=0))


def _open_data(run: Run, workdir: pathlib.Path, mesh: jax.sharding.Mesh, new_objective: bool
               ) -> tuple[Run, OpenData, Feed, validation.Evaluation]:
  """Opens the data of a run and describes it. Returns the run with the steps that there is data for, and readers."""
  before = checkpoint.stored_facts(workdir / 'checkpoints')
  data = run.data.open(workdir, control=run.objective.control,
                       check=functools.partial(_check_data, run, before, new_objective))
  check_vocabulary(run, data)
  feed = (run.feed or DataFeed)(run, data, mesh)
  run = _with_steps(run, feed.steps(run.steps))
  evaluation = validation.Evaluation(run, data, mesh)
  for line in (*feed.summary(run.steps), *evaluation.summary()):
    print(line)
  return run, data, feed, evaluation


def _announce(loop: Loop, state: State, start: int, planned: int) -> None:
  """Says from which step a run goes on; `planned` are the steps that it had when it was started before."""
  run = loop.run
  if start >= run.steps and not loop.awaits_validation(start):
    print(f'finished: {loop.workdir} is at step {start} of {run.steps}; more steps (--steps) go on from there')
  elif start and not loop.out_of_patience(start):
    print(f'going on from step {start}')
    rate = optim.learning_rate(state.opt_state)
    if planned != run.steps and rate is not None:
      loop.earlier_plan = planned, float(rate)


def _say_nothing_is_lost() -> None:
  print('stopped before the next step: the same command goes on from there', flush=True)


def _within_data(run: Run, feed: Feed, left_out: int) -> Run:
  """Returns a run of which so many batches are left out, with the steps that there are batches for."""
  steps = feed.steps(run.steps + left_out) - left_out if left_out else run.steps
  return _with_steps(run, min(run.steps, steps))


def _with_steps(run: Run, steps: int) -> Run:
  """Returns a run of so many steps: the same object where it has them, which keeps what was traced for it."""
  return run if steps == run.steps else dataclasses.replace(run, steps=steps)


def _check_data(run: Run, stored: Any, new_objective: bool, data: str, tokenizer: str) -> None:
  """Checks, before data is prepared, that a run can continue from the facts of a checkpoint, or start from parameters.

  `data` and `tokenizer` are fingerprints.

  Raises:
    ValueError: the checkpoint is of another run; or, without one, the parameters that training starts from are for
      another tokenizer.
  """
  if stored is not None:
    ignored = {'parameters', 'run', 'objective'} if new_objective else {'parameters', 'run'}
    now = identity(run, data, tokenizer)
    mismatch.check({name: value for name, value in stored.items() if name not in ignored},
                   {name: value for name, value in now.items() if name not in ignored})
  elif run.start_tokenizer not in (None, tokenizer):
    raise ValueError(f'the parameters to start from are for another tokenizer (fingerprint {run.start_tokenizer}) than '
                     f'that of this run (fingerprint {tokenizer}); use their tokenizer, or start from them all the '
                     'same by --init_ignore_tokenizer')


def _restore(run: Run, mesh: jax.sharding.Mesh, checkpoints: checkpoint.Checkpoints) -> tuple[State, int, list]:
  """Returns the state to continue from, its step, and the records of its log."""
  if not checkpoints.steps_of_all():
    if run.start is None:
      # The seed is an argument, so that runs of all seeds share one compiled program.
      return jax.block_until_ready(jax.jit(functools.partial(init, run))(seeds.key(run.seed))), 0, []
    params = run.start(run.model)
    state = jax.jit(lambda params: begin(run, params)._replace(params=None))(params)
    return jax.block_until_ready(state)._replace(params=params), 0, []
  restored = checkpoints.restore(abstract_state(run, mesh))
  return restored.state, restored.step, restored.records


def _print_idle(run: Run, mesh: jax.sharding.Mesh, shares: Sequence[float]) -> None:
  """Prints how long the stages of a pipeline wait, and what changes it."""
  if shares:
    stages = sharding.number_of_stages(mesh)
    print(f'each of {stages} stages is idle for {max(shares):.0%} of the iterations of the layers, with '
          f'{stages * run.accumulate} microbatches in a step; a larger --accumulate makes this less')


def _print_size(run: Run, mesh: jax.sharding.Mesh, state: State, workdir: pathlib.Path) -> None:
  size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  print(f'{size:,} parameters to train on {mesh.size} {mesh.devices.flat[0].device_kind} ({sharding.mesh_text(mesh)}); '
        f'{run.schedule.tokens_before(run.steps):,} positions in {run.steps:,} steps; saved in {workdir}')
