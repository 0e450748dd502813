"""The client of OpenAI, in all its forms, against every endpoint that it knows."""
import asyncio
import struct

import pytest
from helpers.scripted_engine import ScriptedEngine, address_of, text_script

from lm.data.chat.templates import JinjaTemplate

openai = pytest.importorskip('openai')
pytest.importorskip('uvicorn')
pytest.importorskip('prometheus_client')

JINJA = JinjaTemplate("{% for t in tools or [] %}{{ t.function.name }} {% endfor %}{% for m in messages %}"
                      "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}")
MESSAGES = [{'role': 'user', 'content': 'hi'}]
TEXT = 'Now: <tool_call>{"name": "time", "arguments": {"zone": "é"}}</tool_call>'
TOOLS = [{'type': 'function', 'function': {'name': 'time', 'strict': True, 'parameters': {
    'type': 'object', 'properties': {'zone': {'type': 'string'}}, 'required': ['zone'],
    'additionalProperties': False}}}]


@pytest.fixture(scope='module')
def address():
  with address_of(ScriptedEngine(text_script(TEXT)), JINJA, context=512, key='secret') as address:
    yield f'{address}/v1'


@pytest.fixture
def client(address):
  with openai.OpenAI(base_url=address, api_key='secret', max_retries=0) as client:
    yield client


def test_completions_and_models(client):
  assert client.models.list().data[0].id == client.models.retrieve('tiny').id == 'tiny'
  body = {'model': 'tiny', 'prompt': 'a', 'max_tokens': 5, 'logprobs': 2}
  choice = client.completions.create(**body).choices[0]
  chunks = list(client.completions.create(**body, stream=True, stream_options={'include_usage': True}))
  assert ''.join(chunk.choices[0].text for chunk in chunks[:-1]) == choice.text == TEXT[:5]
  assert chunks[-1].usage.completion_tokens == 5 and choice.logprobs.text_offset == [0, 1, 2, 3, 4]


def test_chats_whole_streamed_and_parsed(client):
  body = {'model': 'tiny', 'messages': MESSAGES, 'tools': TOOLS}
  choice = client.chat.completions.create(**body, logprobs=True, top_logprobs=1).choices[0]
  with client.chat.completions.stream(**body) as stream:
    kinds = {event.type for event in stream}
    streamed = stream.get_final_completion().choices[0]
  parsed = client.chat.completions.parse(**body).choices[0]
  assert {'content.done', 'tool_calls.function.arguments.done'} <= kinds
  assert choice.finish_reason == streamed.finish_reason == parsed.finish_reason == 'tool_calls'
  for each in choice, streamed, parsed:
    call, = each.message.tool_calls
    assert (call.function.name, call.function.arguments) == ('time', '{"zone": "é"}')
    assert each.message.content == 'Now: ' and call.id.startswith('call_')
  assert streamed.message.tool_calls[0].function.parsed_arguments == {'zone': 'é'}
  assert choice.logprobs.content[0].token == 'N' and choice.logprobs.content[0].top_logprobs[0].bytes == [78]
  # An answer goes back into the next request as it is.
  history = [*MESSAGES, choice.message, {'role': 'tool', 'tool_call_id': call.id, 'content': '12:00'}]
  assert client.chat.completions.create(**{**body, 'messages': history}).usage.prompt_tokens > 25


def test_responses_whole_and_streamed(client):
  response = client.responses.create(model='tiny', input='hi', instructions='be short')
  with client.responses.stream(model='tiny', input='hi') as stream:
    text = ''.join(event.delta for event in stream if event.type == 'response.output_text.delta')
    assert stream.get_final_response().output_text == text == response.output_text == TEXT
  again = client.responses.create(model='tiny', input=[*MESSAGES, *response.output, *MESSAGES])
  assert again.usage.input_tokens > response.usage.input_tokens


def test_embeddings_are_the_same_numbers_in_both_encodings(client):
  vectors = client.embeddings.create(model='tiny', input=['some', 'words'])   # the client asks for base64
  plain = client.embeddings.create(model='tiny', input=['some', 'words'], encoding_format='float')
  pack = lambda vector: struct.pack(f'{len(vector)}f', *vector)
  assert [pack(each.embedding) for each in vectors.data] == [pack(each.embedding) for each in plain.data]


def test_errors_have_the_classes_of_the_client(client, address):
  for kwargs, error in (({'model': 'other'}, openai.NotFoundError), ({'suffix': 'x'}, openai.BadRequestError)):
    with pytest.raises(error) as raised:
      client.completions.create(**{'model': 'tiny', 'prompt': 'a', **kwargs})
    assert raised.value.param in ('model', 'suffix') and raised.value.code
  with openai.OpenAI(base_url=address, api_key='wrong') as stranger, pytest.raises(openai.AuthenticationError):
    stranger.models.list()


def test_many_asynchronous_streams_at_once(address):
  async def one(client):
    stream = await client.chat.completions.create(model='tiny', messages=MESSAGES, stream=True)
    return ''.join([chunk.choices[0].delta.content or '' async for chunk in stream])

  async def main():
    async with openai.AsyncOpenAI(base_url=address, api_key='secret', max_retries=0) as client:
      return await asyncio.gather(*(one(client) for _ in range(6)))
  assert asyncio.run(main()) == [TEXT] * 6
