"""Finds the flags of a function: its keyword-only parameters, and the fields of those that are groups of flags.

A parameter whose type is a frozen dataclass is a group: the fields of the dataclass are flags, and their defaults come
from the default of the parameter. Several functions can so share a group, each with defaults of its own.

The first line of the dataclass's docstring is the title of the group, and its section `Args` describes the flags. The
section `Args` of a function describes the flags of the function, and may describe flags of its groups anew.

The names of flags are flat: run.json, comparisons and `call` name a field of a group by itself, without the group.
"""
import dataclasses
import difflib
import inspect
import re
import textwrap
import typing
from collections.abc import Callable, Mapping
from typing import Any

# The type of a flag whose values are whole texts, commas included: `--stop=, --stop=END`.
Texts = typing.NewType('Texts', tuple)
# The type of a flag whose text may be empty.
AnyText = typing.NewType('AnyText', str)

REQUIRED = inspect.Parameter.empty   # the default of a flag that has none


@dataclasses.dataclass(frozen=True)
class Flag:
  """A flag.

  Attributes:
    name: the name, without dashes.
    kind: the type of its values.
    default: the value without the flag; `REQUIRED` where there is none.
    note: what `--help` says of it.
    title: the title of its group; empty for a parameter of the function.
  """
  name: str
  kind: Any
  default: Any
  note: str
  title: str = ''


def flags(function: Callable[..., Any]) -> list[Flag]:
  """Returns the flags of a function, in the order of its parameters.

  Raises:
    TypeError: a parameter has no type, a group has no default, or two flags have the same name.
  """
  notes, listed = notes_of(function), []
  for parameter, kind in _parameters(function):
    if not is_group(kind):
      listed.append(Flag(parameter.name, kind, parameter.default, notes.get(parameter.name, '')))
      continue
    hints, own, title = typing.get_type_hints(kind), notes_of(kind), _title(kind)
    for field in dataclasses.fields(kind):
      note = notes.get(field.name, own.get(field.name, ''))
      listed.append(Flag(field.name, hints[field.name], getattr(parameter.default, field.name), note, title))
  names = [flag.name for flag in listed]
  repeated = sorted({name for name in names if names.count(name) > 1})
  if repeated:
    raise TypeError(f'{function.__qualname__} has two flags of the name {repeated[0]}; rename one of them')
  return listed


def call(function: Callable[..., Any], values: Mapping[str, Any] | None = None, /, **named: Any) -> Any:
  """Calls a function with values of its flags, by name; all other flags have their defaults.

  Raises:
    TypeError: the function has no flag of such a name, or a required flag is missing.
  """
  return function(**arguments(function, {**(values or {}), **named}))


def arguments(function: Callable[..., Any], values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the keyword arguments of a function, with its groups, for values of its flags.

  Raises:
    TypeError: the function has no flag of such a name.
  """
  remaining, named = dict(values), {}
  for parameter, kind in _parameters(function):
    if is_group(kind):
      own = {field.name: remaining.pop(field.name) for field in dataclasses.fields(kind) if field.name in remaining}
      named[parameter.name] = dataclasses.replace(parameter.default, **own)
    elif parameter.name in remaining:
      named[parameter.name] = remaining.pop(parameter.name)
  if remaining:
    name = next(iter(remaining))
    nearest = difflib.get_close_matches(name, [flag.name for flag in flags(function)], n=1, cutoff=0)
    raise TypeError(f'{function.__qualname__} has no flag {name}; the nearest is {"".join(nearest) or "none"}')
  return named


def is_group(kind: Any) -> bool:
  """Whether a type is a group of flags: a frozen dataclass."""
  return isinstance(kind, type) and dataclasses.is_dataclass(kind) and kind.__dataclass_params__.frozen


def notes_of(documented: Callable[..., Any]) -> dict[str, str]:
  """Returns the texts in the section `Args` of a docstring, by the name of the argument."""
  section = re.search(r'^Args:\n((?: +.*(?:\n|$)|\n)*)', inspect.getdoc(documented) or '', re.MULTILINE)
  lines = textwrap.dedent(section[1]) if section else ''
  entries = re.findall(r'^(\w+): *(.*(?:\n +.*)*)', lines, re.MULTILINE)
  return {name: ' '.join(text.split()) for name, text in entries}


def common(function: Callable[..., Any]) -> list[str]:
  """Returns the flags that a docstring names after 'Most runs set:', which `--help` shows first."""
  line = re.search(r'^Most runs set: ([\w\s,]+)\.', inspect.getdoc(function) or '', re.MULTILINE)
  return re.findall(r'\w+', line[1]) if line else []


def _title(group: type) -> str:
  return (inspect.getdoc(group) or group.__name__).split('\n')[0].rstrip('.')


def _parameters(function: Callable[..., Any]) -> list[tuple[inspect.Parameter, Any]]:
  """Returns the keyword-only parameters of a function with their types."""
  hints, listed = typing.get_type_hints(function), []
  for parameter in inspect.signature(function).parameters.values():
    if parameter.kind is not parameter.KEYWORD_ONLY:
      continue
    if parameter.name not in hints:
      raise TypeError(f'{function.__qualname__}: {parameter.name} has no type')
    kind = hints[parameter.name]
    if is_group(kind) and not isinstance(parameter.default, kind):
      raise TypeError(f'{function.__qualname__}: the group {parameter.name} needs a default, such as {kind.__name__}()')
    listed.append((parameter, kind))
  return listed
