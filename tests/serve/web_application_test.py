"""The endpoints: an assembled stream is the whole answer, text comes in whole characters, and refusals are one line."""
import json
import time

import pytest
from helpers.scripted_engine import TOKENS, ScriptedEngine, client_of, text_script

from lm import generate
from lm.data.chat.templates import JinjaTemplate

pytest.importorskip('starlette')
pytest.importorskip('prometheus_client')

TEXT = 'naïve 日本語 🙂 and <the> end.'
CHAT = {'messages': [{'role': 'user', 'content': 'hi'}]}
TOOLS = [{'type': 'function', 'function': {'name': name, 'parameters': {'type': 'object'}}} for name in ('time', 'sum')]
JINJA = JinjaTemplate("{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}"
                      "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}")


def events(text):
  """Returns the JSON of the events of a stream, which ends with [DONE] unless the events have types."""
  frames = [frame.split('data: ', 1)[1] for frame in text.split('\n\n') if frame]
  if frames[-1] == '[DONE]':
    frames.pop()
  return [json.loads(frame) for frame in frames]


def assembled(chunks):
  """Joins chunks as a client does: by the index of the choice, and calls by theirs."""
  choices = {}
  for chunk in chunks:
    for part in chunk['choices']:
      choice = choices.setdefault(part['index'], {'text': '', 'calls': {}, 'logprobs': [], 'finish': None})
      delta = part.get('delta', part)
      choice['text'] += delta.get('text') or delta.get('content') or ''
      for call in delta.get('tool_calls', ()):
        call_of_index = choice['calls'].setdefault(call['index'], {'name': '', 'arguments': ''})
        call_of_index['name'] += call['function'].get('name', '')
        call_of_index['arguments'] += call['function']['arguments']
      if part['logprobs']:
        logprobs = part['logprobs']
        choice['logprobs'] += logprobs.get('content') or list(zip(*(logprobs[name] for name in sorted(logprobs))))
      choice['finish'] = part['finish_reason'] or choice['finish']
  return choices


def whole(body):
  """Returns a whole answer in the form of `assembled`."""
  choices = {}
  for part in body['choices']:
    message, logprobs = part.get('message', part), part['logprobs'] or {}
    choices[part['index']] = {
        'text': message.get('text') or message.get('content') or '', 'finish': part['finish_reason'],
        'calls': dict(enumerate(call['function'] for call in message.get('tool_calls', ()))),
        'logprobs': logprobs.get('content') or list(zip(*(logprobs[name] for name in sorted(logprobs))))}
  return choices


def hermes(*calls):
  return ''.join(f'<tool_call>\n{json.dumps(call)}\n</tool_call>\n' for call in calls)


CASES = {
    'completion': ('/v1/completions', {'prompt': 'ab', 'max_tokens': 90, 'logprobs': 3, 'echo': True}, TEXT),
    'two prompts': ('/v1/completions', {'prompt': ['ab', 'ü'], 'n': 3, 'max_tokens': 9, 'logprobs': 0}, TEXT),
    'stop': ('/v1/completions', {'prompt': 'a', 'max_tokens': 90, 'stop': ['nothing', '語 🙂 a'], 'logprobs': 2}, TEXT),
    'chat': ('/v1/chat/completions', {**CHAT, 'n': 2, 'logprobs': True, 'top_logprobs': 2, 'max_tokens': 90}, TEXT),
    'call': ('/v1/chat/completions', {**CHAT, 'tools': TOOLS, 'logprobs': True}, 'Well ' + hermes(
        {'name': 'time', 'arguments': {'zone': 'é'}}, {'name': 'sum', 'arguments': {'x': [1, 2]}})),
    'no call': ('/v1/chat/completions', {**CHAT, 'tools': TOOLS}, 'a < b <tool_c <tool_call>no</tool_call> c <tool'),
    'no parallel calls': ('/v1/chat/completions', {**CHAT, 'tools': TOOLS, 'parallel_tool_calls': False}, hermes(
        {'name': 'time', 'arguments': {}}, {'name': 'sum', 'arguments': {}}))}


