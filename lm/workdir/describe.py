"""Descriptions of objects as JSON, and their differences, by which a resumed run is recognised as the same run."""
import dataclasses
import functools
import hashlib
import inspect
import json
import types
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from lm.workdir import source_code


def differences(stored: Any, now: Any) -> list[str]:
  """Returns a line for each leaf that differs, such as 'model.block.heads: 6 before, 8 now'."""
  old, new = ({name: repr(leaf) for name, leaf in _leaves(tree)} for tree in (stored, now))
  undescribed = _without_code(old, new)
  if undescribed:
    return [f'{name}: its code is not in what an older version of lm stored, so it may have been edited since'
            for name in undescribed]
  return [f'{name}: {old.get(name, "absent")} before, {new.get(name, "absent")} now'
          for name in {**old, **new} if old.get(name) != new.get(name)]


def _without_code(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
  """Returns the functions and classes that have the same name in both, but whose code only `new` describes."""
  owners = dict.fromkeys(name.partition('.code.')[0] for name in new if '.code.' in name)
  return [owner for owner in owners if not any(name.startswith(f'{owner}.code.') for name in old) and (
      f'{owner}.class' in old and old[f'{owner}.class'] == new.get(f'{owner}.class')
      or owner in old and old[owner] in (new.get(f'{owner}.function'), new.get(f'{owner}.object')))]


def fingerprint(params: Any) -> str:
  """Returns a hash of a tree of arrays: of their names, shapes, dtypes and bits. It is the same on any mesh."""
  sums = jax.tree_util.tree_leaves_with_path(_checksums(params))
  facts = [(jax.tree_util.keystr(path), x.shape, str(x.dtype)) for path, x in
           jax.tree_util.tree_leaves_with_path(params)]
  facts += [(jax.tree_util.keystr(path), int(number)) for path, number in sums]
  return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def digest(description: Any) -> str:
  """Returns a hash of JSON, such as a description."""
  return hashlib.sha256(json.dumps(description).encode()).hexdigest()[:16]


@jax.jit
def _checksums(params: Any) -> Any:
  """Returns for each array a sum of its bits, mixed with their indices, modulo 2 ** 32, in any order of addition."""
  def checksum(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{8 * x.dtype.itemsize}')).astype(jnp.uint32)
    for axis in range(x.ndim):
      place = jnp.arange(x.shape[axis], dtype=jnp.uint32).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
      bits = (bits ^ bits >> 15) * jnp.uint32(0x9E3779B1) + place
    return jnp.sum((bits ^ bits >> 16) * jnp.uint32(0x85EBCA6B), dtype=jnp.uint32)
  return jax.tree.map(checksum, params)


def describe(value: Any, inside: bool = False, above: tuple[int, ...] = ()) -> Any:
  """Returns JSON, the same in every process: classes with their compared fields, functions by name, arrays by hash.

  Functions and classes that belong neither to this package nor to an installed one also have their `code` (see
  `source_code`), because they may be edited without a new name. An inner function, such as a schedule, is described by
  its name and, if `inside` is true, the values of its closure. An object within itself, such as a function that calls
  itself, is described by its name; `above` has the ids of the objects that contain the value.
  """
  if id(value) in above:
    return getattr(value, '__qualname__', type(value).__qualname__)
  recur = functools.partial(describe, inside=inside, above=(*above, id(value)))
  code = _code(value)
  match value:
    case None | bool() | int() | float() | str():
      return value
    case np.generic():
      return value.item()
    case np.dtype():
      return value.name
    case type():  # np.float32 and jnp.float32 are types
      dtype = np.dtype(value) if issubclass(value, np.generic) else getattr(value, 'dtype', None)
      name = dtype.name if isinstance(dtype, np.dtype) else value.__qualname__
      return {'type': name, **code} if code else name
    case np.ndarray() | jax.Array():
      return f'{value.dtype}{list(value.shape)} {hashlib.sha256(np.asarray(value).tobytes()).hexdigest()[:16]}'
    case Mapping():
      return {str(key): recur(item) for key, item in value.items()}
    case functools.partial():
      return {'partial': recur(value.func), 'args': recur(value.args), **recur(value.keywords)}
    case list() | tuple() if not hasattr(value, '_fields'):
      return [recur(item) for item in value]
    case types.FunctionType() if inside and inspect.getclosurevars(value).nonlocals:
      values = inspect.getclosurevars(value).nonlocals
      others = {name: item for name, item in values.items() if item is not value}   # it may call itself
      return {'function': value.__qualname__, **recur(others), **code}
  if isinstance(value, tuple):
    names = value._fields
  elif dataclasses.is_dataclass(value):
    of_flax = any(c.__module__.startswith('flax.') for c in type(value).__mro__)
    names = [f.name for f in dataclasses.fields(value) if f.compare and not (of_flax and f.name in ('parent', 'name'))]
  else:
    text = getattr(value, '__qualname__', None) or repr(value)
    text = type(value).__qualname__ if ' at 0x' in text else text
    return {'function' if source_code.is_users(value) else 'object': text, **code} if code else text
  return {'class': type(value).__qualname__, **{name: recur(getattr(value, name)) for name in names}, **code}


def _code(value: Any) -> dict[str, Any]:
  """Returns `{'code': ...}` for a user's function or class, or for an object of one; otherwise an empty dict."""
  users = value if source_code.is_users(value) else type(value)
  return {'code': source_code.digests(users, describe)} if source_code.is_users(users) else {}


def _leaves(tree: Any, path: str = '') -> Iterator[tuple[str, Any]]:
  """Yields (dotted path, leaf). Empty containers are leaves, and tuples are lists, as in JSON."""
  if isinstance(tree, Mapping) and tree:
    for key, child in tree.items():
      yield from _leaves(child, f'{path}.{key}'.lstrip('.'))
  elif isinstance(tree, list | tuple):
    yield from _leaves({str(i): child for i, child in enumerate(tree)} or '[]', path)
  else:
    yield path, tree
