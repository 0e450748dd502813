"""The flags of functions (see `lm.signature`) -> flags of a program: parsed, checked, and shown by `--help`.

Types: int, float, bool, str, Path, Literal (a choice), list and tuple of these (comma separated), `Texts` (the flag is
given once for each), `T | None` (the word `none`). Without a default a flag is required. A text that may be none is not
empty, unless it is an `AnyText`: an empty one mostly comes from a shell variable that is not set.
"""
import dataclasses
import difflib
import inspect
import itertools
import pathlib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from absl import flags

from lm import signature
from lm.signature import AnyText, Texts


class Values(dict[str, Any]):
  """The values of a function's flags, by name; `given` are the names of those that the command line has."""
  given: frozenset[str] = frozenset()


def parse(functions: Sequence[Callable[..., Any]], argv: Sequence[str], partly: bool = False
          ) -> tuple[list[Values], bool]:
  """The values of each function's flags, and of `--debug`; flags.Error, in one line, for a bad flag.

  With `partly`, those that are required and not given are left out; see `require`.
  Scripts named by `--script` may be executed from then on, see `scripts`. A function may have the flag --init of every
  run too, which both are given.
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
  unknown = values(argv, known_only=True)
  if values['help'].value or values['helpfull'].value:
    print(help_text(functions, argv[0]) + ('\n\n' + flags.FLAGS.get_help() if values['helpfull'].value else ''))
    sys.exit(0)
  try:
    positional = flags.FLAGS(unknown)[1:]  # absl's own flags; grain and absl.logging read them, so always parse
  except flags.UnrecognizedFlagError as error:
    nearest = difflib.get_close_matches(error.flagname, list(values), n=1, cutoff=0)[0]
    raise flags.Error(f'unknown flag --{error.flagname}; the nearest is --{nearest} (--help lists all)') from None
  if positional:
    raise flags.Error(f'unexpected argument {positional[0]!r}; flags are written --name=value')
  if values['script'].value:
    from lm import scripts
    try:
      scripts.trust(*values['script'].value)
    except FileNotFoundError as error:
      raise flags.Error(f'flag --script: {error}') from None
  parsed = []
  for function in functions:
    names = [flag.name for flag in signature.flags(function)
             if flag.default is not signature.REQUIRED or values[flag.name].present]
    parsed.append(Values({name: values[name].value for name in names}))
    parsed[-1].given = frozenset(name for name in names if values[name].present)
    if not partly:
      require(function, parsed[-1])
  return parsed, values['debug'].value


def require(function: Callable[..., Any], values: Mapping[str, Any]) -> None:
  """flags.Error where the value of a required flag of the function is missing."""
  for flag in signature.flags(function):
    if flag.name not in values:
      raise flags.Error(f'--{flag.name} is required: {_allowed(flag.kind)}')


def restored(kind: Any, value: Any) -> Any:
  """A value of a flag as it was before it was written to JSON, by the type of the flag: tuples and paths."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if value is None:
    return None
  if origin in (typing.Union, types.UnionType):
    return restored(_not_none(inner), value)
  if origin in (list, tuple):
    fixed = origin is tuple and inner[-1] is not Ellipsis
    return origin(map(restored, inner if fixed else inner[:1] * len(value), value))
  return pathlib.Path(value) if kind is pathlib.Path else value