@pytest.mark.parametrize('size', (1, 5))
@pytest.mark.parametrize('case', CASES)
def test_an_assembled_stream_is_the_whole_answer(case, size):
  path, body, text = CASES[case]
  with client_of(ScriptedEngine(text_script(text), size), JINJA, most=20, context=256) as client:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    stream = client.post(path, json={**body, 'stream': True, 'stream_options': {'include_usage': True}})
  assert stream.headers['content-type'].startswith('text/event-stream') and stream.text.endswith('data: [DONE]\n\n')
  *chunks, usage = events(stream.text)
  assert assembled(chunks) == whole(answer.json())
  assert usage['choices'] == [] and usage['usage'] == answer.json()['usage']
  assert len({chunk['id'] for chunk in chunks}) == 1 and len(chunks) > 3 - (size > 1)
  texts = [(part.get('text') or part.get('delta', {}).get('content') or '') for chunk in chunks
           for part in chunk['choices']]
  assert '\ufffd' not in ''.join(texts)


def answer_of(text, path='/v1/completions', size=1, **body):
  with client_of(ScriptedEngine(text_script(text), size), JINJA, context=256) as client:
    answer = client.post(path, json={**({'prompt': 'x', 'max_tokens': 99} if 'comp' in path[:6] else {}), **body})
  assert answer.status_code == 200, answer.text
  return answer.json()


def test_strings_that_no_repetition_goes_across_become_ids():
  samplings = []

  def script(request, choice):
    samplings.append(request.sampling)
    return [TOKENS.eos_id]
  dry = {'prompt': 'x', 'dry_multiplier': 0.8, 'dry_base': 2, 'dry_allowed_length': 3}
  with client_of(ScriptedEngine(script)) as client:
    for body in ({'prompt': 'x'}, dry, {**dry, 'dry_sequence_breakers': ['.', 'a é']}):
      assert client.post('/v1/completions', json=body).status_code == 200
  values = {'dry_multiplier': 0.8, 'dry_base': 2., 'dry_allowed_length': 3}
  expected = [generate.Sampling(**values, dry_sequence_breakers=tuple(ids)) for ids in (b'\n:"*', b'.\xa9')]
  assert samplings == [generate.Sampling(), *expected]


def test_text_ends_before_a_stop_string_and_usage_counts_the_tokens_that_were_drawn():
  with client_of(ScriptedEngine(text_script('abcab🙂!'), 1)) as client:
    ask = lambda **fields: client.post('/v1/completions', json={'prompt': 'x', 'max_tokens': 99, **fields}).json()
    choice = ask(stop='ab🙂', logprobs=1)['choices'][0]
    assert (choice['text'], choice['finish_reason']) == ('abc', 'stop')
    # All tokens that were drawn have their log-probabilities, also those of the stop string, and eos below.
    assert choice['logprobs']['tokens'] == ['a', 'b', 'c', 'a', 'b', *'\ufffd' * 4]
    assert choice['logprobs']['text_offset'] == [0, 1, 2, 3, 3, 3, 3, 3, 3]
    assert ask(logprobs=0)['choices'][0]['logprobs']['tokens'][-1] == '</s>'
    assert ask()['usage'] == {'prompt_tokens': 2, 'completion_tokens': 11, 'total_tokens': 13,
                              'prompt_tokens_details': {'cached_tokens': 0}}
    cut = ask(max_tokens=7)['choices'][0]   # within a character
    assert (cut['text'], cut['finish_reason']) == ('abcab', 'length')
    assert ask(stop_token_ids=[ord('c')])['choices'][0]['text'] == 'ab'


