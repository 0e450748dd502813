"""The bodies of requests, one class for each endpoint: pure functions from JSON that know neither HTTP nor a model."""
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from lm import generate
from lm.serve import body_fields, chat_messages, output_format, sampling_fields
from lm.serve.api_errors import bad_request
from lm.serve.body_fields import Field, boolean, integer, read_fields, shown
from lm.serve.chat_messages import ToolUse
from lm.serve.output_format import OutputFormat
from lm.serve.sampling_fields import MOST_LOGPROBS, MOST_TOKENS, AnswerSettings, read_settings, read_streaming

MOST_TEXTS = 256   # prompts, inputs or pairs of a body
_MODEL: Mapping[str, Field] = {'model': body_fields.TEXT}
_COUNT = integer(1, MOST_TOKENS)


def _list(value: Any) -> Sequence[Any]:
  if not isinstance(value, list):
    raise ValueError('must be a list')
  return value


def _input(value: Any) -> Any:
  return body_fields.text(value) if isinstance(value, str) else body_fields.objects(value)


COMPLETION: Mapping[str, Field] = {
    **_MODEL, 'prompt': body_fields.PROMPTS.needed(), 'max_tokens': integer(0, MOST_TOKENS),
    'echo': boolean(), 'logprobs': integer(0, MOST_LOGPROBS), 'best_of': integer(1, sampling_fields.MOST_CHOICES),
    'add_special_tokens': boolean(True), **sampling_fields.SAMPLING, **sampling_fields.STREAMING,
    **output_format.FORMATS, **sampling_fields.LABELS}
CHAT: Mapping[str, Field] = {
    **_MODEL, 'messages': body_fields.OBJECTS.needed(), 'max_tokens': _COUNT, 'max_completion_tokens': _COUNT,
    'logprobs': boolean(), 'top_logprobs': integer(0, MOST_LOGPROBS),
    'tools': Field({'type': 'array', 'items': {'type': 'object'}}, _list),
    'tool_choice': Field({'anyOf': [{'enum': ['none', 'auto', 'required']}, {'type': 'object'}]}, lambda value: value),
    'parallel_tool_calls': boolean(True), **sampling_fields.SAMPLING, **sampling_fields.STREAMING,
    **output_format.FORMATS, **sampling_fields.LABELS}
RESPONSE: Mapping[str, Field] = {
    **_MODEL, 'input': Field({'anyOf': [{'type': 'string'}, {'type': 'array', 'minItems': 1,
                                                              'items': {'type': 'object'}}]},
                             _input).needed(),
    'instructions': body_fields.TEXT, 'max_output_tokens': _COUNT,
    'temperature': sampling_fields.SAMPLING['temperature'], 'top_p': sampling_fields.SAMPLING['top_p'],
    'text': body_fields.nested('text', {'format': body_fields.ANY_OBJECT}), 'stream': boolean(),
    # Nothing is stored, and an input that is too long is refused; OpenAI's other values ask for more.
    'store': body_fields.one_of(False).otherwise(False),
    'truncation': body_fields.one_of('disabled').otherwise('disabled'), **sampling_fields.LABELS}
TOKENIZE: Mapping[str, Field] = {
    **_MODEL, 'prompt': body_fields.TEXT, 'messages': body_fields.OBJECTS,
    'add_special_tokens': boolean().otherwise(None), 'add_generation_prompt': boolean().otherwise(None),
    'return_token_strs': boolean()}
DETOKENIZE: Mapping[str, Field] = {**_MODEL, 'tokens': body_fields.IDS.needed()}
EMBEDDINGS: Mapping[str, Field] = {
    **_MODEL, 'input': body_fields.PROMPTS.needed(),
    'encoding_format': body_fields.one_of('float', 'base64').otherwise('float'), **sampling_fields.LABELS}
SCORE: Mapping[str, Field] = {**_MODEL, 'text_1': body_fields.PROMPTS.needed(), 'text_2': body_fields.PROMPTS.needed()}


def _few(texts: Sequence[Any], name: str) -> Sequence[Any]:
  if len(texts) > MOST_TEXTS:
    raise bad_request(f'{name} has {len(texts)} texts; send at most {MOST_TEXTS} at a time', name)
  return texts


