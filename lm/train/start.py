"""Training: a `Run` says what; `train` does it, from where it was left."""
import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from lm import optim, seeds, sharding
from lm.train import validation
from lm.train.checks import check, check_vocabulary
from lm.train.feed import DataFeed
from lm.train.interrupt import Interrupt
from lm.train.loop import Loop, Result
from lm.train.run import Run, State, abstract_state, begin, identity, init, load_constants, stored
from lm.workdir import checkpoint, mismatch, records, track
from lm.workdir.judge import Judge


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
  before = checkpoint.stored_facts(workdir / 'checkpoints')
  with phases('prepare data'):
    data = run.data.open(workdir, control=run.objective.control,
                         check=functools.partial(_check_data, run, before, new_objective))
    check_vocabulary(run, data)
    # Before signals are caught: what the data computes first may take long, and a next start continues it.
    feed = (run.feed or DataFeed)(run, data, mesh)
    run = dataclasses.replace(run, steps=feed.steps(run.steps))
    for line in feed.summary(run.steps):
      print(line)
    evaluation = validation.Evaluation(run, data, mesh)
    for line in evaluation.summary():
      print(line)
  facts = {**identity(run, data.fingerprint, data.tokenizer.fingerprint), 'run': stored(run)}
  judge = Judge(facts['objective'], run.best, run.better)
  with (checkpoint.Checkpoints(workdir / 'checkpoints', keep=run.keep, judged_by=judge) as checkpoints,
        Interrupt() as interrupt, contextlib.closing(feed)):
    with phases('restore or initialise'):
      constants = load_constants(run)
      state, start, logged = _restore(run, mesh, checkpoints)
    planned = next((record['steps'] for record in reversed(records.read(workdir)) if 'steps' in record), run.steps)
    # Accepted: what opens the run later goes by this.
    records.add(workdir, data=data.fingerprint, steps=run.steps, minutes=run.minutes)
    _print_size(run, mesh, state, workdir)
    loop = Loop(run, workdir, mesh, data, feed, evaluation, constants, checkpoints, judge, facts, interrupt, phases,
                watch)
    if start >= run.steps and not loop.awaits_validation(start):
      print(f'finished: {workdir} is at step {start} of {run.steps}; more steps (--steps) go on from there')
    elif start and not loop.out_of_patience(start):
      print(f'going on from step {start}')
      if planned != run.steps and (rate := optim.learning_rate(state.opt_state)) is not None:
        loop.former = planned, float(rate)
    with records.preserve(workdir):
      return loop.go(state, start, logged)


def _check_data(run: Run, stored: Any, new_objective: bool, data: str, tokenizer: str) -> None:
  """ValueError, before anything is made of the data, where the checkpoint in the workdir is of another run.

  Where there is none: where the parameters that training starts from are for another tokenizer.
  """
  if stored is not None:
    stored, now = ({name: value for name, value in facts.items()
                    if name not in ('parameters', 'run') and not (new_objective and name == 'objective')}
                   for facts in (stored, identity(run, data, tokenizer)))
    mismatch.check(stored, now)
  elif run.start_tokenizer not in (None, tokenizer):
    raise ValueError(f'the parameters to start from are for another tokenizer (fingerprint {run.start_tokenizer}) than '
                     f'that of this run (fingerprint {tokenizer}): take theirs, or start from them all the same by '
                     '--init_ignore_tokenizer')


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


def _print_size(run: Run, mesh: jax.sharding.Mesh, state: State, workdir: pathlib.Path) -> None:
  size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  print(f'{size:,} parameters to train on {mesh.size} {mesh.devices.flat[0].device_kind} ({sharding.mesh_text(mesh)}); '
        f'{run.schedule.tokens_before(run.steps):,} positions in {run.steps:,} steps; saved in {workdir}')
