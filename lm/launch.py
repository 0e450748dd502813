"""An experiment function -> an absl program. Its keyword-only parameters are its flags.

  def experiment(*, layers: int = 12, lr: float = 1e-3): return train.Run(...)
  if __name__ == '__main__': launch.run(experiment)

Types: int, float, bool, str, Path, Literal (a choice), list and tuple of these (comma separated), `Texts` (the flag is
given once for each), `T | None` (the word `none`). Without a default a flag is required. Exit codes: 0 done, 1 bad
input, 2 bad flags, 128 + the number of the signal where a signal stopped it: 130 for Ctrl-C, 143 for SIGTERM.
"""
import contextlib
import dataclasses
import difflib
import inspect
import os
import pathlib
import re
import signal
import sys
import textwrap
import threading
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import absl.logging  # noqa: F401  (defines --v and its kin)
from absl import flags

# The type of a flag whose values are whole texts, commas included: `--stop=, --stop=END`.
Texts = typing.NewType('Texts', tuple)


def run(experiment: Callable[..., Any], then: Callable[..., None] | None = None) -> None:
  """Trains the `train.Run` that `experiment` returns, in `--workdir`; calls `then(run, workdir, result)` at its end."""
  with _program(experiment, _train) as (knobs, shared):
    _train(experiment, knobs, then, **shared)


def tool(function: Callable[..., None]) -> None:
  """Runs a function that is no experiment: it has only the flags in its own signature."""
  with _program(function) as (knobs,):
    function(**knobs)


def _train(experiment: Callable[..., Any], knobs: dict[str, Any], then: Callable[..., None] | None, *,
           workdir: pathlib.Path | None = None, init: pathlib.Path | None = None,
           init_ignore_tokenizer: bool = False, seed: int = 0, mesh: str | None = None,
           coordinator_address: str | None = None, num_processes: int | None = None, process_id: int | None = None):
  """A run in its workdir. The keyword-only parameters are the flags that every run shares.

  Args:
    workdir: where the run lives; one that was stopped goes on from there. Without it: runs/<name of the script>.
    init: start from the result of another run's workdir, from a Hugging Face folder, an imported one or an id on the
      hub; adapters lie on it.
    init_ignore_tokenizer: start from it also where this run has another tokenizer.
    seed: fixes the data order, the initialisation and the losses.
    mesh: the devices as DATAxMODEL, such as 8x1; none puts all of them on data.
    coordinator_address: host:port of process 0, in a cluster that is not found by itself.
    num_processes: how many there are in that cluster.
    process_id: which of them this one is.
  """
  from lm import cluster, sharding
  cluster.join(coordinator_address, num_processes, process_id)
  workdir = workdir or pathlib.Path('runs', pathlib.Path(inspect.getfile(experiment)).stem)
  start(experiment, knobs, workdir, sharding.make_mesh(mesh), init, seed,
        then and (lambda configured, result: then(configured, workdir, result)),
        init_ignore_tokenizer=init_ignore_tokenizer)


def start(experiment: Callable[..., Any], knobs: dict[str, Any], workdir: pathlib.Path, mesh: Any,
          init: pathlib.Path | None = None, seed: int = 0, then: Callable[..., None] | None = None,
          watch: Callable[..., bool] | None = None, init_ignore_tokenizer: bool = False) -> tuple[Any, Any]:
  """Trains the run of an experiment in a workdir, on a mesh, with a record of it there.

  Calls `then(run, result)` at its end. Returns the run and its result, see `train.train`. Raises `interrupt.Stopped`
  where a signal stopped it.
  """
  import jax

  from lm import lora, records, train, trained
  init = init or knobs.get('init')
  init = init.resolve() if init and init.exists() else init   # else an id on the hub
  knobs = {**knobs, 'init': init} if 'init' in knobs else knobs
  script = pathlib.Path(inspect.getfile(experiment))
  with records.claim(workdir, script.name), jax.set_mesh(mesh):
    knobs = records.settle(knobs, records.read(workdir))
    configured = dataclasses.replace(experiment(**knobs), seed=seed)
    if init is None:
      configured = lora.start_from(configured, None)
    else:
      configured = trained.start_from(configured, str(init), init_ignore_tokenizer)
    record(experiment, knobs, workdir, mesh, init, seed)
    result = train.train(configured, workdir, mesh, watch)
    result.raise_if_stopped()
    if then:
      then(configured, result)
  return configured, result


def record(experiment: Callable[..., Any], knobs: dict[str, Any], workdir: pathlib.Path, mesh: Any,
           init: pathlib.Path | None = None, seed: int = 0) -> None:
  """Writes down what is run, so that the run can be opened again."""
  from lm import records
  script = pathlib.Path(inspect.getfile(experiment))
  records.start(workdir, script=script.name, path=str(script.resolve()), function=experiment.__name__, argv=sys.argv,
                knobs=knobs, seed=seed, init=init and str(init), **records.circumstances(script, mesh))


