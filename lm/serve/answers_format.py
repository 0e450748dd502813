"""Answers as OpenAI's protocol writes them: chunks of a stream, and the whole answer, which is what the chunks join to.

A writer turns pieces into chunks. `whole` joins chunks, so that a stream and a whole answer cannot differ.
"""
import json
import time
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lm.generate.choice_text import Piece, ScoredToken, Top
from lm.serve.request_bodies import ChatBody, CompletionBody
from lm.serve.token_texts import TokenTexts
from lm.serve.tool_calls import ToolCallReader

Chunk = dict[str, Any]


class Usage(NamedTuple):
  """The number of tokens of a request: of its prompts, of its answers, and those of its prompts that were in pages."""
  prompt: int
  completion: int
  cached: int

  def body(self) -> dict[str, Any]:
    return {'prompt_tokens': self.prompt, 'completion_tokens': self.completion,
            'total_tokens': self.prompt + self.completion, 'prompt_tokens_details': {'cached_tokens': self.cached}}


class Echo(NamedTuple):
  """A prompt that an answer repeats: its text, its ids, and the character of the text where each of them begins."""
  text: str
  ids: Sequence[int]
  starts: Sequence[int]

  def tokens(self, scores: Sequence[tuple[float, Top]] | None) -> list[ScoredToken]:
    """Returns its tokens with their scores, the first of which is without; none where there are no scores."""
    if scores is None:
      return []
    return [ScoredToken(id, start, *score) for id, start, score in zip(self.ids, self.starts, [(0., ()), *scores])]


class Writer(Protocol):
  """Writes one answer; each chunk is sent as soon as it is there."""
  last_frame: bytes   # what ends a stream

  def begin(self) -> list[Chunk]:
    """Returns the chunks before the first piece."""

  def add(self, piece: Piece) -> list[Chunk]:
    """Returns the chunks of a piece."""

  def end(self, usage: Usage) -> list[Chunk]:
    """Returns the chunks after the last piece."""

  def whole(self, chunks: Sequence[Chunk], usage: Usage) -> dict[str, Any]:
    """Returns the answer that all these chunks join to."""

  def frame(self, chunk: Chunk) -> bytes:
    """Returns a chunk as a server-sent event."""


def as_json(value: Any) -> bytes:
  """Returns the UTF-8 of a value as JSON."""
  return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(',', ':')).encode()


class _ChoicesWriter:
  """What completions and chats have in common: chunks have choices, and usage comes in a chunk of its own."""
  kind: str     # the `object` of a whole answer
  prefix: str   # of the id
  last_frame = b'data: [DONE]\n\n'

  def __init__(self, body: CompletionBody | ChatBody, model: str, texts: TokenTexts):
    self._texts, self._streams_usage = texts, body.stream_usage
    self._logprobs = body.settings.logprobs is not None
    self._head = {'id': f'{self.prefix}-{uuid.uuid4().hex}', 'object': self.kind, 'created': int(time.time()),
                  'model': model}

  def _chunk(self, *choices: Mapping[str, Any]) -> Chunk:
    return {**self._head, 'choices': list(choices)}

  def end(self, usage: Usage) -> list[Chunk]:
    """Returns the last chunk of a stream, which has no choices, where the body wants its usage."""
    return [{**self._chunk(), 'usage': usage.body()}] if self._streams_usage else []

  def frame(self, chunk: Chunk) -> bytes:
    """Returns a chunk as a server-sent event."""
    return b'data: ' + as_json(chunk) + b'\n\n'


