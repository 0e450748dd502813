"""Reads a `config.json` field by field, so that no field is ignored; converts sizes and windows in both directions."""
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NoReturn

from absl import logging

from lm.hf import fields

TYPES = 'full_attention', 'sliding_attention'


class Config:
  """Fields of a configuration. A family reads every field that it supports; `finish` refuses the others.

  All methods raise ValueError, with the name and the value of the field, if it is missing, of the wrong type or not
  supported. Methods with `*default` take one default value at most; without it, the field is required.
  """

  def __init__(self, values: dict[str, Any], where: str = 'config.json'):
    self._values, self._where, self._read, self._unread = values, where, set(), []

  def defaults(self, values: dict[str, Any]) -> None:
    """Sets the defaults that the class of `transformers` has for absent fields; a null field is not absent."""
    self._values = {**values, **self._values}

  def get(self, name: str, kind: type | tuple[type, ...], *default: Any) -> Any:
    """Returns a field of type `kind` (a float may be written as an integer); null counts as absent."""
    self._read.add(name)
    value = self._values.get(name)
    if value is None:
      if not default:
        raise ValueError(f'{self._where}: {name} is missing')
      return default[0]
    if kind is float and type(value) is int:
      value = float(value)
    kinds = kind if isinstance(kind, tuple) else (kind,)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
      kind_names = ' or '.join(k.__name__ for k in kinds)
      raise ValueError(f'{self._where}: {name}={value!r} is not of type {kind_names}')
    if isinstance(value, float) and not math.isfinite(value):
      raise ValueError(f'{self._where}: {name}={value!r} is not finite')
    return value

  def size(self, name: str, *default: Any) -> Any:
    """Returns a positive integer that is not absurdly large."""
    value = self.get(name, int, *default)
    if value is not None and not 0 < value < (10_000 if 'layer' in name or name.startswith('num_') else 2 ** 31):
      raise ValueError(f'{self._where}: {name}={value} is not positive, or far too large')
    return value

  def choice(self, name: str, choices: dict[Any, Any], *default: Any) -> Any:
    """Returns the entry of `choices` for the value of a field."""
    value = self.get(name, (str, int, float, bool), *default)
    if not any(value == choice and type(value) is type(choice) for choice in choices):
      self.refuse(name, value, f'one of {", ".join(map(repr, choices))}')
    return choices[value]

  def only(self, name: str, *supported: Any) -> None:
    """Refuses a field with any other value than these; the field may be absent."""
    self._read.add(name)
    value = self._values.get(name)
    if value is not None and not any(value == s and type(value) is type(s) for s in supported):
      self.refuse(name, value, 'only ' + (' or '.join(map(repr, supported)) or 'null'))

  def unread(self, name: str, *values: Any) -> None:
    """Notes a field that no implementation of the family reads; refuses it if its value is not one of these."""
    self.only(name, *values)
    if self.has(name):
      self._unread.append(name)

  def refuse(self, name: str, value: Any, supported: str) -> NoReturn:
    raise ValueError(f'{self._where}: {name}={value!r} is not supported ({supported})')

  def inner(self, name: str) -> 'Config | None':
    """Returns a field that holds fields, as a Config; None if it is absent."""
    values = self.get(name, dict, None)
    return None if values is None else Config(values, f'{self._where}: {name}')

  def has(self, name: str) -> bool:
    return self._values.get(name) is not None

  def finish(self) -> None:
    """Refuses fields that were not read, and logs in one line the fields that no implementation reads."""
    for name, value in self._values.items():
      if name in fields.NEUTRAL and name not in self._read:
        self.only(name, *fields.NEUTRAL[name])
      elif name not in self._read and name not in fields.ASIDE and value is not None:
        raise ValueError(f'{self._where}: {repr(name)[1:-1]}={value!r} is not a supported field, and may change '
                         'what the model computes; remove it if it does not')
    if self._unread:
      _note(f'{self._where}: fields that no implementation reads: '
            + ', '.join(f'{name}={self._values[name]!r}' for name in self._unread))


