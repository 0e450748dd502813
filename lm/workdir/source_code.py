"""Digests of the code of a user's functions and classes, by which an edited script is recognised.

A description names the functions and classes of this package and of installed packages. Those of a user's script may
change while their names stay the same. So their code is described too, with all that it reads: constants, functions and
classes of the user's modules, in the same file or imported, and the values in the closures of inner functions.
"""
import ast
import dataclasses
import functools
import hashlib
import json
import linecache
import pathlib
import sys
import sysconfig
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

_LIBRARY = str(pathlib.Path(sysconfig.get_paths()['stdlib']).resolve())
_LONGEST = 200   # longer constants, in characters, are described by their digests


def is_users(value: Any) -> bool:
  """Returns whether a function, class or module belongs neither to this package nor to an installed one."""
  value = _plain(value)
  if not isinstance(value, types.FunctionType | types.ModuleType | type):
    return False
  name = value.__name__ if isinstance(value, types.ModuleType) else value.__module__
  if not isinstance(name, str) or name.partition('.')[0] == 'lm':
    return False
  file = getattr(sys.modules.get(name), '__file__', None)
  if file is None:   # it is built into Python, or from a notebook or an executed string
    return name == '__main__' or name not in sys.modules
  path = str(pathlib.Path(file).resolve())
  return '-packages' not in path and not path.startswith(_LIBRARY)


def digests(value: Any, describe: Callable[[Any], Any]) -> dict[str, Any]:
  """Returns {'script.relu2': digest, 'neighbour.POWER': 2, ...} of a user's function or class and what its code reads.

  A digest is that of the syntax tree: comments, docstrings and layout do not count. `describe` describes other values.
  """
  walk = _Walk(describe)
  walk.visit(_plain(value))
  return walk.contents


class _Walk:
  """Collects the `contents` of the code that is visited, by name."""

  def __init__(self, describe: Callable[[Any], Any]):
    self.contents: dict[str, Any] = {}
    self._describe = describe
    self._visited: set[int] = set()

  def visit(self, value: Any) -> None:
    """Adds a function or class of the user, and all that it reads."""
    if id(value) in self._visited:
      return
    self._visited.add(id(value))
    space = _globals(value)
    nodes = _nodes(value, space)
    self._add(f'{_module(space)}.{value.__qualname__}', _digest(nodes) if nodes else _bytecode(value))
    for function in _functions(value):
      for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        content = _content(cell)
        if name != '__class__' and content is not value:
          self._read(f'{_module(space)}.{value.__qualname__}.{name}', content)
    for path in dict.fromkeys(_paths(nodes)):
      self._follow(space, path)

  def _follow(self, space: Mapping[str, Any], path: tuple[str, ...]) -> None:
    """Reads a name of a module, such as ('POWER',) or ('neighbour', 'POWER')."""
    name, *attributes = path
    if name not in space:
      return
    value, module = space[name], _module(space)
    while attributes and isinstance(value, types.ModuleType) and is_users(value):
      module, name = _module(vars(value)), attributes.pop(0)
      if not hasattr(value, name):
        return
      value = getattr(value, name)
    self._read(f'{module}.{name}', value)

  def _read(self, name: str, value: Any) -> None:
    """Adds a value that code reads by a name, with the user's code in it."""
    text = _plain_text(value)
    if is_users(value):
      if not isinstance(value, types.ModuleType):
        self.visit(_plain(value))
    elif isinstance(value, types.ModuleType):
      self._add(name, value.__name__)
    elif text is not None:
      self._add(name, value if len(text) <= _LONGEST else hashlib.sha256(text.encode()).hexdigest()[:16])
    elif id(value) not in self._visited:
      self._visited.add(id(value))
      if is_users(type(value)):
        self.visit(type(value))
      parts = _parts(value)
      for part, item in parts.items():
        self._read(f'{name}.{part}', item)
      if not parts:
        self._add(name, self._describe(value))

  def _add(self, name: str, content: Any) -> None:
    key, number = name, 2
    while key in self.contents and self.contents[key] != content:   # two lambdas
      key, number = f'{name} ({number})', number + 1
    self.contents[key] = content


def _plain_text(value: Any) -> str | None:
  """Returns a value as JSON text; None if JSON cannot represent it."""
  try:
    return json.dumps(value)
  except (TypeError, ValueError, RecursionError):
    return None


def _parts(value: Any) -> dict[str, Any]:
  """Returns the contents of a container, a partial or a dataclass, by name."""
  if isinstance(value, Mapping):
    return {str(key): item for key, item in value.items()}
  if isinstance(value, list | tuple):
    return {str(i): item for i, item in enumerate(value)}
  if isinstance(value, functools.partial):
    return {'function': value.func, 'args': value.args, 'keywords': value.keywords}
  if dataclasses.is_dataclass(value) and not isinstance(value, type):
    return {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.compare and hasattr(value, f.name)}
  return {}