class CompletionWriter(_ChoicesWriter):
  """Writes completions of one or more prompts, each with n choices."""
  kind, prefix = 'text_completion', 'cmpl'

  def __init__(self, body: CompletionBody, model: str, texts: TokenTexts, echoes: Sequence[Echo]):
    """Makes a writer; `echoes` has the prompt of each choice, and none without `echo`."""
    super().__init__(body, model, texts)
    self._echoes, self._echoed = echoes, set()

  def begin(self) -> list[Chunk]:
    return []

  def add(self, piece: Piece) -> list[Chunk]:
    """Returns the chunks of a piece; the first one of a choice is the prompt, where it is repeated."""
    chunks = []
    if self._echoes and piece.choice not in self._echoed:
      chunks.append(self._prompt(piece))
    self._echoed.add(piece.choice)
    if piece.text or piece.tokens or piece.finish is not None:
      shift = len(self._echoes[piece.choice].text) if self._echoes else 0
      chunks.append(self._one(piece.choice, piece.text, piece.tokens, shift, piece.finish))
    return chunks

  def _prompt(self, piece: Piece) -> Chunk:
    echo = self._echoes[piece.choice]
    chunk = self._one(piece.choice, echo.text, echo.tokens(piece.prompt), 0, None)
    logprobs = chunk['choices'][0]['logprobs']
    if logprobs is not None:   # nothing predicts the first token
      logprobs['token_logprobs'][0] = logprobs['top_logprobs'][0] = None
    return chunk

  def _one(self, choice: int, text: str, tokens: Sequence[ScoredToken], shift: int, finish: str | None) -> Chunk:
    logprobs = self._texts.completion(tokens, shift) if self._logprobs else None
    return self._chunk({'index': choice, 'text': text, 'logprobs': logprobs, 'finish_reason': finish})

  def whole(self, chunks: Sequence[Chunk], usage: Usage) -> dict[str, Any]:
    """Returns the answer that the chunks join to."""
    choices: dict[int, dict[str, Any]] = {}
    for part in (choice for chunk in chunks for choice in chunk['choices']):
      whole = choices.setdefault(part['index'], {**part, 'text': '', 'logprobs': None})
      whole['text'] += part['text']
      whole['finish_reason'] = part['finish_reason']
      if part['logprobs'] is not None:
        whole['logprobs'] = whole['logprobs'] or {name: [] for name in part['logprobs']}
        for name, values in part['logprobs'].items():
          whole['logprobs'][name] += values
    return {**self._head, 'choices': [choices[i] for i in sorted(choices)], 'usage': usage.body()}


class ChatWriter(_ChoicesWriter):
  """Writes answers of a chat, with calls of functions."""
  kind, prefix = 'chat.completion', 'chatcmpl'

  def __init__(self, body: ChatBody, model: str, texts: TokenTexts):
    super().__init__(body, model, texts)
    self._readers = [ToolCallReader(body.tool_use) for _ in range(body.settings.n)]

  def begin(self) -> list[Chunk]:
    """Returns the first chunks, which name the role."""
    return [self._one(choice, {'role': 'assistant', 'content': ''}) for choice in range(len(self._readers))]

  def add(self, piece: Piece) -> list[Chunk]:
    """Returns the chunks of a piece."""
    reader = self._readers[piece.choice]
    content, calls = reader.push(piece.text)
    if piece.finish is not None:
      further, last_calls = reader.end()
      content, calls = content + further, calls + last_calls
    logprobs = {'content': self._texts.chat(piece.tokens), 'refusal': None} if self._logprobs and piece.tokens else None
    chunks = []
    if content or logprobs:
      chunks.append(self._one(piece.choice, {'content': content}, logprobs))
    chunks += [self._one(piece.choice, {'tool_calls': [call.delta()]}) for call in calls]
    if piece.finish is not None:
      finish = reader.finish if piece.finish == 'stop' else piece.finish
      chunks.append(self._one(piece.choice, {}, finish=finish))
    return chunks

  def _chunk(self, *choices: Mapping[str, Any]) -> Chunk:
    return {**super()._chunk(*choices), 'object': 'chat.completion.chunk'}

  def _one(self, choice: int, delta: Mapping[str, Any], logprobs: Any = None, finish: str | None = None) -> Chunk:
    return self._chunk({'index': choice, 'delta': delta, 'logprobs': logprobs, 'finish_reason': finish})

  def whole(self, chunks: Sequence[Chunk], usage: Usage) -> dict[str, Any]:
    """Returns the answer that the chunks join to."""
    choices = [{'index': i, 'message': {'role': 'assistant', 'content': '', 'refusal': None},
                'logprobs': {'content': [], 'refusal': None} if self._logprobs else None, 'finish_reason': None}
               for i in range(len(self._readers))]
    for part in (choice for chunk in chunks for choice in chunk['choices']):
      whole = choices[part['index']]
      message = whole['message']
      message['content'] += part['delta'].get('content', '')
      for call in part['delta'].get('tool_calls', ()):
        calls = message.setdefault('tool_calls', [])
        if 'id' in call:
          calls.append({'id': call['id'], 'type': 'function', 'function': dict(call['function'])})
        else:
          calls[call['index']]['function']['arguments'] += call['function']['arguments']
      if part['logprobs'] is not None:
        whole['logprobs']['content'] += part['logprobs']['content']
      whole['finish_reason'] = part['finish_reason']
    for choice in choices:
      if 'tool_calls' in choice['message']:
        choice['message']['content'] = choice['message']['content'] or None
    return {**self._head, 'choices': choices, 'usage': usage.body()}
