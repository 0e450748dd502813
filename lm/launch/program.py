"""The program around an experiment: it parses flags, trains the run, reports errors and sets the exit code.

Functions import JAX and the modules that need it when they are called, so that `--help` and wrong flags are answered
at once.
"""
import contextlib
import functools
import inspect
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import absl.logging  # noqa: F401  (defines --v and other flags of logging)
from absl import flags

from lm import exits, signature
from lm.launch.arguments import parse, require
from lm.launch.cluster import Cluster


def run(experiment: Callable[..., Any], report: Callable[..., None] | None = None,
        check: Callable[[], None] | None = None) -> None:
  """Runs a program that trains what an experiment returns.

  The program has the flags of the experiment and those that all runs share, such as `--workdir` and `--seed`. Where the
  workdir holds a run of the same script, training continues from its newest checkpoint, and flags that the command line
  leaves out have the values of that run.

  Args:
    experiment: a function whose keyword-only parameters are flags, and that returns a `train.Run`.
    report: called as `report(run, workdir, result)` after training. Without it, the program prints a sample of text and
      the next command.
    check: called before anything is opened or trained; raises ImportError where a package that the report needs is
      missing.
  """
  with _program(experiment, _train, allow_missing=True) as (knobs, shared):
    from lm.launch import resume
    workdir = shared['workdir'] or pathlib.Path('runs', pathlib.Path(inspect.getfile(experiment)).stem)
    program_flags = resume.inherit_flags(experiment, knobs, shared, workdir)
    require(experiment, program_flags.knobs)
    if check is not None:
      check()
    for line in program_flags.lines(workdir):
      print(line)
    _train(experiment, program_flags.knobs, report, program_flags,
           **signature.arguments(_train, {**program_flags.shared, 'workdir': workdir}))


def tool(function: Callable[..., None]) -> None:
  """Runs a program that calls a function with the values of its flags; the program has no other flags."""
  with _program(function) as (knobs,):
    signature.call(function, knobs)


def _train(experiment: Callable[..., Any], knobs: dict[str, Any], report: Callable[..., None] | None,
           program_flags: Any = None, /, *, workdir: pathlib.Path | None = None, init: pathlib.Path | None = None,
           init_ignore_tokenizer: bool = False, seed: int = 0, mesh: str | None = None,
           cluster: Cluster = Cluster(), new_objective: bool = False, verify: bool = False,   # noqa: B008 (frozen)
           on_not_finite: Literal['stop', 'skip', 'go_back'] | None = None, replay: int | None = None,
           deterministic: bool = False, doctor: bool = True, diagnose: bool = False):
  """Trains a run in its workdir. The keyword-only parameters are the flags that all runs share.

  Args:
    workdir: the folder of the run; a run that was stopped continues from there. Without it: runs/<name of the script>.
    init: start from the result of another run's workdir, from a Hugging Face folder, an imported one or an id on the
      hub; adapters are trained on top of it.
    init_ignore_tokenizer: start from it also where this run has another tokenizer.
    seed: fixes the data order, the initialisation and the losses.
    mesh: the size of each mesh axis, such as fsdp:4,tensor:2; -1 is what remains. By default, one that fits is chosen.
    new_objective: continue from a checkpoint of another objective; the best checkpoint is then the best by this one.
    verify: first compare all files of the data (tokenizer, tokens, columns) with their checksums.
    on_not_finite: what happens at a step whose loss or gradient is not finite; skip leaves its update out, go_back
      continues from the last checkpoint without the batches in between; none skips with a spike guard, else stops.
    replay: instead of training, compute this step, which was not finite, in float32, and name the first module that is
      not finite.
    deterministic: on a GPU, compute the same bits at each start, which may be slower.
    doctor: before the first step, check in seconds that the run does what it says (masks, labels, gradients), and stop
      where it does not; --nodoctor leaves it out.
    diagnose: print what all checks of the doctor find, with a table of the optimizer, and train nothing.
  """
  import jax

  from lm import doctor as checks
  from lm import sharding
  from lm.sharding import determinism
  if deterministic:
    determinism.require()   # before the backend starts
  cluster.join()
  if deterministic:
    print(determinism.describe(jax.default_backend()))
  examine = checks.diagnose if diagnose else checks.check_start if doctor else None
  start(experiment, knobs, workdir, mesh and sharding.make_mesh(mesh), init, seed,
        report and (lambda run, result: report(run, workdir, result)),
        init_ignore_tokenizer=init_ignore_tokenizer, new_objective=new_objective, program_flags=program_flags,
        verify=verify, on_not_finite=on_not_finite, replay=replay, examine=examine)


