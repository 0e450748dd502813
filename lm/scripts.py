"""Scripts that make runs: which of them may be executed to open a run, and the functions in them.

What lies in a workdir may come from somebody else. Only scripts in the folder of the program that runs, and those that
its user named, are executed; never one inside the workdir, wherever `run.json` says that the script is.
"""
import contextlib
import importlib.util
import inspect
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_named: list[pathlib.Path] = []   # by the user of this process


def trust(*scripts: str | pathlib.Path) -> None:
  """Lets scripts be executed to open the runs that they made. FileNotFoundError where one is not there."""
  for script in map(pathlib.Path, scripts):
    if not script.is_file():
      raise FileNotFoundError(f'there is no script {script}; give the path of the one that made the run')
    _named.append(script.resolve())


def locate(record: Mapping[str, Any], workdir: pathlib.Path) -> pathlib.Path:
  """The script of a record in `workdir/run.json`.

  FileNotFoundError where none of its name may be executed, ValueError where the record is no record of a script.
  """
  name, recorded = record.get('script'), record.get('path')
  if not isinstance(name, str) or not isinstance(recorded, str) or pathlib.Path(name).name != name:
    raise ValueError(f'{workdir}/run.json names no script but {name!r}; restore it from a copy')
  program = pathlib.Path(sys.argv[0]).resolve()
  beside = [program.parent / name] if program.is_file() and '-packages' not in str(program) else []
  for path in (*(path for path in reversed(_named) if path.name == name), *beside):
    inside = workdir.resolve() in path.resolve().parents and path.resolve() != program
    if path.is_file() and not inside:
      return path
  raise FileNotFoundError(
      f'the run in {workdir} was made by the script {name}, and opening the run executes it. It is not beside the '
      f'program that runs; if you trust it, name it: --script={shlex.quote(recorded)} (in Python, lm.scripts.trust); '
      'it must not lie in the workdir')


@contextlib.contextmanager
def importable(script: pathlib.Path) -> Iterator[None]:
  """What lies beside a script can be imported, as where the script is run."""
  folder = str(script.resolve().parent)
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    sys.path.remove(folder)


def function(script: pathlib.Path, name: str) -> Callable[..., Any]:
  """The function of that name which a script defines; executes the script. ValueError where there is none."""
  if (spec := importlib.util.spec_from_file_location(script.stem, script)) is None:
    raise ValueError(f'{script} is no script of Python')
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module   # dataclasses and `inspect` look the module up
  with importable(script):
    spec.loader.exec_module(module)
  value = getattr(module, name, None)
  if not inspect.isfunction(value) or value.__module__ != module.__name__:
    raise ValueError(f'{script} defines no function {name!r} that returns a run')
  return value
