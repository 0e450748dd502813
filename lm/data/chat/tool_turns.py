"""The template of a conversation in which a model calls functions: turns, and text in the form of Hermes and Qwen."""
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lm.data.chat.conversation import Messages, Turns
from lm.data.tokenizers.folder import Tokenizer

Tools = Sequence[Mapping[str, Any]]   # each {'type': 'function', 'function': {'name': ..., 'parameters': ...}}


@dataclasses.dataclass(frozen=True)
class ToolTurns(Turns):
  """`Turns` with tools, which are written as text in turns. So a record that has this text is encoded in the same way.

  Tools are a message of the system before all others, a call belongs to the content of the assistant's message, and
  what a function returned, a message of the role 'tool', is one of the user.
  """
  writes_tools = True

  def encode(self, tokens: Tokenizer, messages: Messages, add_generation_prompt: bool = False, *, first: int = 0,
             tools: Tools | None = None) -> tuple[np.ndarray, np.ndarray]:
    text = as_text(messages, tools)
    return super().encode(tokens, text, add_generation_prompt, first=first + len(text) - len(messages))

  def jinja(self, tokens: Tokenizer) -> str:
    call = "{'name': call.function.name, 'arguments': call.function.arguments} | tojson"
    listed = ("{{ '<|system|><tools>' }}{% for tool in tools %}{{ '\\n' + (tool.function | tojson) }}{% endfor %}"
              "{{ '\\n</tools>' }}")
    result = "{{ '<|user|><tool_response>' + message.content + '</tool_response>' }}"
    plain = ("{{ '<|' + message.role + '|>' + message.content }}{% for call in message.tool_calls or [] %}"
            f"{{{{ '<tool_call>' + ({call}) + '</tool_call>' }}}}{{% endfor %}}")
    end = f'{{{{ {json.dumps(self.end)} }}}}'
    bos = '{{ bos_token }}' if tokens.adds_bos else ''
    return (f"{bos}{{% if tools %}}{listed}{end}{{% endif %}}{{% for message in messages %}}"
            f"{{% if message.role == 'tool' %}}{result}{{% else %}}{plain}{{% endif %}}{end}{{% endfor %}}"
            "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def as_text(messages: Messages, tools: Tools | None = None) -> list[Mapping[str, Any]]:
  """Returns messages whose tools, calls and results are text; with tools, one message more, the first.

  Raises ValueError for a call without a name and arguments, and for a result that is no text.
  """
  result: list[Mapping[str, Any]] = []
  if tools:
    lines = [json.dumps(tool['function'], ensure_ascii=False) for tool in tools]
    result.append({'role': 'system', 'content': '\n'.join(['<tools>', *lines, '</tools>'])})
  for message in messages:
    content = message.get('content')
    if message.get('role') == 'tool':
      if not isinstance(content, str):
        raise ValueError(f'the content of a message of the role tool is {content!r:.100}, and has to be a text')
      message = {'role': 'user', 'content': f'<tool_response>{content}</tool_response>'}
    elif calls := message.get('tool_calls'):
      if not isinstance(calls, Sequence) or not isinstance(content, str | None):
        raise ValueError(f'tool_calls={calls!r:.100} has to be a list, and the content {content!r:.100} a text')
      message = {'role': message.get('role'), 'content': (content or '') + ''.join(map(_call, calls))}
    result.append(message)
  return result


def _call(call: Mapping[str, Any]) -> str:
  match call:
    case {'function': {'name': str(name), 'arguments': arguments}}:
      return f'<tool_call>{json.dumps({"name": name, "arguments": arguments}, ensure_ascii=False)}</tool_call>'
  raise ValueError(f'the call {call!r:.100} needs a function with a name and arguments')