def start(experiment: Callable[..., Any], knobs: dict[str, Any], workdir: pathlib.Path, mesh: Any,
          init: pathlib.Path | None = None, seed: int = 0, report: Callable[..., None] | None = None,
          watch: Callable[..., bool] | None = None, init_ignore_tokenizer: bool = False,
          new_objective: bool = False, program_flags: Any = None, verify: bool = False,
          on_not_finite: str | None = None, replay: int | None = None,
          examine: Callable[..., None] | None = None) -> tuple[Any, Any]:
  """Trains the run of an experiment in a workdir, and records there how it was started.

  Returns the run and its result, see `train.train`.

  Args:
    experiment: a function that returns a `train.Run`.
    knobs: the values of the experiment's flags, by name.
    workdir: the folder of the run.
    mesh: the mesh to train on; None chooses one that fits the run.
    init: the folder or the id on the hub whose parameters training starts from.
    seed: the seed of the run.
    report: called as `report(run, result)` after training.
    watch: called as `watch(step, metrics)` after each evaluation; training stops where it returns True.
    init_ignore_tokenizer: whether the parameters of `init` may be for another tokenizer.
    new_objective: whether the checkpoint in the workdir may be of another objective.
    program_flags: the `resume.ProgramFlags` of a program, which prints the outcome; None for a run of a study.
    verify: whether the files of the data are first compared with their checksums.
    on_not_finite: what happens at a step that is not finite, as the flag says.
    replay: the step to replay instead of training; the result is then None.
    examine: called as `examine(workdir, train.Start)` before the first step.

  Raises:
    interrupt.Stopped: a signal stopped the run.
  """
  import jax

  from lm import train
  from lm.launch import building, outcome, policy, resume
  from lm.train import budget
  from lm.workdir import records

  knobs, init = building.with_init(knobs, init)
  prints_outcome, program_flags = program_flags is not None, program_flags or resume.UNCHANGED
  build = building.builder(experiment, knobs, workdir, init, seed, init_ignore_tokenizer,
                           'init' in program_flags.changes)
  script = pathlib.Path(inspect.getfile(experiment))
  with records.claim(workdir, script.name), contextlib.ExitStack() as stack:
    with building.naming_init(workdir, init):
      mesh = mesh or building.choose_mesh(build)
      stack.enter_context(jax.set_mesh(mesh))
      run = budget.plan(build, records.read(workdir))
    run = policy.with_policy(run, on_not_finite)
    if replay is not None:
      return run, _replay(run, workdir, mesh, replay)
    _check(run, build, workdir, program_flags, verify)
    record(experiment, knobs, workdir, mesh, init, seed)
    with resume.name_changed_flags(program_flags, workdir, build):
      result = train.train(run, workdir, mesh, watch, new_objective, examine and functools.partial(examine, workdir))
    result.raise_if_stopped()
    if prints_outcome and result.finished:
      outcome.show(run, workdir, result, script, sample=report is None)   # a report prints samples of its own
    if report:
      report(run, result)
  return run, result


def _replay(run: Any, workdir: pathlib.Path, mesh: Any, step: int) -> None:
  """Prints what is not finite first in a step."""
  from lm.train import replay
  print('\n'.join(replay.replay(run, workdir, mesh, step)))


def _check(run: Any, build: Callable[[], Any], workdir: pathlib.Path, program_flags: Any, verify: bool) -> None:
  """Raises ValueError where a run cannot continue with its flags, or, with `verify`, where its data is damaged."""
  from lm.launch import resume
  resume.check_minutes(program_flags, run)
  resume.check_start(program_flags, workdir, build)
  if verify and (unverified := run.data.verify(workdir)):
    print(f'not verified, since it has no checksums: {", ".join(unverified)}')


def record(experiment: Callable[..., Any], knobs: dict[str, Any], workdir: pathlib.Path, mesh: Any,
           init: pathlib.Path | None = None, seed: int = 0) -> None:
  """Adds a record of how a run was started to `workdir/run.json`, from which the run can be opened again."""
  from lm.workdir import records
  script = pathlib.Path(inspect.getfile(experiment))
  records.start(workdir, script=script.name, path=str(script.resolve()), function=experiment.__name__, argv=sys.argv,
                knobs=knobs, seed=seed, init=init and str(init), **records.circumstances(script, mesh))


@contextlib.contextmanager
def _program(*functions: Callable[..., Any], allow_missing: bool = False) -> Iterator[list[dict[str, Any]]]:
  """Yields the values of the functions' flags; turns the errors of the block into one line and an exit code.

  With `allow_missing`, required flags that the command line leaves out are no error.
  """
  with _interruptible(), _quiet_without_reader():
    try:
      values, debug = parse(functions, sys.argv, allow_missing)
    except (flags.Error, ValueError) as error:   # absl raises ValueError for --noflag=value
      print(f'error: {error}', file=sys.stderr)
      sys.exit(2)
    try:
      _cache_compilations()
      yield values
    except flags.Error as error:   # a required flag is missing
      print(f'error: {error}', file=sys.stderr)
      _exit(2)
    except KeyboardInterrupt as error:
      code = getattr(error, 'code', None)
      if code:   # interrupt.Stopped, which all processes of a cluster raise at the same step
        sys.exit(code)
      _exit(130)
    except BrokenPipeError:   # see `_quiet_without_reader`
      raise
    except Exception as error:
      try:
        from lm.launch import failures
        failures.report(error, debug, {name: value for own in values for name, value in own.items()})
      finally:   # a cluster needs this exit even where the report fails
        _exit(1)


@contextlib.contextmanager
def _quiet_without_reader() -> Iterator[None]:
  """Ends the program quietly where what reads its output, such as `head`, has ended."""
  try:
    try:
      yield
    finally:
      sys.stdout.flush()   # Python would flush at exit, and print the error
  except BrokenPipeError:
    os._exit(141)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
  """Makes Ctrl-C end the program at once; Python's KeyboardInterrupt is lost where a callback of JAX raises it."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def interrupt(*_):
    os.write(2, b'\ninterrupted\n')   # print is not safe in a handler
    exits.at_once(130)

  former = signal.signal(signal.SIGINT, interrupt)
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, former)


def _exit(code: int) -> None:
  """Ends the program with an exit code, in a cluster too."""
  jax = sys.modules.get('jax')
  if jax and jax.distributed.is_initialized():
    # An ordinary exit would wait minutes for the other processes, which wait for this one in a collective.
    exits.at_once(code)
  sys.exit(code)


def _cache_compilations() -> None:
  """Keeps compiled programs on disk, so that a second start compiles nothing."""
  import jax
  if not jax.config.jax_compilation_cache_dir:   # JAX_COMPILATION_CACHE_DIR sets another folder
    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    jax.config.update('jax_compilation_cache_dir', str(cache / 'lm' / 'jax'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
