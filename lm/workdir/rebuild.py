"""Objects as JSON from which equal objects can be built, without executing code that the JSON names.

`stored` describes an object as JSON, and `rebuilt` builds an equal object. Both support plain values, dtypes, paths and
containers, and what the packages below define: frozen dataclasses, Flax modules, named tuples, functions, partials of
functions, a model's `apply`, and inner functions (their code is looked up in the package, and only the values of their
closure are read from the JSON). Names are looked up in these packages only. An object with a method `to_store` is
stored, and rebuilt, as the result of that method.

Any other object, such as one of a class in a user's script, becomes `{'outside': name}`; `outside` lists these names.
"""
import dataclasses
import functools
import importlib
import inspect
import pathlib
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

# Functions of these modules may be called: they only compute, and access no file and no process.
FUNCTIONS = ('lm.models', 'lm.objectives', 'lm.data.text.clean', 'lm.evaluate.likelihood', 'lm.evaluate.measures',
             'lm.evaluate.texts.sacre', 'jax.nn')
# Classes of these modules, and these classes of other modules, may be built: they only hold values.
CLASSES = ('lm.models', 'lm.objectives', 'lm.data.batch', 'lm.data.chat', 'lm.data.dataset', 'lm.data.rated_pairs',
           'lm.data.rows', 'lm.data.text.clean', 'lm.data.text.source', 'lm.evaluate.annotate:Annotated',
           'lm.hf.pretrained:Parameters', 'lm.load:StoredResult', 'lm.lora:Adapted', 'lm.train.interfaces:Constants')
DEPTH, SIZE = 100, 100_000   # how deep values may be nested in the JSON, and how many it may have


class Unknown(ValueError):
  """The JSON names something that may not be built, or is not in the form that `stored` writes."""


def stored(value: Any, above: tuple[int, ...] = ()) -> Any:
  """Returns JSON from which `rebuilt` builds an equal object. `above` has the ids of the objects that contain it."""
  if id(value) in above:
    return _outside(value)
  value = value.to_store() if hasattr(type(value), 'to_store') else value
  store = functools.partial(stored, above=(*above, id(value)))
  name = _name(value)
  if name is not None:
    return {'type' if inspect.isclass(value) else 'function': name}
  match value:
    case None | bool() | int() | str() | float():
      return value
    case np.generic():
      return value.item()
    case pathlib.PurePath():
      return {'path': str(value)}
    case Mapping():
      return {'dict': [[store(key), store(item)] for key, item in value.items()]}
    case list():
      return {'list': [store(item) for item in value]}
    case functools.partial():
      return {'partial': store(value.func), 'args': store(value.args), 'keywords': store(value.keywords)}
    case types.MethodType() if value.__name__ == 'apply':
      return {'method': 'apply', 'of': store(value.__self__)}
    case types.FunctionType():
      return _stored_function(value, store)
  dtype = _dtype(value)
  if dtype is not None:
    return {'dtype': dtype.name}
  if type(value) is tuple:
    return {'tuple': [store(item) for item in value]}
  name = _name(type(value))
  if name is None or not _holds_only_fields(type(value)):
    return _outside(value)
  fields = {field: store(getattr(value, field)) for field in _fields(type(value))}
  optional = {f.name for f in getattr(value, '__dataclass_fields__', {}).values() if not f.compare and _has_default(f)}
  return {'class': name, 'fields': {field: item for field, item in fields.items()
                                    if field not in optional or not outside(item)}}


def rebuilt(tree: Any) -> Any:
  """Builds the object that `stored` described. Raises Unknown if a name may not be looked up, or if values do not fit.
  """
  check_size(tree)
  try:
    return _rebuilt(tree)
  except Unknown:
    raise
  except Exception as error:   # a class was given values that it does not expect
    raise Unknown(f'its description does not fit this version of the package ({" ".join(str(error).split())[:200]})'
                  ) from None


def outside(tree: Any) -> list[str]:
  """Returns the names of what `stored` could not describe, such as 'small:Model', each once. May raise Unknown."""
  check_size(tree)
  return list(dict.fromkeys(_outside_names(tree)))