def test_an_echo_scores_the_prompt_and_offsets_are_characters():
  with client_of(ScriptedEngine(text_script('né'))) as client:
    body = {'prompt': 'ü🙂', 'echo': True, 'logprobs': 1, 'max_tokens': 3}
    choice = client.post('/v1/completions', json=body).json()['choices'][0]
    by_ids = {**body, 'prompt': [TOKENS.bos_id, *'ü🙂'.encode()]}
    assert client.post('/v1/completions', json=by_ids).json()['choices'][0] == choice
    scored = client.post('/v1/completions', json={**body, 'max_tokens': 0}).json()['choices'][0]
    streamed = events(client.post('/v1/completions', json={**body, 'stream': True}).text)
  logprobs = choice['logprobs']
  assert choice['text'] == 'ü🙂né' and streamed[0]['choices'][0]['text'] == 'ü🙂'
  assert logprobs['text_offset'] == [0, 0, 0, 1, 1, 1, 1, 2, 3, 3] and logprobs['tokens'][0] == '<s>'
  assert logprobs['token_logprobs'][0] is None and logprobs['top_logprobs'][0] is None
  expected = [-.25 * (1 + byte % 7) for byte in 'ü🙂'.encode()]
  assert logprobs['token_logprobs'][1:7] == expected
  assert scored['text'] == 'ü🙂' and scored['logprobs']['token_logprobs'][1:] == expected


def test_calls_of_tools_and_how_answers_with_them_end():
  message = lambda case: answer_of(CASES[case][2], CASES[case][0], **CASES[case][1])['choices'][0]
  two = message('call')
  assert two['finish_reason'] == 'tool_calls' and two['message']['content'] == 'Well '
  calls = [call['function'] for call in two['message']['tool_calls']]
  assert calls == [{'name': 'time', 'arguments': '{"zone": "é"}'}, {'name': 'sum', 'arguments': '{"x": [1, 2]}'}]
  assert message('no call')['message'] == {'role': 'assistant', 'refusal': None, 'content': CASES['no call'][2]}
  one = message('no parallel calls')['message']
  assert [call['function']['name'] for call in one['tool_calls']] == ['time'] and one['content'] is None


def test_responses_end_with_an_event_that_holds_the_whole_answer():
  with client_of(ScriptedEngine(text_script(TEXT), 3)) as client:
    body = {'input': [{'role': 'user', 'content': [{'type': 'input_text', 'text': 'hi'}]}], 'instructions': 'short'}
    answer = client.post('/v1/responses', json=body).json()
    stream = events(client.post('/v1/responses', json={**body, 'stream': True}).text)
    cut = client.post('/v1/responses', json={'input': 'hi', 'max_output_tokens': 2}).json()
  assert [event['sequence_number'] for event in stream] == list(range(len(stream)))
  text = ''.join(event['delta'] for event in stream if event['type'] == 'response.output_text.delta')
  last = stream[-1]
  assert last['type'] == 'response.completed' and text == TEXT == last['response']['output'][0]['content'][0]['text']
  names = 'id', 'created_at', 'output'
  without = lambda response: {name: value for name, value in response.items() if name not in names}
  assert without(last['response']) == without(answer) and answer['output'][0]['content'][0]['text'] == TEXT
  assert cut['status'] == 'incomplete' and cut['incomplete_details'] == {'reason': 'max_output_tokens'}


def test_tokens_scores_embeddings_and_the_list_of_models():
  with client_of(ScriptedEngine(text_script('a'))) as client:
    post = lambda path, **body: client.post(path, json=body).json()
    tokens = post('/tokenize', prompt='hé', return_token_strs=True)
    assert tokens == {'count': 4, 'max_model_len': 128, 'tokens': [256, 104, 0xc3, 0xa9],
                      'token_strs': ['<s>', 'h', '\ufffd', '\ufffd']}
    assert post('/detokenize', tokens=tokens['tokens']) == {'prompt': 'hé'}
    assert post('/tokenize', prompt='h', add_special_tokens=False)['tokens'] == [104]
    user, end, assistant = (TOKENS.control_id(f'<|{name}|>') for name in ('user', 'end', 'assistant'))
    assert post('/tokenize', **CHAT)['tokens'] == [256, user, *b'hi', end, assistant]
    scores = post('/v1/score', text_1='ab', text_2=['c', '', 'de'])['data']
    value = lambda text: sum(-.25 * (1 + byte % 7) for byte in text.encode())
    assert [(each['score'], each['tokens']) for each in scores] == [(value('c'), 1), (0, 0), (value('de'), 2)]
    vectors = [each['embedding'] for each in post('/v1/embeddings', input=['some words', 'some words', 'x'])['data']]
    assert vectors[0] == vectors[1] != vectors[2] and abs(sum(x * x for x in vectors[2]) - 1) < 1e-5
    model, = client.get('/v1/models').json()['data']
    assert model == client.get('/v1/models/tiny').json() and model['id'] == 'tiny' and model['has_chat_template']
    metrics = client.get('/metrics').text
    assert 'vllm:prompt_tokens_total{engine="0",model_name="tiny"} 12.0' in metrics
    assert client.get('/health').status_code == 200 and client.get('/version').json()['version']


