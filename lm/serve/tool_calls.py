"""Calls of functions in the text of a model: <tool_call>{"name": ..., "arguments": {...}}</tool_call>.

That form, of Hermes and Qwen, is read where the model chooses whether it calls. Where it has to call, the answer is
JSON by a constraint, and is read as the arguments of the named function, or as {"name": ..., "arguments": ...}.
"""
import json
import uuid
from typing import Any, NamedTuple

from lm.serve.chat_messages import ToolUse
from lm.workdir.parsing import json_value

_OPEN, _CLOSE = '<tool_call>', '</tool_call>'


class CallPart(NamedTuple):
  """A part of a call: its number in the answer, its name and id in its first part, and further arguments, as JSON."""
  index: int
  arguments: str
  name: str | None = None
  id: str | None = None

  def delta(self) -> dict[str, Any]:
    """Returns the part as OpenAI's streams write it."""
    if self.name is None:
      return {'index': self.index, 'function': {'arguments': self.arguments}}
    function = {'name': self.name, 'arguments': self.arguments}
    return {'index': self.index, 'id': self.id, 'type': 'function', 'function': function}


class ToolCallReader:
  """Splits the text of an answer, as it comes, into content and calls."""

  def __init__(self, tool_use: ToolUse):
    self._use, self._names = tool_use, [tool['function']['name'] for tool in tool_use.tools]
    self._pending = ''      # text that may belong to a call
    self._calls = 0
    self._skips_space = False
    self._is_open = False   # whether the call of a named function has begun

  @property
  def finish(self) -> str:
    """What the end of an answer is called where no limit cut it off: as OpenAI does it, by who chose the call."""
    return 'tool_calls' if self._calls and self._use.named is None else 'stop'

  def push(self, text: str) -> tuple[str, list[CallPart]]:
    """Adds text. Returns the content and the parts of calls that are certain now."""
    if not self._use.tools:
      return text, []
    if self._use.named is not None:
      parts = [] if self._is_open else [self._first(self._use.named)]
      self._is_open = True
      return '', [*parts, *([CallPart(0, text)] if text else [])]
    self._pending += text
    return ('', []) if self._use.is_forced else self._split()

  def end(self) -> tuple[str, list[CallPart]]:
    """Returns what was held back: a call that is whole, and else content."""
    pending, self._pending = self._pending, ''
    if self._use.is_forced and (parts := self._call(pending)):
      return '', parts
    return self._content(pending), []

  def _content(self, text: str) -> str:
    """Returns content without the space that a model writes after a call."""
    if self._skips_space:
      text = text.lstrip()
      self._skips_space = not text
    return text

  def _split(self) -> tuple[str, list[CallPart]]:
    content, parts = [], []
    while True:
      before, mark, after = self._pending.partition(_OPEN)
      inside, close, following = after.partition(_CLOSE)
      if not mark:
        overlap = next((n for n in range(min(len(_OPEN) - 1, len(before)), 0, -1) if before.endswith(_OPEN[:n])), 0)
        content.append(self._content(before[:len(before) - overlap]))
        self._pending = before[len(before) - overlap:]
        break
      content.append(self._content(before))
      self._pending = mark + after
      if not close:
        break
      call = self._call(inside)
      if call is None:
        content.append(self._content(mark + inside + close))
      else:
        self._skips_space = True
        parts += call
      self._pending = following
    return ''.join(content), parts

  def _call(self, text: str) -> list[CallPart] | None:
    """Returns the parts of a call, none where it is one too many; None where the text is no call of a tool."""
    try:
      call = json_value(text)
    except ValueError:
      return None
    if not isinstance(call, dict) or call.get('name') not in self._names:
      return None
    if self._calls and not self._use.in_parallel:
      return []
    arguments = call.get('arguments', call.get('parameters', {}))
    written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    first = self._first(call['name'])
    return [first, CallPart(first.index, written)]

  def _first(self, name: str) -> CallPart:
    self._calls += 1
    return CallPart(self._calls - 1, '', name, f'call_{uuid.uuid4().hex[:24]}')