def _plain(value: Any) -> Any:
  """Returns the function inside a method or a wrapper, such as that of `functools.wraps` or `jax.jit`."""
  value = value.__func__ if isinstance(value, types.MethodType) else value
  inner = getattr(value, '__wrapped__', None)
  return _plain(inner) if isinstance(inner, types.FunctionType) and not isinstance(value, type) else value


def _functions(value: Any) -> Iterator[types.FunctionType]:
  members = vars(value).values() if isinstance(value, type) else [value]
  for member in members:
    member = member.fget if isinstance(member, property) else getattr(member, '__func__', member)
    member = _plain(member)
    if isinstance(member, types.FunctionType) and (   # not the generated methods of dataclasses
        not isinstance(value, type) or member.__code__.co_filename != '<string>'):
      yield member


def _globals(value: Any) -> Mapping[str, Any]:
  """Returns the namespace of the module of a function or class; for a class, the one that its methods read, if any."""
  for function in _functions(value):
    if not isinstance(value, type) or function.__module__ == value.__module__:
      return function.__globals__
  return vars(sys.modules[value.__module__]) if value.__module__ in sys.modules else {}


def _module(space: Mapping[str, Any]) -> str:
  """Returns the name of a module, the same whether it is imported or run."""
  name = space.get('__name__', '')
  return pathlib.Path(space['__file__']).stem if name == '__main__' and '__file__' in space else name


def _content(cell: types.CellType) -> Any:
  try:
    return cell.cell_contents
  except ValueError:   # not yet assigned
    return None


def _nodes(value: Any, space: Mapping[str, Any]) -> list[ast.AST]:
  """Returns the syntax trees of a function or class; several if lambdas in one line cannot be distinguished."""
  file = value.__code__.co_filename if isinstance(value, types.FunctionType) else space.get('__file__', '')
  linecache.checkcache(file)
  nodes = _definitions(''.join(linecache.getlines(file, dict(space))))
  if isinstance(value, type):
    return [node for name, node in nodes if isinstance(node, ast.ClassDef)
            and name == value.__qualname__.replace('.<locals>', '')][-1:]
  line = value.__code__.co_firstlineno   # the line of the first decorator, if any
  return [node for name, node in nodes if not isinstance(node, ast.ClassDef)
          and name.rpartition('.')[2] == value.__code__.co_name
          and line == min([node.lineno, *(d.lineno for d in getattr(node, 'decorator_list', ()))])]


@functools.lru_cache(maxsize=64)
def _definitions(text: str) -> list[tuple[str, ast.AST]]:
  """Returns all functions, lambdas and classes of a file with their qualified names; none if it is not Python."""
  def walk(node, above):
    for child in ast.iter_child_nodes(node):
      name = getattr(child, 'name', '<lambda>') if isinstance(child, _DEFINED) else None
      if name is not None:
        yield f'{above}{name}', child
      yield from walk(child, above if name is None else f'{above}{name}.')
  try:
    return list(walk(ast.parse(text), ''))
  except (SyntaxError, ValueError):
    return []


_DEFINED = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda


def _paths(nodes: list[ast.AST]) -> Iterator[tuple[str, ...]]:
  """Yields the names that code reads, with their attributes: ('a', 'b', 'c') for `a.b.c`."""
  for tree in nodes:
    inner = set()
    for node in ast.walk(tree):
      attributes, outermost = [], node
      while isinstance(node, ast.Attribute):
        attributes.append(node.attr)
        inner.add(id(node.value))
        node = node.value
      if isinstance(node, ast.Name) and id(outermost) not in inner:
        yield node.id, *attributes[::-1]


def _digest(nodes: list[ast.AST]) -> str:
  return hashlib.sha256(repr([_tree(node) for node in nodes]).encode()).hexdigest()[:16]


def _tree(node: Any) -> Any:
  """Returns a syntax tree without positions and docstrings, the same in all versions of Python with these nodes."""
  if isinstance(node, list):
    return [_tree(item) for item in node]
  if not isinstance(node, ast.AST):
    return repr(node)
  fields = {name: item for name, item in ast.iter_fields(node)
            if item not in (None, []) and name not in ('ctx', 'kind')}
  if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
    fields['body'] = node.body[1:]
  return [type(node).__name__, *((name, _tree(item)) for name, item in sorted(fields.items()))]


def _bytecode(value: Any) -> str:
  """Returns a digest of code whose file is missing. It is stable only within one version of Python."""
  def content(code):
    return code.co_code, code.co_names, [content(c) if isinstance(c, types.CodeType) else repr(c)
                                         for c in code.co_consts]
  return hashlib.sha256(repr([content(function.__code__) for function in _functions(value)]).encode()).hexdigest()[:16]
