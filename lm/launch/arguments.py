"""Parses the flags of functions from a command line, checks them, and writes the text of `--help`.

`lm.signature` says which flags a function has. A flag has one of these types:

  int, float, bool, str, pathlib.Path
  Literal['a', 'b']     one of these words
  list[T], tuple[T, ...], tuple[T, U]    values with commas between them
  Texts                 whole texts; the flag is written once for each
  T | None              the word `none` stands for None

A flag without a default is required. The text of a `str | None` may not be empty, since an empty text mostly comes from
a shell variable that is not set; a text that may be empty has the type `AnyText`.
"""
import dataclasses
import difflib
import inspect
import pathlib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from lm import paths, signature
from lm.signature import AnyText, Texts


class Values(dict[str, Any]):
  """The values of a function's flags, by name; `on_command_line` has the names of those that the command line sets."""
  on_command_line: frozenset[str] = frozenset()


def parse(functions: Sequence[Callable[..., Any]], argv: Sequence[str], allow_missing: bool = False
          ) -> tuple[list[Values], bool]:
  """Parses a command line.

  Beside the flags of the functions, there are `--help`, `--debug`, and `--script`, whose scripts may be executed from
  then on (see `lm.scripts`). Two functions may both have the flag `--init`, and both are given its value.

  Args:
    functions: the functions whose flags the command line has.
    argv: the name of the program, then its arguments.
    allow_missing: leave required flags that the command line lacks out of the values, so that `require` can check them.

  Returns:
    The values of the flags of each function, and the value of `--debug`.

  Raises:
    flags.Error: a flag is unknown, has a value that is not valid, or is missing. The message has one line.
  """
  # Not the global FLAGS: there, two experiments in one process could not both have a flag `lr`.
  values = flags.FlagValues()
  values.set_gnu_getopt(True)
  for function in functions:
    for flag in signature.flags(function):
      _define(values, function, flag)
  for name in ('debug', 'help', 'helpfull'):
    flags.DEFINE_bool(name, False, '', flag_values=values)
  flags.DEFINE_flag(flags.Flag(_Parser(tuple[pathlib.Path, ...]), None, 'script', (), ' '), flag_values=values)
  remaining = values(argv, known_only=True)
  if values['help'].value or values['helpfull'].value:
    print(help_text(functions, argv[0]))
    if values['helpfull'].value:
      print('\n' + flags.FLAGS.get_help())
    sys.exit(0)
  _check_remaining(remaining, values)
  _trust(values['script'].value)
  parsed = []
  for function in functions:
    names = [flag.name for flag in signature.flags(function)
             if flag.default is not signature.REQUIRED or values[flag.name].present]
    own = Values({name: values[name].value for name in names})
    own.on_command_line = frozenset(name for name in names if values[name].present)
    if not allow_missing:
      require(function, own)
    parsed.append(own)
  return parsed, values['debug'].value


def _check_remaining(arguments: Sequence[str], values: flags.FlagValues) -> None:
  """Checks the arguments that are not flags of ours: they may only be flags of absl."""
  try:
    positional = flags.FLAGS(arguments)[1:]   # grain and absl.logging read absl's flags, so they are always parsed
  except flags.UnrecognizedFlagError as error:
    nearest = difflib.get_close_matches(error.flagname, list(values), n=1, cutoff=0)[0]
    raise flags.Error(f'unknown flag --{error.flagname}; the nearest is --{nearest} (--help lists all)') from None
  if positional:
    raise flags.Error(f'unexpected argument {positional[0]!r}; flags are written --name=value')


def _trust(paths: Sequence[pathlib.Path]) -> None:
  """Lets the scripts that the command line names be executed."""
  if not paths:
    return
  from lm import scripts
  try:
    scripts.trust(*paths)
  except FileNotFoundError as error:
    raise flags.Error(f'flag --script: {error}') from None