@contextlib.contextmanager
def _program(*functions: Callable[..., Any]) -> Iterator[list[dict[str, Any]]]:
  """Flags in, one-line errors and exit codes out."""
  with _interruptible():
    try:
      values, debug = parse(functions, sys.argv)
    except (flags.Error, ValueError) as error:  # absl raises ValueError for --noflag=value
      print(f'error: {error}', file=sys.stderr)
      sys.exit(2)
    try:
      _cache_compilations()
      yield values
    except KeyboardInterrupt as error:
      if code := getattr(error, 'code', None):   # interrupt.Stopped, which all processes of a cluster raise at one step
        sys.exit(code)
      _exit(130)
    except BrokenPipeError:   # who reads, such as head, has enough
      os._exit(141)
    except Exception as error:
      try:
        from lm import failures
        failures.report(error, debug)
      finally:   # the exit that a cluster needs
        _exit(1)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
  """Ctrl-C ends the program at once. Python's own exception is lost where it falls into a callback of JAX."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return
  former = signal.signal(signal.SIGINT, lambda *_: (os.write(2, b'\ninterrupted\n'), os._exit(130)))
  try:
    yield
  finally:
    signal.signal(signal.SIGINT, former)


def _exit(code: int) -> None:
  jax = sys.modules.get('jax')
  if jax and jax.distributed.is_initialized():
    # An ordinary exit would wait minutes for the other processes, which wait for this one in a collective.
    sys.stdout.flush()
    os._exit(code)
  sys.exit(code)


def parse(functions: Sequence[Callable[..., Any]], argv: Sequence[str]) -> tuple[list[dict[str, Any]], bool]:
  """The keyword arguments of each function, and `--debug`; flags.Error, in one line, for a bad flag.

  Scripts named by `--script` may be executed from then on, see `scripts`. A function may have the flag --init of every
  run too, which both are given.
  """
  # Not the global FLAGS: there, two experiments in one process could not both have a flag `lr`.
  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  for function in functions:
    for parameter in _keywords(function):
      _define(values, function, parameter)
  for name in ('debug', 'help', 'helpfull'):
    flags.DEFINE_bool(name, False, '', flag_values=values)
  flags.DEFINE_flag(flags.Flag(_Parser(tuple[pathlib.Path, ...]), None, 'script', (), ' '), flag_values=values)
  unknown = values(argv, known_only=True)
  if values['help'].value or values['helpfull'].value:
    print(_help(functions, argv[0]) + ('\n\n' + flags.FLAGS.get_help() if values['helpfull'].value else ''))
    sys.exit(0)
  try:
    positional = flags.FLAGS(unknown)[1:]  # absl's own flags; grain and absl.logging read them, so always parse
  except flags.UnrecognizedFlagError as error:
    nearest = difflib.get_close_matches(error.flagname, list(values), n=1, cutoff=0)[0]
    raise flags.Error(f'unknown flag --{error.flagname}; the nearest is --{nearest} (--help lists all)') from None
  if positional:
    raise flags.Error(f'unexpected argument {positional[0]!r}; flags are written --name=value')
  for parameter in [p for function in functions for p in _keywords(function)]:
    if parameter.default is parameter.empty and not values[parameter.name].present:
      raise flags.Error(f'--{parameter.name} is required: {values[parameter.name].parser.allowed}')
  if values['script'].value:
    from lm import scripts
    try:
      scripts.trust(*values['script'].value)
    except FileNotFoundError as error:
      raise flags.Error(f'flag --script: {error}') from None
  return [{p.name: values[p.name].value for p in _keywords(f)} for f in functions], values['debug'].value


def _keywords(function: Callable[..., Any]) -> list[inspect.Parameter]:
  return [p for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY]


def _define(values: flags.FlagValues, function: Callable[..., Any], parameter: inspect.Parameter) -> None:
  name, hints = parameter.name, typing.get_type_hints(function)
  if name == 'init' and name in values and parameter.default is None:
    return
  if name in values or name not in hints:
    raise TypeError(f'{function.__qualname__}: {name} has no type, or is the name of a flag that every run has')
  default = None if parameter.default is parameter.empty else parameter.default
  if hints[name] is Texts:
    flags.DEFINE_flag(flags.MultiFlag(_Parser(str), None, name, default, ' '), flag_values=values)
    return
  switch = hints[name] in (bool, bool | None)   # that --noNAME turns off
  flags.DEFINE_flag(flags.Flag(_Parser(hints[name]), None, name, default, ' ', boolean=switch,
                               allow_using_method_names=True), flag_values=values)


class _Parser(flags.ArgumentParser):
  """absl's view of a type. absl puts the name and the value of the flag in front of the ValueError's message."""

  def __init__(self, kind: Any):
    self.kind, self.allowed = kind, _allowed(kind)

  def parse(self, argument: Any) -> Any:
    if not isinstance(argument, str):  # a default
      return argument
    try:
      return _convert(self.kind, argument)
    except (ValueError, KeyError):
      raise ValueError(f'expected {self.allowed}') from None


def _convert(kind: Any, text: str) -> Any:
  """`text` as a value of type `kind`; ValueError if it is none."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    return None if text.strip().lower() == 'none' else _convert(_not_none(inner), text)
  if origin is typing.Literal:
    return {str(choice): choice for choice in inner}[text.strip()]
  if origin in (list, tuple):
    items = text.split(',') if text else []
    fixed = origin is tuple and inner[-1] is not Ellipsis
    return origin(_convert(k, item) for k, item in zip(inner if fixed else inner[:1] * len(items), items, strict=True))
  text = text if kind is str else text.strip()   # a prompt may end in a space
  if kind is bool:
    return flags.BooleanParser().parse(text)
  if kind is int:
    try:
      return int(text)
    except ValueError:
      number = float(text)  # 1e4
      if not number.is_integer():
        raise
      return int(number)
  value = kind(text)
  if value != value or kind is pathlib.Path and not text:
    raise ValueError('nan, or a path that is empty')
  return value.expanduser() if kind is pathlib.Path else value