def _define(values: flags.FlagValues, function: Callable[..., Any], flag: signature.Flag) -> None:
  if flag.name == 'init' and flag.name in values and flag.default is None:
    return
  if flag.name in values:
    raise TypeError(f'{function.__qualname__}: {flag.name} is the name of a flag that every run has')
  default = None if flag.default is signature.REQUIRED else flag.default
  if flag.kind is Texts:
    flags.DEFINE_flag(flags.MultiFlag(_Parser(str), None, flag.name, default, ' '), flag_values=values)
    return
  switch = flag.kind in (bool, bool | None)   # that --noNAME turns off
  flags.DEFINE_flag(flags.Flag(_Parser(flag.kind), None, flag.name, default, ' ', boolean=switch,
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
      unset = '' if argument.strip() else '; it is empty, perhaps an unset shell variable'
      raise ValueError(f'expected {self.allowed}{unset}') from None


def _convert(kind: Any, text: str) -> Any:
  """`text` as a value of type `kind`; ValueError if it is none."""
  origin, inner = typing.get_origin(kind), typing.get_args(kind)
  if origin in (typing.Union, types.UnionType):
    if _not_none(inner) is str and not text:
      raise ValueError('it is empty')
    return None if text.strip().lower() == 'none' else _convert(_not_none(inner), text)
  if origin is typing.Literal:
    return {str(choice): choice for choice in inner}[text.strip()]
  if origin in (list, tuple):
    items = text.split(',') if text else []
    fixed = origin is tuple and inner[-1] is not Ellipsis
    return origin(_convert(k, item) for k, item in zip(inner if fixed else inner[:1] * len(items), items, strict=True))
  text = text if kind in (str, AnyText) else text.strip()   # a prompt may end in a space
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
           AnyText: 'text', Texts: 'text, the flag once for each'}
  if kind not in words:
    raise TypeError(f'{kind} cannot be a flag; use int, float, bool, str, Path, Literal, list, tuple or T | None')
  return words[kind]


def help_text(functions: Sequence[Callable[..., Any]], script: str) -> str:
  """The text of `--help`: the line of use, an example, the flags that most runs set, then groups of flags by title."""
  about = inspect.getdoc(inspect.getmodule(functions[0])) or inspect.getdoc(functions[0]) or ''
  lines = [f'usage: python {script} [--flag=value ...]']
  if example := re.search(r'^ +(python .*(?:\\\n.*)*)', about, re.MULTILINE):
    lines.append(f'example: {example[1]}')
  lines += ['', about.split('\n\n')[0]]
  listed: dict[str, signature.Flag] = {}   # a flag of every run may be one of the function's own too
  for title, function in zip(('Flags', 'Flags of every run'), functions):
    for flag in signature.flags(function):
      listed.setdefault(flag.name, flag if flag.title else dataclasses.replace(flag, title=title))
  common = signature.common(functions[0])
  if unknown := [name for name in common if name not in listed]:
    raise TypeError(f'{functions[0].__qualname__} has no flag {unknown[0]}, which most runs set')
  if common:
    lines += ['', 'Flags that most runs set:', *itertools.chain(*(_described(listed[name]) for name in common))]
  remaining = [flag for flag in listed.values() if flag.name not in common]
  for title in dict.fromkeys(flag.title for flag in sorted(remaining, key=lambda flag: flag.title != 'Flags')):
    shown = 'Other flags' if common and title == 'Flags' else title
    lines += ['', f'{shown}:', *itertools.chain(*(_described(flag) for flag in remaining if flag.title == title))]
  return '\n'.join([*lines, '', 'Always:', *_entry('debug', 'show the traceback of every error'),
                    *_entry('script', 'the scripts of runs to open that are not beside this one; they are executed'),
                    *_entry('helpfull', "this, and absl's own flags")])


def _described(flag: signature.Flag) -> list[str]:
  note = f'{flag.note.rstrip(".")}. ' if flag.note else ''
  default = 'required' if flag.default is signature.REQUIRED else f'default {written(flag.default)}'
  return _entry(flag.name, f'{note}({_allowed(flag.kind)}; {default})')


def _entry(name: str, text: str) -> list[str]:
  return textwrap.wrap(text, 114, initial_indent=f'  --{name:<19} ', subsequent_indent=' ' * 24)


def written(value: Any) -> str:
  """A default, as it would be written on the command line."""
  if isinstance(value, (list, tuple)):
    return ','.join(map(written, value))
  return {'True': 'true', 'False': 'false', 'None': 'none'}.get(str(value), str(value))
