"""Scripts that make runs: which of them may be executed to open a run, and the functions in them.

Most runs are opened without their script. One is executed only where a run has classes or functions that it defines,
and where the user named it, or runs it as the program.
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


def locate(record: Mapping[str, Any], workdir: pathlib.Path, reason: str) -> pathlib.Path:
  """The script of a record in `workdir/run.json`, which is the program that runs, or was named; `reason` says why.

  FileNotFoundError where it is neither, ValueError where the record is no record of a script.
  """
  name, recorded = record.get('script'), record.get('path')
  if not isinstance(name, str) or not isinstance(recorded, str) or pathlib.Path(name).name != name:
    raise ValueError(f'{workdir}/run.json names no script but {name!r}; restore it from a copy')
  program = pathlib.Path(sys.argv[0]).resolve()
  for path in (*reversed(_named), program):
    inside = workdir.resolve() in path.parents and path != program
    if path.name == name and path.is_file() and not inside:
      return path
  raise FileNotFoundError(f'{reason}. Its script, which was at {recorded}, is executed only where it is named: if you '
                          f'trust it, name it: --script={shlex.quote(recorded)} (in Python, lm.scripts.trust). Other '
                          'scripts that define parts of the run are named with it, with commas between them; none may '
                          'lie in the workdir')


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
