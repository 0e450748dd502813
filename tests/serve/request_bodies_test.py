"""Bodies are read or refused, unknown fields and wrong values by their names; nothing is ignored."""
import json
import random
import re

import pytest

from lm.serve import openapi, request_bodies
from lm.serve.api_errors import ApiError
from lm.serve.output_format import OutputFormat

READERS = {'/v1/completions': request_bodies.read_completion, '/v1/chat/completions': request_bodies.read_chat,
           '/v1/responses': request_bodies.read_response, '/v1/embeddings': request_bodies.read_embeddings,
           '/v1/score': request_bodies.read_score, '/tokenize': request_bodies.read_tokenize,
           '/detokenize': request_bodies.read_detokenize}
SMALLEST = {'/v1/completions': {'prompt': 'a'},
            '/v1/chat/completions': {'messages': [{'role': 'user', 'content': 'a'}]},
            '/v1/responses': {'input': 'a'}, '/v1/embeddings': {'input': 'a'}, '/tokenize': {'prompt': 'a'},
            '/v1/score': {'text_1': 'a', 'text_2': 'b'}, '/detokenize': {'tokens': [1]}}
TOOL = {'type': 'function', 'function': {'name': 'get_time', 'parameters': {
    'type': 'object', 'properties': {'zone': {'type': 'string'}}}}}


def refusal(read, body):
  with pytest.raises(ApiError) as error:
    read(body)
  assert error.value.status == 400
  return error.value


@pytest.mark.parametrize('path', READERS)
def test_the_smallest_body_is_read_and_unknown_fields_are_all_named(path):
  READERS[path](SMALLEST[path])
  error = refusal(READERS[path], {**SMALLEST[path], 'frobnicate': 1, 'audio': {}})
  assert 'frobnicate' in str(error) and 'audio' in str(error) and error.param == 'frobnicate'
  for body in None, [], 'x', 3:
    assert 'JSON object' in str(refusal(READERS[path], body))
  for name in SMALLEST[path]:
    assert name in str(refusal(READERS[path], {key: x for key, x in SMALLEST[path].items() if key != name}))


@pytest.mark.parametrize(('field', 'value'), [
    ('temperature', -.1), ('temperature', 2.1), ('temperature', '1'), ('temperature', float('nan')), ('top_p', 0),
    ('top_p', 1.5), ('top_k', -2), ('top_k', .5), ('n', 0), ('n', True), ('n', 10 ** 400), ('seed', -1),
    ('stop', ['']), ('stop', 5), ('stop', ['a'] * 17), ('logit_bias', {'a': 1}), ('logit_bias', {'1': 101}),
    ('logprobs', 21), ('max_tokens', -1), ('stream', 1), ('prompt', []), ('prompt', ['a', 1]), ('prompt', '\ud800'),
    ('stream_options', {'include_usage': True}), ('stop_token_ids', [-1]), ('presence_penalty', 3), ('best_of', 3),
    ('dry_base', .5), ('response_format', {'type': 'xml'}), ('structured_outputs', {'json': {}, 'regex': 'a'})])
def test_a_wrong_value_is_refused_by_the_name_of_its_field(field, value):
  assert field in str(refusal(request_bodies.read_completion, {'prompt': 'a', field: value}))


def test_null_is_the_default():
  for path, read in READERS.items():
    fields = openapi.document()['paths'][path]['post']['requestBody']['content']['application/json']['schema']
    nothing = {name: None for name in fields['properties'] if name not in SMALLEST[path]}
    assert read({**SMALLEST[path], **nothing}) == read(SMALLEST[path])


def test_fields_that_contradict_one_another_are_refused():
  chat, completion = SMALLEST['/v1/chat/completions'], SMALLEST['/v1/completions']
  for read, body, word in (
      (request_bodies.read_completion, {**completion, 'n': 2, 'temperature': 0}, 'equal'),
      (request_bodies.read_completion, {**completion, 'max_tokens': 0}, 'echo'),
      (request_bodies.read_completion, {**completion, 'min_tokens': 9, 'max_tokens': 5}, 'min_tokens'),
      (request_bodies.read_completion, {**completion, 'min_tokens': 1, 'max_tokens': 5, 'stop': 'a'}, 'stop'),
      (request_bodies.read_chat, {**chat, 'max_tokens': 1, 'max_completion_tokens': 2}, 'differ'),
      (request_bodies.read_chat, {**chat, 'top_logprobs': 2}, 'logprobs=true'),
      (request_bodies.read_chat, {**chat, 'tool_choice': 'required'}, 'tools'),
      (request_bodies.read_chat, {**chat, 'tools': [TOOL], 'tool_choice': {
          'type': 'function', 'function': {'name': 'other'}}}, 'get_time'),
      (request_bodies.read_chat, {**chat, 'tools': [TOOL, TOOL]}, 'two tools'),
      (request_bodies.read_score, {'text_1': ['a', 'b'], 'text_2': ['c', 'd', 'e']}, 'text_1'),
      (request_bodies.read_tokenize, {'prompt': 'a', 'messages': chat['messages']}, 'either'),
      (request_bodies.read_tokenize, {'prompt': 'a', 'add_generation_prompt': False}, 'add_generation_prompt'),
      (request_bodies.read_tokenize, {**chat, 'add_special_tokens': True}, 'add_special_tokens')):
    assert word in str(refusal(read, body))