def test_the_times_of_an_answer_add_up_and_drafts_are_counted():
  engine = ScriptedEngine(text_script('abcdef'), wait=lambda: time.sleep(.002))
  engine.drafter = drafts = generate.PromptLookup(2)
  with client_of(engine) as client:
    client.post('/v1/completions', json={'prompt': 'a', 'max_tokens': 5, 'n': 3})
    drafts.passes, drafts.proposed, drafts.accepted = 5, 9, 7
    client.get('/metrics')
    drafts.accepted = 8
    lines = client.get('/metrics').text.splitlines()
  total = lambda name: float(next(line for line in lines if line.startswith(f'vllm:{name}_seconds_sum')).split()[1])
  count = lambda name: float(next(line for line in lines if line.startswith(f'vllm:{name}_seconds_count')).split()[1])
  queue, prefill, decode = (total(f'request_{name}_time') for name in ('queue', 'prefill', 'decode'))
  assert queue > 0 and prefill > .002 and decode > 3 * .008   # each step takes 2 ms
  assert queue + prefill == pytest.approx(total('time_to_first_token'), abs=1e-9)
  assert queue + prefill + decode == pytest.approx(total('e2e_request_latency'), abs=1e-9)
  assert 3 * .008 < total('inter_token_latency') <= decode and count('inter_token_latency') == 3 * 4
  for name, expected in (('drafts', 5), ('draft_tokens', 9), ('accepted_tokens', 8)):
    assert f'vllm:spec_decode_num_{name}_total{{engine="0",model_name="tiny"}} {expected}.0' in lines
  assert {count(f'request_{name}_time') for name in ('queue', 'prefill', 'decode')} == {3}


@pytest.mark.parametrize(('path', 'body', 'status', 'words'), [
    ('/v1/completions', {'prompt': 'a', 'model': 'other'}, 404, "'other' is not served here"),
    ('/v1/completions', {'prompt': 'a' * 120, 'max_tokens': 9}, 400, '121 tokens, and with max_tokens=9'),
    ('/v1/completions', {'prompt': [999]}, 400, 'token id 999'), ('/detokenize', {'tokens': [999]}, 400, '999'),
    ('/v1/completions', {'prompt': 'a', 'logit_bias': {'999': 1}}, 400, '999'),
    ('/v1/completions', {'prompt': ['a'] * 13}, 400, '13 answers'),
    ('/v1/completions', {'prompt': 'a', 'logit_bias': {str(i): 1 for i in range(301)}}, 400, 'at most 300'),
    ('/v1/chat/completions', {**CHAT, 'stop_token_ids': [*range(16)]}, 400, 'stop_token_ids'),   # and the end of a turn
    ('/v1/completions', {'prompt': 'a', 'max_tokens': 51}, 400, 'max_tokens=51'),
    ('/v1/embeddings', {'input': 'a' * 128}, 400, '129 tokens'),
    ('/v1/completions', b'\xff{', 400, 'no JSON'), ('/v1/completions', b'', 400, 'no JSON'),
    ('/v1/responses', b'{"input": "a", "text": {"format": {"type": "text", "x": NaN}}}', 400, 'NaN'),
    ('/v1/completions', b'[' * 9000, 400, 'no JSON'), ('/v1/completions', b'"' + b'a' * 70000 + b'"', 413, '65,536'),
    ('/v1/nothing', {}, 404, '/openapi.json'), ('/health', {}, 405, 'Method Not Allowed'),
    ('/v1/chat/completions', {**CHAT, 'tools': TOOLS}, 400, 'does not write tools')])
