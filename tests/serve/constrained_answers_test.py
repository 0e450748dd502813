"""The server constrains answers: formats, forced calls, streams of them, and what is refused."""
import json
import re

import pytest
from helpers import decoders
from helpers.scripted_engine import TOKENS, ScriptedEngine, client_of, text_script

from lm import generate
from lm.data.chat.templates import JinjaTemplate
from lm.models import transformer

pytest.importorskip('starlette')
pytest.importorskip('prometheus_client')
pytest.importorskip('llguidance')
pytestmark = pytest.mark.slow

POINT = {'type': 'object', 'properties': {'x': {'$ref': '#/$defs/Small'}, 'y': {'type': 'boolean'}},
         'required': ['x', 'y'], 'additionalProperties': False, '$defs': {'Small': {'enum': [1, 2, 3]}}}
TOOLS = [{'type': 'function', 'function': {'name': 'move', 'parameters': POINT}},
         {'type': 'function', 'function': {'name': 'wait'}}]
TEMPLATE = JinjaTemplate("{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}"
                         "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}")
CHAT = {'messages': [{'role': 'user', 'content': 'hi'}], 'seed': 4}


@pytest.fixture(scope='module')
def client():
  model, params = decoders.make(lambda *sizes, max_length: transformer.llama(
      TOKENS.vocab_size + 5, *sizes[1:], max_length=512))
  engine = generate.Engine(model, model.unstack(params), 512, TOKENS.vocab_size, TOKENS.eos_ids)
  scheduler = generate.Scheduler(engine, 4, (16, 1), tokens_per_step=4)
  scheduler.warm_up()
  with client_of(scheduler, TEMPLATE, 64, (model, params), TOKENS, 512) as client:
    yield client
  assert scheduler.compilations == 0


def is_point(text):
  value = json.loads(text)
  return set(value) == {'x', 'y'} and value['x'] in (1, 2, 3) and isinstance(value['y'], bool)


def chat(client, **fields):
  """Returns the choices of an answer, after a check that its stream joins to them."""
  answer = client.post('/v1/chat/completions', json={**CHAT, **fields}).json()
  stream = client.post('/v1/chat/completions', json={**CHAT, **fields, 'stream': True}).text
  deltas = [choice for frame in stream.split('\n\n') if frame.startswith('data: {')
            for choice in json.loads(frame[6:])['choices']]
  for choice in answer['choices']:
    own = [part for part in deltas if part['index'] == choice['index']]
    assert ''.join(part['delta'].get('content') or '' for part in own) == (choice['message']['content'] or '')
    arguments = ''.join(call['function']['arguments'] for part in own for call in part['delta'].get('tool_calls', ()))
    assert arguments == ''.join(call['function']['arguments'] for call in choice['message'].get('tool_calls', ()))
    assert own[-1]['finish_reason'] == choice['finish_reason']
  return answer['choices']


def test_chats_have_the_form_of_a_schema(client):
  form = {'type': 'json_schema', 'json_schema': {'name': 'point', 'schema': POINT, 'strict': True}}
  for choice in chat(client, response_format=form, n=8):
    assert is_point(choice['message']['content']) and choice['finish_reason'] == 'stop'
  fields = {'input': 'hi', 'text': {'format': {'type': 'json_schema', 'name': 'point', 'schema': POINT}}}
  answer = client.post('/v1/responses', json=fields).json()
  assert is_point(answer['output'][0]['content'][0]['text'])
  whole = chat(client, response_format={'type': 'json_object'}, n=4, max_tokens=400)
  assert all(choice['message']['content'].startswith('{') for choice in whole)
  assert all(isinstance(json.loads(choice['message']['content']), dict) for choice in whole
             if choice['finish_reason'] == 'stop')