def test_messages_are_text_and_an_image_is_refused():
  parts = [{'type': 'text', 'text': 'a'}, {'type': 'text', 'text': 'b'}]
  call = {'id': 'call_1', 'type': 'function', 'function': {'name': 'f', 'arguments': '{"x": 1}'}}
  body = request_bodies.read_chat({'messages': [
      {'role': 'developer', 'content': 'be short'}, {'role': 'user', 'content': parts},
      {'role': 'assistant', 'content': None, 'tool_calls': [call], 'refusal': None},
      {'role': 'tool', 'tool_call_id': 'call_1', 'content': '3'}]})
  assert body.messages == [
      {'role': 'system', 'content': 'be short'}, {'role': 'user', 'content': 'ab'},
      {'role': 'assistant', 'content': '', 'tool_calls': [
          {'id': 'call_1', 'type': 'function', 'function': {'name': 'f', 'arguments': {'x': 1}}}]},
      {'role': 'tool', 'content': '3', 'tool_call_id': 'call_1'}]
  image = {'type': 'image_url', 'image_url': {'url': 'http://127.0.0.1/a.png'}}
  for message, place in (({'role': 'user', 'content': [image]}, 'messages[0].content'),
                         ({'role': 'robot', 'content': 'a'}, 'messages[0].role'),
                         ({'role': 'user'}, 'messages[0].content'),
                         ({'role': 'user', 'content': 'a', 'tool_calls': [call]}, 'messages[0].tool_calls')):
    assert refusal(request_bodies.read_chat, {'messages': [message]}).param == place


def test_a_forced_call_is_a_format():
  chat = {**SMALLEST['/v1/chat/completions'], 'tools': [TOOL]}
  named = {'type': 'function', 'function': {'name': 'get_time'}}
  assert request_bodies.read_chat(chat).format is None
  body = request_bodies.read_chat({**chat, 'tool_choice': named})
  assert json.loads(body.format.text) == TOOL['function']['parameters'] and body.format.kind == 'json'
  required = json.loads(request_bodies.read_chat({**chat, 'tool_choice': 'required'}).format.text)
  assert required['anyOf'][0]['properties']['name'] == {'const': 'get_time'}
  for name in 'none', 'auto', 'required':   # names of functions, and not choices
    tools = [{'type': 'function', 'function': {'name': name, 'parameters': {'title': name}}}, TOOL]
    body = request_bodies.read_chat({**chat, 'tools': tools, 'tool_choice': {'type': 'function', 'function': {
        'name': name}}})
    assert body.tool_use.named == name and json.loads(body.format.text) == {'title': name}


def test_formats_of_answers():
  read = lambda **fields: request_bodies.read_completion({'prompt': 'a', **fields}).format
  schema = {'type': 'object', 'properties': {'a': {'type': 'integer'}}}
  form = {'type': 'json_schema', 'json_schema': {'name': 'x', 'schema': schema, 'strict': True}}
  assert json.loads(read(response_format=form).text) == schema
  assert read(response_format={'type': 'text'}) is None
  for form, name in (({'type': 'text', 'strict': True}, 'response_format.strict'),
                     ({'type': 'json_object', 'schema': schema}, 'response_format.schema'),
                     ({'type': 'json_schema', 'json_schema': {'shema': schema}}, 'response_format.json_schema.shema'),
                     ({'type': 'json_schema', 'json_schema': {'schema': {'title': '\ud800'}}},
                      'response_format.json_schema.schema'), ({}, 'response_format.type')):
    assert refusal(request_bodies.read_completion, {'prompt': 'a', 'response_format': form}).param == name
  assert read(structured_outputs={'regex': 'a+'}) == OutputFormat('regex', 'a+')
  choice = read(structured_outputs={'choice': ['a', 'b".']})
  assert choice.kind == 'regex' and [bool(re.fullmatch(choice.text, text)) for text in ('a', 'b".', 'b"x', 'ab')] == [
      True, True, False, False]


def mutated(rng, body):
  """Returns a body with something in it replaced by a value of another kind, or with another name."""
  wrong = [None, True, -1, 1.5, 1e300, '', 'x' * 300, [], {}, [[]], [{}], '\ud800', {'a': {'b': []}}, 10 ** 30]
  if isinstance(body, dict) and body and rng.random() < .8:
    name = rng.choice(sorted(body))
    value = mutated(rng, body[name])
    others = {key: x for key, x in body.items() if key != name}
    return {**others, rng.choice([name, name, name, '\ud800' + name]): value}
  if isinstance(body, list) and body and rng.random() < .8:
    place = rng.randrange(len(body))
    return [*body[:place], mutated(rng, body[place]), *body[place + 1:]]
  return rng.choice(wrong)


def test_a_thousand_damaged_bodies_are_read_or_refused_with_status_400():
  rng, refused = random.Random(0), 0
  call = {'id': 'c', 'type': 'function', 'function': {'name': 'f', 'arguments': '{}'}}
  full = {**SMALLEST, '/v1/chat/completions': {
      'messages': [{'role': 'user', 'content': [{'type': 'text', 'text': 'a'}]},
                   {'role': 'assistant', 'content': 'b', 'tool_calls': [call]}],
      'tools': [TOOL], 'tool_choice': {'type': 'function', 'function': {'name': 'get_time'}}, 'logit_bias': {'1': 2},
      'stop': ['a'], 'stream': True, 'stream_options': {'include_usage': True}},
          '/v1/responses': {'input': [{'role': 'user', 'content': [{'type': 'input_text', 'text': 'a'}]}],
                            'text': {'format': {'type': 'json_schema', 'name': 'a', 'schema': {}}}}}
  for _ in range(1000):
    path = rng.choice(sorted(full))
    body = mutated(rng, full[path])
    try:
      READERS[path](body)
    except ApiError as error:
      assert error.status == 400 and error.message
      json.dumps(error.body(), ensure_ascii=False).encode()
      refused += 1
  assert 500 < refused < 1000
