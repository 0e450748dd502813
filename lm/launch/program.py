"""An experiment function -> an absl program. Its keyword-only parameters are its flags, one by one or in groups.

  def experiment(*, layers: int = 12, optimizer: Optimizer = Optimizer(lr=1e-3)): return train.Run(...)
  if __name__ == '__main__': launch.run(experiment)

What a group is, see `lm.signature`; what types flags may have, see `arguments`. Exit codes: 0 done, 1 bad input, 2 bad
flags, 128 + the number of the signal where a signal stopped it: 130 for Ctrl-C, 143 for SIGTERM.
"""
import contextlib
import dataclasses
import inspect
import os
import pathlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import absl.logging  # noqa: F401  (defines --v and its kin)
from absl import flags

from lm import exits, signature
from lm.launch.arguments import parse, require


def run(experiment: Callable[..., Any], then: Callable[..., None] | None = None) -> None:
  """Trains the `train.Run` that `experiment` returns, in `--workdir`; calls `then(run, workdir, result)` at its end."""
  with _program(experiment, _train, partly=True) as (knobs, shared):
    from lm.launch import resume
    workdir = shared['workdir'] or pathlib.Path('runs', pathlib.Path(inspect.getfile(experiment)).stem)
    settled = resume.settle(experiment, knobs, shared, workdir)
    require(experiment, settled.knobs)
    print(*settled.lines(workdir), sep='\n', end='\n' if settled.kept or settled.changed else '')
    _train(experiment, settled.knobs, then, settled, **{**settled.shared, 'workdir': workdir})


def tool(function: Callable[..., None]) -> None:
  """Runs a function that is no experiment: it has only the flags in its own signature."""
  with _program(function) as (knobs,):
    signature.call(function, knobs)


def _train(experiment: Callable[..., Any], knobs: dict[str, Any], then: Callable[..., None] | None,
           settled: Any = None, /, *, workdir: pathlib.Path | None = None, init: pathlib.Path | None = None,
           init_ignore_tokenizer: bool = False, seed: int = 0, mesh: str | None = None,
           coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None,
           new_objective: bool = False, verify: bool = False):
  """A run in its workdir. The keyword-only parameters are the flags that every run shares.

  Args:
    workdir: where the run lives; one that was stopped goes on from there. Without it: runs/<name of the script>.
    init: start from the result of another run's workdir, from a Hugging Face folder, an imported one or an id on the
      hub; adapters lie on it.
    init_ignore_tokenizer: start from it also where this run has another tokenizer.
    seed: fixes the data order, the initialisation and the losses.
    mesh: the size of each mesh axis, such as data:4,model:2; none puts all devices on data.
    coordinator_address: host:port of process 0, in a cluster that is not found by itself.
    num_processes: how many there are in that cluster.
    process_id: which of them this one is.
    new_objective: go on from a checkpoint of another objective; the best checkpoint is then the best by this one.
    verify: first compare all files of the data (tokenizer, tokens, columns) with their checksums.
  """
  from lm import sharding
  from lm.sharding import hosts as cluster
  cluster.join(coordinator_address, num_processes, process_id)
  workdir = workdir or pathlib.Path('runs', pathlib.Path(inspect.getfile(experiment)).stem)
  start(experiment, knobs, workdir, sharding.make_mesh(mesh), init, seed,
        then and (lambda configured, result: then(configured, workdir, result)),
        init_ignore_tokenizer=init_ignore_tokenizer, new_objective=new_objective, settled=settled, verify=verify)