def _outside_names(tree: Any) -> Iterator[str]:
  if isinstance(tree, dict) and tree.keys() == {'outside'}:
    yield str(tree['outside'])[:200]
  elif isinstance(tree, dict | list):
    for item in tree.values() if isinstance(tree, dict) else tree:
      yield from _outside_names(item)


def _outside(value: Any) -> dict[str, str]:
  kind = value if hasattr(value, '__qualname__') and hasattr(value, '__module__') else type(value)
  return {'outside': f'{kind.__module__}:{kind.__qualname__}'}


def check_size(tree: Any) -> None:
  """Raises Unknown if JSON is nested too deep or too large. It does not recurse, because the JSON is not trusted."""
  level, count = [tree], 0
  for _ in range(DEPTH):
    level = [item for node in level if isinstance(node, dict | list)
             for item in (node.values() if isinstance(node, dict) else node)]
    count += len(level)
    if count > SIZE:
      raise Unknown(f'its description has more than {SIZE:,} values')
    if not level:
      return
  raise Unknown(f'its description is nested deeper than the {DEPTH} levels that are read')


def _rebuilt(tree: Any) -> Any:
  match tree:
    case None | bool() | int() | float() | str():
      return tree
    case {'tuple': list(items)}:
      return tuple(map(_rebuilt, items))
    case {'list': list(items)}:
      return list(map(_rebuilt, items))
    case {'dict': list(items)}:
      return {_rebuilt(key): _rebuilt(item) for key, item in items}
    case {'path': str(path)}:
      return pathlib.Path(path)
    case {'dtype': str(name)}:
      return jnp.dtype(name)
    case {'type': str(name)}:
      return _class(name)
    case {'partial': function, 'args': args, 'keywords': keywords}:
      return functools.partial(_rebuilt(function), *_rebuilt(args), **_rebuilt(keywords))
    case {'method': str(name), 'of': value}:
      return _method(_rebuilt(value), name)
    case {'function': str(name), 'number': int(number), 'cells': dict(cells), 'defaults': defaults, 'keywords': kw}:
      cells = {name: _rebuilt(cell) for name, cell in cells.items()}
      return _inner_function(name, number, cells, _rebuilt(defaults), _rebuilt(kw))
    case {'function': str(name)}:
      value = _look_up(name)
      if inspect.isclass(value) or not callable(value):
        raise Unknown(f'{name} is not a function')
      return value
    case {'class': str(name), 'fields': dict(fields)}:
      kind = _class(name)
      if not _holds_only_fields(kind) or not fields.keys() <= set(_fields(kind)):
        raise Unknown(f'{name} is not a class that can be built from its fields, or has other fields')
      value = kind(**{field: _rebuilt(item) for field, item in fields.items()})
      return value.to_store() if hasattr(kind, 'to_store') else value
  raise Unknown(f'its description has a value that is not understood: {str(tree)[:100]}')


def _name(value: Any) -> str | None:
  """Returns 'module:qualified.name' of a class or function that `_look_up` returns for it; None for other values."""
  qualified, module = getattr(value, '__qualname__', None), getattr(value, '__module__', None)
  if not isinstance(qualified, str) or not isinstance(module, str):
    return None
  name = f'jax.nn:{qualified}' if module.split('.')[0] == 'jax' else f'{module}:{qualified}'
  try:
    return name if _look_up(name) is value else None
  except Unknown:
    return 'numpy:ndarray' if value is np.ndarray else None


def _look_up(name: str) -> Any:
  """Returns the class or function of a name such as 'lm.models.layers:Block'. Raises Unknown if that is not allowed."""
  module, _, qualified = name.partition(':')
  parts = *module.split('.'), *qualified.split('.')
  if not (_is_of(name, CLASSES) or _is_of(name, FUNCTIONS)) or not all(part.isidentifier() for part in parts):
    raise Unknown(f'{name[:200]} is not a class or function of this package that a model, an objective or data may use')
  try:
    value = importlib.import_module(module)
    for part in qualified.split('.'):
      value = vars(value)[part]
  except (ImportError, KeyError, TypeError):
    raise Unknown(f'{name[:200]} is not defined by this version of the package') from None
  if not _is_of(name, CLASSES if inspect.isclass(value) else FUNCTIONS) or not callable(value):
    raise Unknown(f'{name[:200]} is not a class or function that a model, an objective or data may use')
  # Names that the module only imports are refused, because they may be anything.
  if module != 'jax.nn' and (getattr(value, '__module__', None), getattr(value, '__qualname__', None)) != (
      module, qualified):
    raise Unknown(f'{name[:200]} is not defined in {module}')
  return value