def require(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
  """Raises flags.Error where a required flag of the function has no value."""
  for flag in signature.flags(function):
    if flag.name not in values:
      raise flags.Error(f'--{flag.name} is required ({_type_in_words(flag.kind)}); --help says what it is')


def from_json(kind: Any, value: Any) -> Any:
  """Returns the value of a flag of type `kind` that was stored as JSON, which has neither tuples nor paths."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if value is None:
    return None
  if origin in (typing.Union, types.UnionType):
    return from_json(_not_none(inner), value)
  if origin in (list, tuple):
    return origin(map(from_json, _item_kinds(kind, len(value)), value))
  return pathlib.Path(value) if kind is pathlib.Path else value


def _item_kinds(kind: Any, count: int) -> Sequence[Any]:
  """Returns the types of the items of a list or tuple that has `count` of them."""
  inner = typing.get_args(kind)
  is_fixed = typing.get_origin(kind) is tuple and inner[-1] is not Ellipsis
  return inner if is_fixed else inner[:1] * count


def _define(values: flags.FlagValues, function: Callable[..., Any], flag: signature.Flag) -> None:
  """Adds a flag of a function to `values`. Raises TypeError where another function has a flag of that name."""
  if flag.name == 'init' and flag.name in values and flag.default is None:
    return
  if flag.name in values:
    raise TypeError(f'{function.__qualname__}: {flag.name} is the name of a flag that every run has')
  default = None if flag.default is signature.REQUIRED else flag.default
  if flag.kind is Texts:
    flags.DEFINE_flag(flags.MultiFlag(_Parser(str), None, flag.name, default, ' '), flag_values=values)
    return
  is_boolean = flag.kind in (bool, bool | None)   # then --noNAME turns it off
  flags.DEFINE_flag(flags.Flag(_Parser(flag.kind), None, flag.name, default, ' ', boolean=is_boolean,
                               allow_using_method_names=True), flag_values=values)


class _Parser(flags.ArgumentParser):
  """Parses a value of a type for absl, which puts the name and the value of the flag before the ValueError's message.
  """

  def __init__(self, kind: Any):
    self.kind, self.allowed = kind, _type_in_words(kind)

  def parse(self, argument: Any) -> Any:
    if not isinstance(argument, str):   # it is a default
      return argument
    try:
      return _convert(self.kind, argument)
    except paths.Remote:
      raise
    except (ValueError, KeyError):
      unset = '' if argument.strip() else '; it is empty, perhaps an unset shell variable'
      raise ValueError(f'expected {self.allowed}{unset}') from None


def _convert(kind: Any, text: str) -> Any:
  """Returns the value of type `kind` that a text stands for. Raises ValueError or KeyError where there is none."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    if _not_none(inner) is str and not text:
      raise ValueError('it is empty')
    return None if text.strip().lower() == 'none' else _convert(_not_none(inner), text)
  if origin is typing.Literal:
    return {str(choice): choice for choice in inner}[text.strip()]
  if origin in (list, tuple):
    items = text.split(',') if text else []
    kinds = _item_kinds(kind, len(items))
    return origin(_convert(item_kind, item) for item_kind, item in zip(kinds, items, strict=True))
  text = text if kind in (str, AnyText) else text.strip()   # a prompt may end in a space
  if kind is bool:
    return flags.BooleanParser().parse(text)
  if kind is int:
    try:
      return int(text)
    except ValueError:
      number = float(text)   # such as 1e4
      if not number.is_integer():
        raise
      return int(number)
  if kind is pathlib.Path:
    if not text:
      raise ValueError('the path is empty')
    return paths.local(text)
  value = kind(text)
  if value != value:
    raise ValueError('it is not a number')
  return value


def _not_none(inner: tuple[Any, ...]) -> Any:
  """Returns T of the types of `T | None`. Raises TypeError where there are several."""
  kinds = [kind for kind in inner if kind is not types.NoneType]
  if len(kinds) != 1:
    raise TypeError(f'a flag has one type, or one type and None, not {" | ".join(map(str, kinds))}')
  return kinds[0]


def _type_in_words(kind: Any) -> str:
  """Returns in words what may be written for a type. Raises TypeError for a type that a flag cannot have."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    return f'{_type_in_words(_not_none(inner))} | none'
  if origin is typing.Literal:
    return ' | '.join(map(str, inner))
  if origin is tuple and inner[-1] is not Ellipsis:
    return ','.join(map(_type_in_words, inner))
  if origin in (list, tuple):
    item = _type_in_words(inner[0])
    return f'{item},{item},...'
  words = {int: 'whole number', float: 'number', bool: 'true | false', str: 'text', pathlib.Path: 'path',
           AnyText: 'text', Texts: 'text, the flag once for each'}
  if kind not in words:
    raise TypeError(f'{kind} cannot be a flag; use int, float, bool, str, Path, Literal, list, tuple or T | None')
  return words[kind]


def help_text(functions: Sequence[Callable[..., Any]], script: str) -> str:
  """Returns the text of `--help`: usage, an example, the flags that most runs set, then all others by group."""
  about = inspect.getdoc(inspect.getmodule(functions[0])) or inspect.getdoc(functions[0]) or ''
  lines = [f'usage: python {script} [--flag=value ...]']
  example = re.search(r'^ +(python .*(?:\\\n.*)*)', about, re.MULTILINE)
  if example:
    lines.append(f'example: {example[1]}')
  lines += ['', about.split('\n\n')[0]]
  listed = _flags_by_name(functions)
  common = signature.common(functions[0])
  for name in common:
    if name not in listed:
      raise TypeError(f'{functions[0].__qualname__} has no flag {name}, which most runs set')
  if common:
    lines += ['', 'Flags that most runs set:']
    for name in common:
      lines += _describe(listed[name])
  groups: dict[str, list[signature.Flag]] = {'Flags': []}   # the experiment's own flags come first
  for name, flag in listed.items():
    if name not in common:
      groups.setdefault(flag.title, []).append(flag)
  for title, members in groups.items():
    if members:
      lines += ['', 'Other flags:' if common and title == 'Flags' else f'{title}:']
      for flag in members:
        lines += _describe(flag)
  lines += ['', 'Always:', *_entry('debug', 'show the traceback of every error')]
  lines += _entry('script', 'the scripts of runs to open that are not beside this one; they are executed')
  lines += _entry('helpfull', "this, and absl's own flags")
  return '\n'.join(lines)


def _flags_by_name(functions: Sequence[Callable[..., Any]]) -> dict[str, signature.Flag]:
  """Returns the flags of an experiment, then those that all runs share, each with the title of its group."""
  listed: dict[str, signature.Flag] = {}
  for title, function in zip(('Flags', 'Flags of every run'), functions):
    for flag in signature.flags(function):
      listed.setdefault(flag.name, flag if flag.title else dataclasses.replace(flag, title=title))
  return listed


def _describe(flag: signature.Flag) -> list[str]:
  """Returns the lines of `--help` on a flag."""
  note = f'{flag.note.rstrip(".")}. ' if flag.note else ''
  default = 'required' if flag.default is signature.REQUIRED else f'default {to_text(flag.default)}'
  return _entry(flag.name, f'{note}({_type_in_words(flag.kind)}; {default})')


def _entry(name: str, text: str) -> list[str]:
  """Returns lines with the name of a flag on the left and text on the right."""
  return textwrap.wrap(text, 114, initial_indent=f'  --{name:<19} ', subsequent_indent=' ' * 24)


def to_text(value: Any) -> str:
  """Returns the text that stands for a value on the command line."""
  if isinstance(value, (list, tuple)):
    return ','.join(map(to_text, value))
  return {'True': 'true', 'False': 'false', 'None': 'none'}.get(str(value), str(value))