def test_a_bad_request_gets_one_clear_line_in_the_form_of_openai(path, body, status, words):
  with client_of(ScriptedEngine(text_script('a')), most_bytes=65536, most_tokens=50) as client:
    answer = client.post(path, **({'content': body} if isinstance(body, bytes) else {'json': body}))
  error = answer.json()['error']
  assert answer.status_code == status and words in error['message'] and '\n' not in error['message']
  assert set(error) == {'message', 'type', 'param', 'code'}


def test_a_request_names_an_adapter_as_its_model():
  script = lambda request, choice: [*f'by {request.adapter}'.encode(), TOKENS.eos_id]
  with client_of(engine := ScriptedEngine(script), None, adapters={'sql': None, 'talk': JINJA}) as client:
    cards = client.get('/v1/models').json()['data']
    assert [(card['id'], card['parent'], card['has_chat_template']) for card in cards] == [
        ('tiny', None, False), ('sql', 'tiny', False), ('talk', 'tiny', True)]
    assert client.get('/v1/models/sql').json() == cards[1]
    for name, served, text in ((None, 'tiny', 'by 0'), ('tiny', 'tiny', 'by 0'), ('sql', 'sql', 'by 1')):
      answer = client.post('/v1/completions', json={'prompt': 'x', 'model': name}).json()
      assert (answer['model'], answer['choices'][0]['text']) == (served, text)
    answer = client.post('/v1/chat/completions', json={**CHAT, 'model': 'talk'}).json()
    assert (answer['model'], answer['choices'][0]['message']['content']) == ('talk', 'by 2')
    answer = client.post('/v1/responses', json={'input': 'hi', 'model': 'talk'}).json()
    assert (answer['model'], answer['output'][0]['content'][0]['text']) == ('talk', 'by 2')
    refused = client.post('/v1/chat/completions', json={**CHAT, 'model': 'sql'})
    assert refused.json()['error']['code'] == 'no_chat_template'
    client.post('/v1/score', json={'text_1': 'a', 'text_2': 'b', 'model': 'sql'})
    assert list(engine._starts)[-1].adapter == 1
    refused = client.post('/v1/completions', json={'prompt': 'x', 'model': 'other'})
    assert refused.status_code == 404 and "'tiny', 'sql', 'talk'" in refused.json()['error']['message']


def test_a_model_without_a_template_says_how_to_give_one():
  with client_of(ScriptedEngine(text_script('a')), None) as client:
    error = client.post('/v1/chat/completions', json=CHAT).json()['error']
    assert error['code'] == 'no_chat_template' and 'chat_template.jinja' in error['message']
    assert not client.get('/v1/models').json()['data'][0]['has_chat_template']
    assert client.post('/v1/completions', json={'prompt': 'a'}).status_code == 200


def test_a_key_origins_and_names_of_the_host_are_checked():
  with client_of(ScriptedEngine(text_script('a')), key='secret', origins=('https://a.example',)) as client:
    ask = lambda **headers: client.post('/v1/completions', json={'prompt': 'a'}, headers=headers)
    assert ask().status_code == ask(Authorization='Bearer secreT').status_code == 401
    key = {'Authorization': 'Bearer secret'}
    assert ask(**key, **{'X-Request-Id': 'mine'}).headers['x-request-id'] == 'mine'
    assert ask(**key, Origin='http://testserver').status_code == 200
    assert 'secret' not in str(ask(**key, Origin='https://b.example').json()) and ask(
        **key, Origin='https://b.example').status_code == 403
    allowed = ask(**key, Origin='https://a.example')
    assert allowed.status_code == 200 and allowed.headers['access-control-allow-origin'] == 'https://a.example'
    assert client.options('/v1/models', headers={'Origin': 'https://a.example'}).status_code == 204
    assert client.get('/health').status_code == client.get('/').status_code == 200
  with client_of(ScriptedEngine(text_script('a')), hosts=('127.0.0.1', 'localhost')) as client:
    assert client.get('/health').status_code == 403
    assert client.get('/health', headers={'Host': 'localhost:8000'}).status_code == 200