@functools.cache
def _note(line: str) -> None:
  """Logs a line once, because a config is read several times when a model is opened."""
  logging.warning('%s', line)


@dataclasses.dataclass(frozen=True)
class Sizes:
  """Sizes that almost every decoder has."""
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_size: int
  hidden: int
  vocab: int
  max_length: int
  eps: float
  tied: bool

  @classmethod
  def read(cls, c: Config, kv_heads: int | None = None, tied: bool = False, eps: float = 1e-6) -> 'Sizes':
    """Reads sizes under Llama's names for them; the arguments are the defaults of the family."""
    width, heads = c.size('hidden_size'), c.size('num_attention_heads')
    sizes = cls(width, c.size('num_hidden_layers'), heads, c.size('num_key_value_heads', kv_heads or heads),
                c.size('head_dim', max(width // heads, 1)), c.size('intermediate_size'), c.size('vocab_size'),
                c.size('max_position_embeddings'), c.get('rms_norm_eps', float, eps),
                c.get('tie_word_embeddings', bool, tied))
    if heads % sizes.kv_heads:
      c.refuse('num_key_value_heads', sizes.kv_heads, f'a divisor of num_attention_heads={heads}')
    if not c.has('head_dim') and width % heads:
      c.refuse('num_attention_heads', heads, f'a divisor of hidden_size={width}')
    return sizes

  @classmethod
  def of(cls, model: Any) -> 'Sizes':
    """Returns the sizes of a model."""
    block = model.layers[0]
    attention, eps = block.attention, model.norm.eps
    return cls(model.width, len(model.layers), attention.heads, attention.kv_heads, attention.head_size,
               getattr(block.feed_forward, 'hidden', 1), model.vocab, model.max_length, eps, model.tied)

  def config(self) -> dict[str, Any]:
    """Returns the fields under Llama's names."""
    return {'hidden_size': self.width, 'num_hidden_layers': self.layers, 'num_attention_heads': self.heads,
            'num_key_value_heads': self.kv_heads, 'head_dim': self.head_size, 'intermediate_size': self.hidden,
            'vocab_size': self.vocab, 'max_position_embeddings': self.max_length, 'rms_norm_eps': self.eps,
            'tie_word_embeddings': self.tied}


def windows(c: Config, layers: int, sliding: Callable[[int], bool], none: int | None = None) -> list[int | None]:
  """Returns the window of each layer, by `layer_types`; if they are absent, `sliding(i)` says which layers have one.

  A `sliding_window` equal to `none` means that no layer has a window.
  """
  window = c.get('sliding_window', int, None)
  window = None if window == none else c.size('sliding_window', None)
  types = c.get('layer_types', list, [TYPES[window is not None and sliding(i)] for i in range(layers)])
  if len(types) != layers or not all(t in TYPES for t in types):
    c.refuse('layer_types', types, f'{layers} of {" or ".join(TYPES)}')
  if window is None and TYPES[1] in types:
    c.refuse('sliding_window', window, f'a number, for layer_types has {TYPES[1]}')
  return [window if t == TYPES[1] else None for t in types]


def optional_windows(c: Config, layers: int, sliding: Callable[[int], bool]) -> list[int | None]:
  """Returns the windows of the layers, all None unless the field `use_sliding_window` is true; see `windows`."""
  used = c.get('use_sliding_window', bool, False)
  sizes = windows(c, layers, lambda i: used and sliding(i), None if used else 0)
  if any(sizes) and not used:
    c.refuse('use_sliding_window', used, f'true, for layer_types has {TYPES[1]}')
  return sizes


def windows_config(model: Any) -> dict[str, Any]:
  """Returns the fields `sliding_window` and `layer_types` of a model."""
  sizes = [block.attention.scores.window for block in model.layers]
  return {'sliding_window': next(filter(None, sizes), None), 'layer_types': [TYPES[w is not None] for w in sizes]}
