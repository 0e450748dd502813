"""The messages and tools of a chat: what is accepted, and what a chat template is given of it."""
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lm.serve import body_fields
from lm.serve.api_errors import bad_request
from lm.serve.body_fields import Field, read_fields, shown
from lm.serve.output_format import OutputFormat
from lm.workdir.parsing import json_value

_ROLES = ('system', 'developer', 'user', 'assistant', 'tool')
_MOST_TOOLS = 128
_MESSAGE: Mapping[str, Field] = {
    'role': body_fields.one_of(*_ROLES).needed(), 'content': body_fields.ANY, 'name': body_fields.TEXT,
    'tool_calls': body_fields.OBJECTS, 'tool_call_id': body_fields.TEXT,
    # Clients send answers back, with fields that are null in them.
    'refusal': body_fields.NOTHING, 'function_call': body_fields.NOTHING, 'annotations': body_fields.NOTHING,
    'audio': body_fields.NOTHING}
_CALL: Mapping[str, Field] = {
    'id': body_fields.TEXT.needed(), 'type': body_fields.one_of('function').otherwise('function'),
    'function': body_fields.ANY_OBJECT.needed(), 'index': body_fields.integer(0, _MOST_TOOLS)}
_FUNCTION: Mapping[str, Field] = {'name': body_fields.TEXT.needed(), 'description': body_fields.TEXT,
                                  'parameters': body_fields.ANY_OBJECT, 'strict': body_fields.boolean()}


def read_messages(values: Sequence[Any], place: str = 'messages') -> list[dict[str, Any]]:
  """Returns messages as a chat template reads them: content is text, and the arguments of calls are objects.

  Raises ApiError, which names the message, where it has no known role, content of another kind than text, or more.
  """
  return [_message(value, f'{place}[{i}]') for i, value in enumerate(values)]


def _message(value: Any, place: str) -> dict[str, Any]:
  fields = read_fields(value, _MESSAGE, place)
  role, calls = fields['role'], fields['tool_calls']
  if calls and role != 'assistant':
    raise bad_request(f'{place}.tool_calls belong to a message of the assistant, and the role is {role}',
                      f'{place}.tool_calls')
  content = fields['content']
  if content is None and not calls:
    raise bad_request(f'{place}.content is missing', f'{place}.content', 'missing_required_parameter')
  message = {'role': 'system' if role == 'developer' else role,
             'content': '' if content is None else content_text(content, f'{place}.content')}
  if calls:
    message['tool_calls'] = [_call(call, f'{place}.tool_calls[{i}]') for i, call in enumerate(calls)]
  return {**message, **{name: fields[name] for name in ('name', 'tool_call_id') if fields[name] is not None}}


def content_text(content: Any, place: str, kinds: Sequence[str] = ('text',)) -> str:
  """Returns the text of a content, which is a string or a list of parts of text; ApiError for another content."""
  parts = content if isinstance(content, list) else [{'type': kinds[0], 'text': content}]
  texts = []
  for part in parts:
    match part:
      case {'type': str(kind), 'text': str(text)} if kind in kinds:
        texts.append(body_fields.text_at(place, text))
      case _:
        kind = part.get('type') if isinstance(part, dict) else part
        raise bad_request(f'{place} must be text, or a list of parts with type={kinds[0]!r} and a text, and has '
                          f'{shown(kind)}; this model reads text alone', place)
  return ''.join(texts)


def _call(value: Any, place: str) -> dict[str, Any]:
  fields = read_fields(value, _CALL, place)
  match fields['function']:
    case {'name': str(name), 'arguments': str(text)} if len(fields['function']) == 2:
      try:
        arguments = json_value(text)
      except ValueError:
        arguments = text
      return {'id': fields['id'], 'type': 'function', 'function': {'name': name, 'arguments': arguments}}
  raise bad_request(f'{place}.function must have a name and arguments, both strings', f'{place}.function')


@dataclasses.dataclass(frozen=True)
class ToolUse:
  """The functions that a model may call, and whether it has to.

  Attributes:
    tools: in OpenAI's form, as chat templates read them; none if the model may not call any.
    is_forced: whether the answer has to be a call.
    named: the function that has to be called; None where the model chooses.
    in_parallel: whether an answer may have several calls.
  """
  tools: tuple[Mapping[str, Any], ...] = ()
  is_forced: bool = False
  named: str | None = None
  in_parallel: bool = True

  def format(self) -> OutputFormat | None:
    """Returns the constraint of an answer that has to be a call: the arguments, or {"name": ..., "arguments": ...}."""
    if not self.is_forced:
      return None
    functions = [tool['function'] for tool in self.tools]
    arguments = {f['name']: f.get('parameters') or {'type': 'object'} for f in functions}
    if self.named is not None:
      return OutputFormat('json', json.dumps(arguments[self.named]), 'tools')
    # Each schema is a resource of its own, so that references such as #/$defs/Item stay within it.
    calls = [{'type': 'object', 'properties': {'name': {'const': name}, 'arguments': {'$id': f'tool:{name}', **schema}},
              'required': ['name', 'arguments'], 'additionalProperties': False} for name, schema in arguments.items()]
    return OutputFormat('json', json.dumps({'anyOf': calls}), 'tools')


NO_TOOLS = ToolUse()


def read_tools(tools: Sequence[Any] | None, choice: Any, in_parallel: bool = True) -> ToolUse:
  """Returns the tools of a body. Raises ApiError, which names the tool that is wrong, or a choice of no tool."""
  if not tools:
    if choice not in (None, 'none', 'auto'):
      raise bad_request(f'tool_choice={shown(choice)} needs tools; give them, or leave it out', 'tool_choice')
    return NO_TOOLS
  if len(tools) > _MOST_TOOLS:
    raise bad_request(f'there are {len(tools)} tools; give at most {_MOST_TOOLS}', 'tools')
  read = []
  for i, tool in enumerate(tools):
    place = f'tools[{i}]'
    fields = read_fields(tool, {'type': body_fields.one_of('function').needed(),
                                'function': body_fields.ANY_OBJECT.needed()}, place)
    function = read_fields(fields['function'], _FUNCTION, f'{place}.function')
    if not re.fullmatch(r'[A-Za-z0-9_.-]{1,64}', function['name']):
      raise bad_request(f'{place}.function.name={shown(function["name"])} must be 1 to 64 letters, digits, _, . or -',
                        f'{place}.function.name')
    read.append({'type': 'function', 'function': {
        name: function[name] for name in ('name', 'description', 'parameters') if function[name] is not None}})
  names = [tool['function']['name'] for tool in read]
  if len(set(names)) < len(names):
    raise bad_request(f'two tools have one name, of {", ".join(names)}; rename one', 'tools')
  match choice:
    case None | 'auto':
      return ToolUse(tuple(read), in_parallel=in_parallel)
    case 'none':
      return NO_TOOLS
    case 'required':
      return ToolUse(tuple(read), True, None, in_parallel)
    case {'type': 'function', 'function': {'name': str(name)}} if name in names:
      return ToolUse(tuple(read), True, name, in_parallel)
  raise bad_request(f'tool_choice={shown(choice)} must be none, auto, required, or a function of {", ".join(names)} as '
                    '{"type": "function", "function": {"name": ...}}', 'tool_choice')
