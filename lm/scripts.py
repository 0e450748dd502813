"""Scripts that define runs: which of them may be executed to open a run, and the functions that they define.

Most runs are opened without their script. A script is executed only where a run uses classes or functions that it
defines, and where it is the program that runs or the user named it with `--script`.
"""
import contextlib
import importlib.util
import inspect
import pathlib
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_trusted: list[pathlib.Path] = []   # the scripts that the user of this process named


def trust(*scripts: str | pathlib.Path) -> None:
  """Lets scripts be executed to open the runs that they define.

  Raises:
    FileNotFoundError: a script does not exist.
  """
  for script in map(pathlib.Path, scripts):
    if not script.is_file():
      raise FileNotFoundError(f'there is no script {script}; give the path of the script that defines the run')
    _trusted.append(script.resolve())


def locate(record: Mapping[str, Any], workdir: pathlib.Path, reason: str) -> pathlib.Path:
  """Returns the path of the script that a record in `workdir/run.json` names, if it may be executed.

  Args:
    record: the record.
    workdir: the folder of the run; scripts inside it are never executed.
    reason: why the script is needed, for the error.

  Raises:
    FileNotFoundError: the script is neither the program that runs nor one that the user named.
    ValueError: the record names no script.
  """
  name, recorded = record.get('script'), record.get('path')
  if not isinstance(name, str) or not isinstance(recorded, str) or pathlib.Path(name).name != name:
    raise ValueError(f'{workdir}/run.json names no script but {name!r}; restore it from a copy')
  program = pathlib.Path(sys.argv[0]).resolve()
  for path in (*reversed(_trusted), program):
    is_inside = workdir.resolve() in path.parents and path != program
    if path.name == name and path.is_file() and not is_inside:
      return path
  raise FileNotFoundError(f'{reason}. Its script, which was at {recorded}, is executed only where it is named: if you '
                          f'trust it, name it: --script={shlex.quote(recorded)} (in Python, lm.scripts.trust). Other '
                          'scripts that define parts of the run are named with it, with commas between them; none may '
                          'lie in the workdir')


@contextlib.contextmanager
def importable(script: pathlib.Path) -> Iterator[None]:
  """Makes the modules in the folder of a script importable within a block, as they are where the script is run."""
  folder = str(script.resolve().parent)
  sys.path.insert(0, folder)
  try:
    yield
  finally:
    sys.path.remove(folder)


def function(script: pathlib.Path, name: str) -> Callable[..., Any]:
  """Executes a script and returns the function of that name that it defines.

  Raises:
    ValueError: the script defines no such function, or is no script of Python.
  """
  spec = importlib.util.spec_from_file_location(script.stem, script)
  if spec is None:
    raise ValueError(f'{script} is no script of Python; give a file that ends in .py')
  module = importlib.util.module_from_spec(spec)
  sys.modules[spec.name] = module   # dataclasses and `inspect` look the module up
  with importable(script):
    spec.loader.exec_module(module)
  value = getattr(module, name, None)
  if not inspect.isfunction(value) or value.__module__ != module.__name__:
    raise ValueError(f'{script} defines no function {name!r} that returns a run')
  return value