@dataclasses.dataclass(frozen=True)
class CompletionBody:
  """Texts to continue. With `max_tokens=0` and `echo`, they are only scored; None is up to 16, as OpenAI has it."""
  model: str | None
  prompts: Sequence[str | tuple[int, ...]]
  adds_special_tokens: bool
  echo: bool
  settings: AnswerSettings
  format: OutputFormat | None
  stream: bool
  stream_usage: bool


def read_completion(body: Any) -> CompletionBody:
  """Returns the body of /v1/completions; ApiError where it is wrong."""
  values = read_fields(body, COMPLETION)
  settings = read_settings(values, values['max_tokens'], values['logprobs'])
  if values['best_of'] not in (None, settings.n):
    raise bad_request(f'best_of={values["best_of"]} is not supported; leave it out, or give n={settings.n}', 'best_of')
  if values['max_tokens'] == 0 and not values['echo']:
    raise bad_request('max_tokens=0 is for echo=true, which scores the prompt; give at least 1', 'max_tokens')
  return CompletionBody(values['model'], _few(values['prompt'], 'prompt'), values['add_special_tokens'],
                        values['echo'], settings, output_format.read_format(values), *read_streaming(values))


@dataclasses.dataclass(frozen=True)
class ChatBody:
  """A conversation to continue."""
  model: str | None
  messages: Sequence[Mapping[str, Any]]
  tool_use: ToolUse
  settings: AnswerSettings
  format: OutputFormat | None
  stream: bool = False
  stream_usage: bool = False


def read_chat(body: Any) -> ChatBody:
  """Returns the body of /v1/chat/completions; ApiError where it is wrong."""
  values = read_fields(body, CHAT)
  counts = {values['max_tokens'], values['max_completion_tokens']} - {None}
  if len(counts) > 1:
    raise bad_request('max_tokens and max_completion_tokens differ; give one of them', 'max_tokens')
  if values['top_logprobs'] is not None and not values['logprobs']:
    raise bad_request('top_logprobs is for logprobs=true', 'top_logprobs')
  logprobs = (values['top_logprobs'] or 0) if values['logprobs'] else None
  settings = read_settings(values, next(iter(counts), None), logprobs)
  tool_use = chat_messages.read_tools(values['tools'], values['tool_choice'], values['parallel_tool_calls'])
  form = output_format.read_format(values)
  if form is not None and tool_use.is_forced:
    raise bad_request(f'tool_choice={shown(values["tool_choice"])} and a format both constrain the answer; leave out '
                      'one of them', 'tool_choice')
  return ChatBody(values['model'], chat_messages.read_messages(values['messages']), tool_use, settings,
                  form or tool_use.format(), *read_streaming(values))


@dataclasses.dataclass(frozen=True)
class ResponseBody:
  """The body of /v1/responses: a conversation, and the fields that the answer repeats."""
  chat: ChatBody
  repeated: Mapping[str, Any]


_INPUT_MESSAGE: Mapping[str, Field] = {
    'type': body_fields.one_of('message'), 'id': body_fields.TEXT, 'status': body_fields.TEXT,
    'role': body_fields.one_of('system', 'developer', 'user', 'assistant').needed(),
    'content': body_fields.ANY.needed()}
_PARTS = ('input_text', 'output_text', 'text')


def read_response(body: Any) -> ResponseBody:
  """Returns the body of /v1/responses, of text alone; ApiError where it is wrong."""
  values = read_fields(body, RESPONSE)
  messages = [{'role': 'system', 'content': values['instructions']}] if values['instructions'] is not None else []
  if isinstance(values['input'], str):
    messages.append({'role': 'user', 'content': values['input']})
  else:
    messages += [_input_message(value, f'input[{i}]') for i, value in enumerate(values['input'])]
  form = (values['text'] or {}).get('format')
  sampling = generate.Sampling(values['temperature'], top_p=values['top_p'])
  settings = AnswerSettings(sampling, max_tokens=values['max_output_tokens'])
  names = 'instructions', 'max_output_tokens', 'temperature', 'top_p', 'store', 'truncation', 'user'
  repeated = {**{name: values[name] for name in names}, 'text': {'format': form or {'type': 'text'}}}
  chat = ChatBody(values['model'], messages, chat_messages.NO_TOOLS, settings,
                  output_format.read_response_format(form, 'text.format'), values['stream'])
  return ResponseBody(chat, repeated)


