"""The form that an answer is constrained to: JSON, a regular expression, a grammar, or one of some texts."""
import dataclasses
import json
import re
from collections.abc import Mapping
from typing import Any, Literal

from lm import generate
from lm.serve import body_fields
from lm.serve.api_errors import bad_request
from lm.serve.body_fields import Field, read_fields, shown
from lm.workdir.parsing import json_value

_MOST_CHARACTERS = 65536   # of a schema or a grammar
_TYPE: Mapping[str, Field] = {'type': body_fields.one_of('text', 'json_object', 'json_schema').needed()}
_JSON_SCHEMA: Mapping[str, Field] = {
    'name': body_fields.TEXT, 'description': body_fields.TEXT, 'strict': body_fields.boolean(),
    'schema': body_fields.ANY.needed()}


@dataclasses.dataclass(frozen=True)
class OutputFormat:
  """A constraint on a whole answer. `text` is a JSON schema, a regular expression or a grammar in Lark's syntax.

  `param` is the field of the body that gives it.
  """
  kind: Literal['json', 'regex', 'grammar']
  text: str
  param: str = dataclasses.field(default='response_format', compare=False)

  def compile(self, grammars: generate.Grammars) -> generate.Grammar:
    """Returns the grammar of the answer. Raises ApiError, with what is wrong, for one that cannot be used."""
    name = {'json': 'JSON schema', 'regex': 'regular expression', 'grammar': 'grammar'}[self.kind]
    if len(self.text) > _MOST_CHARACTERS:
      raise bad_request(f'the {name} has {len(self.text):,} characters, and the server takes {_MOST_CHARACTERS:,}; '
                        'shorten it', self.param)
    try:
      match self.kind:
        case 'json':
          return grammars.compile(generate.of_json_schema(json_value(self.text)))
        case 'regex':
          return grammars.compile(generate.of_regex(self.text))
        case 'grammar':
          return grammars.compile(self.text)
    except ImportError as error:
      raise bad_request(f'this server does not constrain answers: {error}', self.param) from None
    except ValueError as error:
      raise bad_request(f'the {name} {shown(self.text)} cannot be used: {error}', self.param) from None


def _schema(schema: Any, place: str) -> OutputFormat:
  try:
    value = json_value(schema) if isinstance(schema, str) else schema
  except ValueError:
    value = None
  if not isinstance(value, dict):
    raise bad_request(f'{place}={shown(schema)} must be a JSON schema, which is an object', place)
  return OutputFormat('json', body_fields.text_at(place, json.dumps(value, ensure_ascii=False)), place)


def _choice(values: Any) -> OutputFormat:
  place = 'structured_outputs.choice'
  try:
    texts = body_fields.texts(256).read(values)
  except ValueError as error:
    raise bad_request(f'{place} {error}', place) from None
  if not texts:
    raise bad_request(f'{place}=[] must have a text at least', place)
  return OutputFormat('regex', '|'.join(map(re.escape, texts)), place)


def read_response_format(value: Mapping[str, Any] | None, place: str = 'response_format') -> OutputFormat | None:
  """Returns the constraint of OpenAI's `response_format`, or of `text.format`, which has the schema beside its type.

  Returns None for text of any form. Raises ApiError, also for fields that the type does not have.
  """
  if value is None:
    return None
  match read_fields({'type': value.get('type')}, _TYPE, place)['type']:
    case 'json_schema' if 'json_schema' in value:
      inner = body_fields.nested(f'{place}.json_schema', _JSON_SCHEMA).needed()
      schema = read_fields(value, {**_TYPE, 'json_schema': inner}, place)['json_schema']['schema']
      return _schema(schema, f'{place}.json_schema.schema')
    case 'json_schema':
      return _schema(read_fields(value, {**_TYPE, **_JSON_SCHEMA}, place)['schema'], f'{place}.schema')
    case kind:
      read_fields(value, _TYPE, place)
      return OutputFormat('json', '{"type": "object"}', place) if kind == 'json_object' else None


def read_structured_outputs(value: Mapping[str, Any] | None) -> OutputFormat | None:
  """Returns the constraint of vLLM's `structured_outputs`, an object with one of json, regex, choice, grammar."""
  if value is None:
    return None
  place = 'structured_outputs'
  match value:
    case {'json': schema} if len(value) == 1:
      return _schema(schema, f'{place}.json')
    case {'choice': choices} if len(value) == 1:
      return _choice(choices)
    case ({'regex': str(text)} | {'grammar': str(text)}) if len(value) == 1:
      kind = 'regex' if 'regex' in value else 'grammar'
      place = f'{place}.{kind}'
      return OutputFormat(kind, body_fields.text_at(place, text), place)
  raise bad_request(f'{place}={shown(value)} must have exactly one of json, regex, choice and grammar', place)


FORMATS: Mapping[str, Field] = {'response_format': body_fields.ANY_OBJECT, 'structured_outputs': body_fields.ANY_OBJECT}


def read_format(values: Mapping[str, Any]) -> OutputFormat | None:
  """Returns the constraint of a body's fields. Raises ApiError, also where they give two."""
  formats = [read_response_format(values['response_format']), read_structured_outputs(values['structured_outputs'])]
  if all(formats):
    raise bad_request('response_format and structured_outputs both constrain the answer; give one of them',
                      'structured_outputs')
  return next(filter(None, formats), None)
