"""Calls of a model are executed, and their results sent back, also where nothing can be called."""
import types

from lm.evaluate import tool_use

TOOLS = [{'type': 'function', 'function': {'name': 'double'}}]


def call(name, arguments):
  return {'id': f'id of {arguments}', 'type': 'function', 'function': {'name': name, 'arguments': arguments}}


def test_results_of_calls_are_sent_back():
  replies = [{'tool_calls': [call('double', '{"x": 3}'), call('triple', '{}')]},
             {'content': 'and', 'tool_calls': [call('double', '{"y": 3}'), call('double', 'no')]}, {'content': 'six'}]
  sent, queue = [], list(replies)

  def message(messages, tools):
    sent.append([dict(one) for one in messages])
    assert tools is TOOLS
    return queue.pop(0)
  endpoint, functions = types.SimpleNamespace(message=message), {'double': lambda x: str(2 * x)}
  messages = [{'role': 'user', 'content': 'Twice 3?'}]
  answer, calls = tool_use.answer(endpoint, messages, TOOLS, functions)
  assert answer == 'six' and calls == [('double', {'x': 3}), ('triple', {}), ('double', {'y': 3}), ('double', 'no')]
  results = [(one['tool_call_id'], one['content']) for one in messages if one['role'] == 'tool']
  assert results[:2] == [('id of {"x": 3}', '6'), ('id of {}', 'There is no function triple.')]
  assert all(content.startswith('double cannot be called: ') for _, content in results[2:])
  assert sent[1] == messages[:4] and messages[1]['tool_calls'] == replies[0]['tool_calls'] and len(sent) == 3
  assert messages[-1] == {'role': 'assistant', 'content': 'six'}

  queue += replies[:2]
  answer, calls = tool_use.answer(endpoint, [], TOOLS, functions, most=2)
  assert (answer, len(calls), queue) == ('', 4, [])
