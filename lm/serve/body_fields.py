"""The fields of a JSON body, declared once: they are read, refused and written into the OpenAPI document alike."""
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.data.tokenizers.base import utf8
from lm.generate.sampling import BIASES as MOST_BIASES
from lm.serve.api_errors import bad_request

Schema = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Field:
  """A field of a body.

  Attributes:
    schema: its JSON schema.
    read: returns the value of what the body has; raises ValueError, with what it has to be, for another value.
    default: the value where the body has none, or null.
    required: whether the body has to have it.
  """
  schema: Schema
  read: Callable[[Any], Any]
  default: Any = None
  required: bool = False

  def needed(self) -> 'Field':
    return dataclasses.replace(self, required=True)

  def otherwise(self, default: Any) -> 'Field':
    return dataclasses.replace(self, default=default)


def read_fields(body: Any, fields: Mapping[str, Field], place: str = '') -> dict[str, Any]:
  """Returns the value of each field of a JSON object, at `place` of the body.

  Raises ApiError, with status 400, for what is no object, for fields that are unknown, all of which it names, and for
  values that are missing or wrong.
  """
  if not isinstance(body, dict):
    raise bad_request(f'{place or "the body"} must be a JSON object, and is {shown(body)}', place or None)
  prefix = f'{place}.' if place else ''
  unknown = [name for name in body if name not in fields]
  if unknown:
    names = ', '.join(f'{prefix}{name}'[:100] for name in unknown[:10])
    raise bad_request(f'not supported: {names}; leave them out. Supported are {", ".join(fields)}',
                      f'{prefix}{unknown[0]}'[:100], 'unsupported_parameter')
  values = {}
  for name, field in fields.items():
    value = body.get(name)
    if value is None and field.required:
      raise bad_request(f'{prefix}{name} is missing', f'{prefix}{name}', 'missing_required_parameter')
    try:
      values[name] = field.default if value is None else field.read(value)
    except ValueError as error:
      raise bad_request(f'{prefix}{name}={shown(value)} {error}', f'{prefix}{name}') from None
  return values


def shown(value: Any) -> str:
  """Returns a value of a body for a message, cut off where it is long."""
  text = ascii(value)
  return text if len(text) <= 80 else f'{text[:77]}...'


def schema_of(fields: Mapping[str, Field]) -> dict[str, Any]:
  """Returns the JSON schema of a body."""
  properties = {}
  for name, field in fields.items():
    schema = dict(field.schema)
    if not field.required:
      schema = {'anyOf': [schema, {'type': 'null'}]}
      if field.default not in (None, ()):
        schema['default'] = field.default
    properties[name] = schema
  required = [name for name, field in fields.items() if field.required]
  return {'type': 'object', 'additionalProperties': False, 'properties': properties,
          **({'required': required} if required else {})}


def number(low: float, high: float, above: bool = False) -> Field:
  """Returns a field for a number from `low` to `high`; with `above`, `low` itself is excluded."""
  def read(value: Any) -> float:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or above and value == low:
      raise ValueError(f'must be a number {"above" if above else "from"} {low:g} and at most {high:g}')
    return float(value)
  return Field({'type': 'number', 'exclusiveMinimum' if above else 'minimum': low, 'maximum': high}, read)


def integer(low: int, high: int) -> Field:
  """Returns a field for a whole number from `low` to `high`."""
  def read(value: Any) -> int:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not low <= value <= high or value % 1:
      raise ValueError(f'must be a whole number from {low} to {high}')
    return int(value)
  return Field({'type': 'integer', 'minimum': low, 'maximum': high}, read)


def boolean(default: bool = False) -> Field:
  """Returns a field for true or false."""
  return Field({'type': 'boolean'}, _bool, default)


def _bool(value: Any) -> bool:
  if not isinstance(value, bool):
    raise ValueError('must be true or false')
  return value


def text(value: Any) -> str:
  """Returns a string; raises ValueError for another value, and for a lone surrogate."""
  if not isinstance(value, str):
    raise ValueError('must be a string')
  utf8(value)
  return value


def text_at(place: str, value: str) -> str:
  """Returns a string at a place of the body. Raises ApiError where it has a lone surrogate."""
  try:
    return text(value)
  except ValueError as error:
    raise bad_request(f'{place}: {error}', place) from None