def test_forced_calls_have_arguments_of_their_schema(client):
  for choice in chat(client, tools=TOOLS, tool_choice='required', n=8, max_tokens=300):
    if choice['finish_reason'] != 'length':   # of the tool without a schema, arguments may be of any length
      call, = choice['message']['tool_calls']
      assert call['function']['name'] in ('move', 'wait')
      assert call['function']['name'] == 'wait' or is_point(call['function']['arguments'])
      assert choice['finish_reason'] == 'tool_calls'
  for choice in chat(client, tools=TOOLS, tool_choice={'type': 'function', 'function': {'name': 'move'}}, n=8):
    call, = choice['message']['tool_calls']
    assert call['function']['name'] == 'move' and is_point(call['function']['arguments'])
    assert choice['finish_reason'] == 'stop' and not choice['message']['content']


@pytest.mark.parametrize('outputs, check', [
    ({'regex': '(ab|é)+[0-9]'}, lambda text: re.fullmatch('(ab|é)+[0-9]', text)),
    ({'choice': ['no "x"', 'yes\n', '日本']}, ['no "x"', 'yes\n', '日本'].__contains__),
    ({'grammar': 'start: "(" start ")" | "."'}, lambda text: re.fullmatch(r'\(*\.\)*', text)),
    ({'json': POINT}, is_point), ({'json': json.dumps(POINT)}, is_point)])
def test_structured_outputs(client, outputs, check):
  body = {'prompt': 'answer: ', 'max_tokens': 300, 'n': 6, 'seed': 2, 'structured_outputs': outputs}
  for choice in client.post('/v1/completions', json=body).json()['choices']:
    assert choice['finish_reason'] == 'stop' and check(choice['text'])


@pytest.mark.parametrize('fields, words', [
    ({'structured_outputs': {'regex': '('}}, 'unclosed group'),
    ({'structured_outputs': {'grammar': 'start: x'}}, 'unknown name'),
    ({'structured_outputs': {'json': '{'}}, 'must be a JSON schema'),
    ({'structured_outputs': {'choice': []}}, 'at least'),
    ({'response_format': {'type': 'json_schema', 'json_schema': {'schema': {'type': 'pair'}}}}, 'Invalid type: pair'),
    ({'response_format': {'type': 'json_schema', 'json_schema': {'schema': {'title': 'x' * 70000}}}},
     'the JSON schema has 70,013 characters, and the server takes 65,536'),
    ({'structured_outputs': {'regex': 'a' * 65537}}, 'expression has 65,537 characters, and the server takes 65,536'),
    ({'structured_outputs': {'choice': ['a' * 40000] * 2}}, '80,001'),
    ({'structured_outputs': {'regex': '\ud800'}}, 'surrogate'),
    ({'structured_outputs': {'regex': 'a'}, 'min_tokens': 2}, 'min_tokens=2')])
def test_what_cannot_constrain_an_answer_is_refused(client, fields, words):
  answer = client.post('/v1/completions', content=json.dumps({'prompt': 'a', **fields}))   # surrogates are escaped
  assert answer.status_code == 400 and words in answer.json()['error']['message']
  assert '\n' not in answer.json()['error']['message']
  assert client.post('/v1/completions', json={'prompt': 'a', 'max_tokens': 2}).status_code == 200


class DeadEnd(ScriptedEngine):
  """Its answers end because of their grammar."""

  def _event(self, request, choice):
    event = super()._event(request, choice)
    return event._replace(finish_reason=event.finish_reason and 'grammar')


@pytest.mark.parametrize('stream', (False, True))
def test_an_answer_whose_grammar_cannot_go_on_is_an_error_and_frees_its_rows(stream):
  engine = DeadEnd(text_script('ab'))
  with client_of(engine) as client:
    answer = client.post('/v1/completions', json={'prompt': 'a', 'max_tokens': 9, 'n': 2, 'stream': stream})
    error = json.loads(answer.text.split('data: ')[-1] if stream else answer.text)['error']
    assert 'parser of its format' in error['message'] and answer.status_code == (200 if stream else 400)
    assert client.get('/health').status_code == 200
  assert not engine.is_busy