def _input_message(value: Mapping[str, Any], place: str) -> dict[str, Any]:
  fields = read_fields(value, _INPUT_MESSAGE, place)
  content = fields['content']
  if isinstance(content, list):   # what a client sends back of an answer has annotations and log-probabilities
    content = [{name: part[name] for name in part if name not in ('annotations', 'logprobs')}
               if isinstance(part, dict) and part.get('type') == 'output_text' else part for part in content]
  role = 'system' if fields['role'] == 'developer' else fields['role']
  return {'role': role, 'content': chat_messages.content_text(content, f'{place}.content', _PARTS)}


@dataclasses.dataclass(frozen=True)
class TokenizeBody:
  """A text, or messages, to encode; the other of the two is None."""
  model: str | None
  prompt: str | None
  messages: Sequence[Mapping[str, Any]] | None
  adds_special_tokens: bool
  adds_generation_prompt: bool
  with_strings: bool


def read_tokenize(body: Any) -> TokenizeBody:
  """Returns the body of /tokenize; ApiError where it is wrong."""
  values = read_fields(body, TOKENIZE)
  if (values['prompt'] is None) == (values['messages'] is None):
    raise bad_request('give either a prompt or messages', 'prompt')
  adds_special_tokens, adds_generation_prompt = values['add_special_tokens'], values['add_generation_prompt']
  messages = None
  if values['messages'] is None:
    if adds_generation_prompt is not None:
      raise bad_request('add_generation_prompt is for messages; leave it out', 'add_generation_prompt')
  else:
    if adds_special_tokens:
      raise bad_request('add_special_tokens=true is for a prompt, because a chat template writes its own special '
                        'tokens; leave it out', 'add_special_tokens')
    messages = chat_messages.read_messages(values['messages'])
  return TokenizeBody(values['model'], values['prompt'], messages, adds_special_tokens is not False,
                      adds_generation_prompt is not False, values['return_token_strs'])


@dataclasses.dataclass(frozen=True)
class DetokenizeBody:
  """Token ids to decode."""
  model: str | None
  tokens: Sequence[int]


def read_detokenize(body: Any) -> DetokenizeBody:
  """Returns the body of /detokenize; ApiError where it is wrong."""
  return DetokenizeBody(**read_fields(body, DETOKENIZE))


@dataclasses.dataclass(frozen=True)
class EmbeddingsBody:
  """Texts, or token ids, to embed."""
  model: str | None
  texts: Sequence[str | tuple[int, ...]]
  as_base64: bool


def read_embeddings(body: Any) -> EmbeddingsBody:
  """Returns the body of /v1/embeddings; ApiError where it is wrong."""
  values = read_fields(body, EMBEDDINGS)
  return EmbeddingsBody(values['model'], _few(values['input'], 'input'), values['encoding_format'] == 'base64')


@dataclasses.dataclass(frozen=True)
class ScoreBody:
  """Pairs of a context and its continuation."""
  model: str | None
  pairs: Sequence[tuple[str, str]]


def read_score(body: Any) -> ScoreBody:
  """Returns the body of /v1/score: one `text_1` for all of `text_2`, or as many of each; ApiError otherwise."""
  values = read_fields(body, SCORE)
  first, second = _few(values['text_1'], 'text_1'), _few(values['text_2'], 'text_2')
  if len(first) not in (1, len(second)):
    raise bad_request(f'text_1 has {len(first)} texts and text_2 has {len(second)}; give one context, or as many',
                      'text_1')
  for name, texts in ('text_1', first), ('text_2', second):
    if not all(isinstance(text, str) for text in texts):
      raise bad_request(f'{name} must be text, not token ids', name)
  return ScoreBody(values['model'], list(zip(list(first) * (len(second) if len(first) == 1 else 1), second)))