TEXT = Field({'type': 'string'}, text)


def texts(most: int) -> Field:
  """Returns a field for a string or a list of at most `most` strings, none of which is empty; its value is a tuple."""
  def read(value: Any) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or len(values) > most or not all(isinstance(x, str) and x for x in values):
      raise ValueError(f'must be a string or a list of at most {most} strings, and none of them empty')
    return tuple(map(text, values))
  one = {'type': 'string', 'minLength': 1}
  return Field({'anyOf': [one, {'type': 'array', 'items': one, 'maxItems': most}]}, read, ())


def one_of(*values: Any) -> Field:
  """Returns a field that has one of some values."""
  def read(value: Any) -> Any:
    if not any(type(value) is type(each) and value == each for each in values):
      raise ValueError(f'is not supported; supported is {" or ".join(map(shown, values))}')
    return value
  return Field({'enum': list(values)}, read)


def ids(value: Any) -> tuple[int, ...]:
  """Returns a list of token ids; raises ValueError for another value."""
  if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 1 << 31 for i in value):
    raise ValueError('must be a list of token ids')
  return tuple(value)


IDS = Field({'type': 'array', 'items': {'type': 'integer', 'minimum': 0}}, ids)


def prompts(value: Any) -> tuple[str | tuple[int, ...], ...]:
  """Returns the texts, or token ids, of a string, a list of strings, a list of ids or a list of lists of ids."""
  if isinstance(value, str):
    return (text(value),)
  if isinstance(value, list) and value and all(type(x) is int for x in value):
    return (ids(value),)
  if isinstance(value, list) and value and all(isinstance(x, str) for x in value):
    return tuple(map(text, value))
  if isinstance(value, list) and value and all(isinstance(x, list) and x for x in value):
    return tuple(map(ids, value))
  raise ValueError('must be a string, or a list of strings, of token ids, or of lists of token ids, and not be empty')


_ID_LIST = {'type': 'array', 'minItems': 1, 'items': {'type': 'integer', 'minimum': 0}}
PROMPTS = Field({'anyOf': [{'type': 'string'}, {'type': 'array', 'minItems': 1, 'items': {'type': 'string'}}, _ID_LIST,
                           {'type': 'array', 'minItems': 1, 'items': _ID_LIST}]}, prompts)


def biases(value: Any) -> tuple[tuple[int, float], ...]:
  """Returns (token id, bias) of an object such as {"15": -100}; raises ValueError for another value."""
  if not isinstance(value, dict) or len(value) > MOST_BIASES or not all(
      name.isdecimal() and name.isascii() and len(name) < 10 and isinstance(bias, int | float)
      and not isinstance(bias, bool) and -100 <= bias <= 100 for name, bias in value.items()):
    raise ValueError(f'must be an object of at most {MOST_BIASES} token ids, each with a bias from -100 to 100')
  return tuple((int(name), float(bias)) for name, bias in value.items())


BIASES = Field({'type': 'object', 'additionalProperties': {'type': 'number', 'minimum': -100, 'maximum': 100}}, biases,
               ())


def nested(name: str, fields: Mapping[str, Field]) -> Field:
  """Returns the field `name`, an object with fields of its own, whose value is a dict of their values."""
  return Field(schema_of(fields), lambda value: read_fields(value, fields, name))


def objects(value: Any) -> Sequence[Mapping[str, Any]]:
  """Returns a list of JSON objects, which is not empty; raises ValueError for another value."""
  if not isinstance(value, list) or not value or not all(isinstance(each, dict) for each in value):
    raise ValueError('must be a list of objects, and not be empty')
  return value


OBJECTS = Field({'type': 'array', 'minItems': 1, 'items': {'type': 'object'}}, objects)
# A field that may only be null.
NOTHING = one_of(None)
# A field of any kind, which its reader checks.
ANY = Field({}, lambda value: value)


def read_object(value: Any) -> Mapping[str, Any]:
  """Returns a JSON object; raises ValueError for another value."""
  if not isinstance(value, dict):
    raise ValueError('must be an object')
  return value


ANY_OBJECT = Field({'type': 'object'}, read_object)