def _is_of(name: str, allowed: tuple[str, ...]) -> bool:
  return any(name == entry or name.startswith((f'{entry}.', f'{entry}:')) for entry in allowed)


def _class(name: str) -> type:
  value = np.ndarray if name == 'numpy:ndarray' else _look_up(name)
  if not inspect.isclass(value):
    raise Unknown(f'{name} is not a class')
  return value


def _holds_only_fields(kind: type) -> bool:
  """Returns whether a class only holds fields: a frozen dataclass, a Flax module, or a named tuple."""
  if dataclasses.is_dataclass(kind):
    return kind.__dataclass_params__.frozen or any(base.__module__.startswith('flax.') for base in kind.__mro__)
  return issubclass(kind, tuple) and hasattr(kind, '_fields')


def _fields(kind: type) -> list[str]:
  if not dataclasses.is_dataclass(kind):
    return list(kind._fields)
  of_flax = any(base.__module__.startswith('flax.') for base in kind.__mro__)
  return [f.name for f in dataclasses.fields(kind) if f.init and not (of_flax and f.name in ('parent', 'name'))]


def _has_default(field: dataclasses.Field) -> bool:
  return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def _dtype(value: Any) -> np.dtype | None:
  if isinstance(value, type):   # np.float32 and jnp.float32 are types
    value = np.dtype(value) if issubclass(value, np.generic) else getattr(value, 'dtype', None)
  return value if isinstance(value, np.dtype) else None


def _stored_function(value: types.FunctionType, store: Any) -> dict[str, Any]:
  """Describes an inner function of a function in `FUNCTIONS` by the name of its code and the values of its closure."""
  name = f'{value.__module__}:{value.__qualname__}'
  try:
    number = _codes(name).index(value.__code__)
    cells = {free: store(cell.cell_contents) for free, cell in zip(value.__code__.co_freevars, value.__closure__ or ())}
  except ValueError:   # Unknown, missing code, or an empty cell
    return _outside(value)
  return {'function': name, 'number': number, 'cells': cells, 'defaults': store(value.__defaults__),
          'keywords': store(value.__kwdefaults__)}


def _inner_function(name: str, number: int, cells: Mapping[str, Any], defaults: Any, keywords: Any
                    ) -> types.FunctionType:
  codes = _codes(name)
  if not 0 <= number < len(codes) or cells.keys() != set(codes[number].co_freevars):
    raise Unknown(f'{name} is another function in this version of the package')
  code, module = codes[number], importlib.import_module(name.partition(':')[0])
  closure = tuple(types.CellType(cells[free]) for free in code.co_freevars)
  function = types.FunctionType(code, vars(module), code.co_name, defaults, closure)
  function.__kwdefaults__, function.__qualname__ = keywords, code.co_qualname
  return function


def _codes(name: str) -> list[types.CodeType]:
  """Returns the code of inner functions of this qualified name, in the order of the source."""
  outer, inside, _ = name.partition('.<locals>')
  if not inside:
    raise Unknown(f'{name} is not an inner function')
  function, matching = inspect.unwrap(_look_up(outer)), []
  level = [function.__code__] if inspect.isfunction(function) else []
  while level:
    level = [constant for code in level for constant in code.co_consts if isinstance(constant, types.CodeType)]
    matching += [code for code in level if code.co_qualname == name.partition(':')[2]]
  return matching


def _method(value: Any, name: str) -> Any:
  kind = _name(type(value)) or ''
  if name != 'apply' or not _is_of(kind, ('lm.models', 'lm.lora:Adapted')) or not hasattr(type(value), name):
    raise Unknown(f'{type(value).__name__}.{name} is not the method apply of a model of this package')
  return getattr(value, name)