def start(experiment: Callable[..., Any], knobs: dict[str, Any], workdir: pathlib.Path, mesh: Any,
          init: pathlib.Path | None = None, seed: int = 0, then: Callable[..., None] | None = None,
          watch: Callable[..., bool] | None = None, init_ignore_tokenizer: bool = False,
          new_objective: bool = False, settled: Any = None, verify: bool = False) -> tuple[Any, Any]:
  """Trains the run of an experiment in a workdir, on a mesh, with a record of it there.

  `settled` are the flags of a program, see `resume`. Calls `then(run, result)` at its end. Returns the run and its
  result, see `train.train`. Raises `interrupt.Stopped` where a signal stopped it.
  """
  import jax

  from lm import load, lora, train
  from lm.launch import outcome, resume
  from lm.train import budget
  from lm.workdir import checkpoint, records
  init = init or knobs.get('init')
  init = init.resolve() if init and init.exists() else init   # else an id on the hub
  knobs = {**knobs, 'init': init} if 'init' in knobs else knobs
  program, settled = settled is not None, settled or resume.UNCHANGED   # or a trial of a study

  def resumes() -> bool:
    return checkpoint.stored_facts(workdir / 'checkpoints') is not None

  def build(seed: int = seed, init: pathlib.Path | None = init, **changes: Any) -> Any:
    own = {'init': init} if 'init' in knobs else {}
    configured = dataclasses.replace(train.opened(signature.call(experiment, {**knobs, **changes, **own})), seed=seed)
    if init is None:
      return lora.start_from(configured, None)
    try:
      return load.start_from(configured, str(init), init_ignore_tokenizer)
    except OSError:   # it is gone, or the hub is
      if 'init' in settled.changed or isinstance(configured.model, lora.Adapted) or not resumes():
        raise
      return configured   # its checkpoints have all parameters

  script = pathlib.Path(inspect.getfile(experiment))
  with records.claim(workdir, script.name), jax.set_mesh(mesh):
    try:
      configured = budget.planned(build, records.read(workdir))
    except FileNotFoundError as error:
      if init is None or not resumes():
        raise
      raise FileNotFoundError(f'{error}. The run in {workdir} started from there, and still reads there what lies '
                              'under its adapters, or its shape and tokenizer: put it back. Where flags give shape '
                              'and tokenizer, --init=none goes on without it') from None
    resume.check_minutes(settled, configured)
    resume.check_start(settled, workdir, build)
    if verify and (without := configured.data.verify(workdir)):
      print(f'not verified, since it has no checksums: {", ".join(without)}')
    record(experiment, knobs, workdir, mesh, init, seed)
    with resume.naming(settled, workdir, build):
      result = train.train(configured, workdir, mesh, watch, new_objective)
    result.raise_if_stopped()
    if program and result.finished:
      outcome.show(configured, workdir, result, script, sample=then is None)   # a report has samples of its own
    if then:
      then(configured, result)
  return configured, result


def record(experiment: Callable[..., Any], knobs: dict[str, Any], workdir: pathlib.Path, mesh: Any,
           init: pathlib.Path | None = None, seed: int = 0) -> None:
  """Writes down what is run, so that the run can be opened again."""
  from lm.workdir import records
  script = pathlib.Path(inspect.getfile(experiment))
  records.start(workdir, script=script.name, path=str(script.resolve()), function=experiment.__name__, argv=sys.argv,
                knobs=knobs, seed=seed, init=init and str(init), **records.circumstances(script, mesh))


@contextlib.contextmanager
def _program(*functions: Callable[..., Any], partly: bool = False) -> Iterator[list[dict[str, Any]]]:
  """Flags in, one-line errors and exit codes out."""
  with _interruptible():
    try:
      values, debug = parse(functions, sys.argv, partly)
    except (flags.Error, ValueError) as error:  # absl raises ValueError for --noflag=value
      print(f'error: {error}', file=sys.stderr)
      sys.exit(2)
    try:
      _cache_compilations()
      yield values
    except flags.Error as error:   # a flag is required
      print(f'error: {error}', file=sys.stderr)
      _exit(2)
    except KeyboardInterrupt as error:
      if code := getattr(error, 'code', None):   # interrupt.Stopped, which all processes of a cluster raise at one step
        sys.exit(code)
      _exit(130)
    except BrokenPipeError:   # who reads, such as head, has enough
      os._exit(141)
    except Exception as error:
      try:
        from lm.launch import failures
        failures.report(error, debug, {name: value for own in values for name, value in own.items()})
      finally:   # the exit that a cluster needs
        _exit(1)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
  """Ctrl-C ends the program at once. Python's own exception is lost where it falls into a callback of JAX."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  former = signal.signal(signal.SIGINT, lambda *_: (os.write(2, b'\ninterrupted\n'), exits.at_once(130)))
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, former)


def _exit(code: int) -> None:
  jax = sys.modules.get('jax')
  if jax and jax.distributed.is_initialized():
    # An ordinary exit would wait minutes for the other processes, which wait for this one in a collective.
    exits.at_once(code)
  sys.exit(code)


def _cache_compilations() -> None:
  """Compiled programs are kept on disk: a second start compiles nothing."""
  import jax
  if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR
    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    jax.config.update('jax_compilation_cache_dir', str(cache / 'lm' / 'jax'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
