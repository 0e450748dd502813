"""Calls, their results and tools are the text that the same template in Jinja writes, and that records have."""
import json

import pytest

from lm.data.chat import ToolTurns, Turns, templates, tool_turns
from lm.data.tokenizers.folder import Bytes

TOOLS = [{'type': 'function', 'function': {'name': name, 'parameters': {'type': 'object', 'description': 'é <b> "'}}}
         for name in ('find', 'sum')]
CALLS = [{'id': 'a', 'type': 'function', 'function': {'name': 'find', 'arguments': {'item': 'a "lamp"', 'n': [1, 2]}}},
         {'id': 'b', 'type': 'function', 'function': {'arguments': {}, 'name': 'sum'}}]
CHAT = [{'role': 'system', 'content': 'Be short.'}, {'role': 'user', 'content': 'Where <is> it?'},
        {'role': 'assistant', 'content': 'So:', 'tool_calls': CALLS}, {'role': 'tool', 'content': 'é "here"'},
        {'role': 'assistant', 'content': 'Here.'}, {'role': 'user', 'content': 'And?'}]


@pytest.mark.parametrize('tools', [None, TOOLS])
def test_ours_is_the_template_in_jinja(tools):
  pytest.importorskip('jinja2')
  tokens, ours = Bytes(), ToolTurns()
  jinja = templates.JinjaTemplate(ours.jinja(tokens), {'bos_token': '<s>'})
  for count in range(1, len(CHAT) + 1):
    for prompt in (False, True):
      ids, _ = ours.encode(tokens, CHAT[:count], prompt, tools=tools)
      assert ids.tolist() == jinja.encode(tokens, CHAT[:count], prompt, tools)[0].tolist()
  assert jinja.writes_tools and ours.writes_tools and not Turns().writes_tools


def test_records_of_the_text_are_encoded_alike_and_the_calls_are_learned():
  tokens = Bytes()
  for first in (0, 3):
    ids, mask = ToolTurns().encode(tokens, CHAT, tools=TOOLS, first=first)
    text = tool_turns.as_text(CHAT, TOOLS)
    expected = Turns().encode(tokens, text, first=first + 1)
    assert ids.tolist() == expected[0].tolist() and mask.tolist() == expected[1].tolist()
    calls = ''.join(f'<tool_call>{json.dumps({"name": name, "arguments": arguments})}</tool_call>'
                    for name, arguments in (('find', CALLS[0]['function']['arguments']), ('sum', {})))
    learned = tokens.decode([i for i in ids[mask] if i != tokens.control_id('<|end|>')])
    assert learned == ('Here.' if first else f'So:{calls}Here.')


@pytest.mark.parametrize('message', [
    {'role': 'tool'}, {'role': 'tool', 'content': 5}, {'role': 'assistant', 'tool_calls': 5},
    {'role': 'assistant', 'tool_calls': [5]}, {'role': 'assistant', 'tool_calls': [{'function': {'name': 'find'}}]},
    {'role': 'assistant', 'content': 5, 'tool_calls': CALLS}])
def test_bad_calls_and_results_are_refused(message):
  with pytest.raises(ValueError, match='has to be|needs a function'):
    ToolTurns().encode(Bytes(), [CHAT[1], message])