def _not_none(inner: tuple[Any, ...]) -> Any:
  kinds = [kind for kind in inner if kind is not types.NoneType]
  if len(kinds) != 1:
    raise TypeError(f'a flag has one type, or one type and None, not {" | ".join(map(str, kinds))}')
  return kinds[0]


def _allowed(kind: Any) -> str:
  """What may be written for a type, in words; TypeError if it cannot be a flag."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    return f'{_allowed(_not_none(inner))} | none'
  if origin is typing.Literal:
    return ' | '.join(map(str, inner))
  if origin is tuple and inner[-1] is not Ellipsis:
    return ','.join(map(_allowed, inner))
  if origin in (list, tuple):
    return '{0},{0},...'.format(_allowed(inner[0]))
  words = {int: 'whole number', float: 'number', bool: 'true | false', str: 'text', pathlib.Path: 'path',
           Texts: 'text, the flag once for each'}
  if kind not in words:
    raise TypeError(f'{kind} cannot be a flag; use int, float, bool, str, Path, Literal, list, tuple or T | None')
  return words[kind]


def _argument_help(function: Callable[..., Any]) -> dict[str, str]:
  """The Args section of a docstring, by name."""
  section = re.search(r'^Args:\n((?: +.*(?:\n|$)|\n)*)', inspect.getdoc(function) or '', re.MULTILINE)
  lines = textwrap.dedent(section[1]) if section else ''
  entries = re.findall(r'^(\w+): *(.*(?:\n +.*)*)', lines, re.MULTILINE)
  return {name: ' '.join(text.split()) for name, text in entries}


def _help(functions: Sequence[Callable[..., Any]], script: str) -> str:
  about = inspect.getdoc(inspect.getmodule(functions[0])) or inspect.getdoc(functions[0]) or ''
  lines = [f'usage: python {script} [--flag=value ...]', '', about.split('\n\n')[0]]
  for title, function in zip(('Flags', 'Flags of every run'), functions):
    lines += ['', f'{title}:']
    hints, notes = typing.get_type_hints(function), _argument_help(function)
    for parameter in _keywords(function):
      note = f'{notes[parameter.name].rstrip(".")}. ' if parameter.name in notes else ''
      default = 'required' if parameter.default is parameter.empty else f'default {_written(parameter.default)}'
      lines += _entry(parameter.name, f'{note}({_allowed(hints[parameter.name])}; {default})')
  return '\n'.join([*lines, '', 'Always:', *_entry('debug', 'show the traceback of every error'),
                    *_entry('script', 'the scripts of runs to open that are not beside this one; they are executed'),
                    *_entry('helpfull', "this, and absl's own flags")])


def _entry(name: str, text: str) -> list[str]:
  return textwrap.wrap(text, 114, initial_indent=f'  --{name:<19} ', subsequent_indent=' ' * 24)


def _written(value: Any) -> str:
  """A default, as it would be written on the command line."""
  if isinstance(value, (list, tuple)):
    return ','.join(map(_written, value))
  return {'True': 'true', 'False': 'false', 'None': 'none'}.get(str(value), str(value))


def _cache_compilations() -> None:
  """Compiled programs are kept on disk: a second start compiles nothing."""
  import jax
  if not jax.config.jax_compilation_cache_dir:  # JAX_COMPILATION_CACHE_DIR
    cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser()
    jax.config.update('jax_compilation_cache_dir', str(cache / 'lm' / 'jax'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
