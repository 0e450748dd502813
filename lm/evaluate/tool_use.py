"""Asks a served model that calls functions: the functions are called here, and their results are sent back to it."""
import json
from collections.abc import Callable, Mapping
from typing import Any

from lm.evaluate.chat_endpoint import Endpoint, Tools

Function = Callable[..., str]
Call = tuple[str, Any]   # a function's name, and its arguments, an object; or the text of arguments that are no JSON


def answer(endpoint: Endpoint, messages: list[dict[str, Any]], tools: Tools, functions: Mapping[str, Function],
           most: int = 4) -> tuple[str, list[Call]]:
  """Returns a model's answer, and the calls that it made before. Adds all messages up to the answer to `messages`.

  The answer is empty if each of `most` replies has calls. If a call cannot be executed, its result says what is wrong.
  """
  calls = []
  for _ in range(most):
    reply = endpoint.message(messages, tools)
    message = {'role': 'assistant', 'content': reply.get('content') or ''}
    if not reply.get('tool_calls'):
      messages.append(message)
      return message['content'], calls
    messages.append({**message, 'tool_calls': reply['tool_calls']})
    for call in reply['tool_calls']:
      name, arguments = call['function']['name'], _value(call['function']['arguments'])
      calls.append((name, arguments))
      messages.append({'role': 'tool', 'tool_call_id': call['id'], 'content': result(name, arguments, functions)})
  return '', calls


def result(name: str, arguments: Any, functions: Mapping[str, Function]) -> str:
  """Returns what a function returns for its arguments, or why it cannot be called."""
  if name not in functions:
    return f'There is no function {name}.'
  try:
    return functions[name](**arguments)
  except (ValueError, TypeError) as error:
    return f'{name} cannot be called: {error}'


def _value(text: str) -> Any:
  try:
    return json.loads(text)
  except ValueError:
    return text
