"""The web application: endpoints as in OpenAI's protocol and in vLLM, for one model."""
import asyncio
import base64
import pathlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from typing import Any

import numpy as np

from lm import generate
from lm.data.text.source import require
from lm.evaluate.people.page_headers import read_page
from lm.generate.choice_text import Piece
from lm.serve import openapi, request_bodies, sampling_fields
from lm.serve.answers_format import ChatWriter, Chunk, CompletionWriter, Writer, as_json
from lm.serve.api_errors import ApiError
from lm.serve.chat_messages import NO_TOOLS
from lm.serve.engine_thread import EngineThread
from lm.serve.response_events import ResponseWriter
from lm.serve.running_answer import RunningAnswer
from lm.serve.served_model import DEFAULT_TOKENS, ServedModel
from lm.serve.server_guard import Guard, Limits, read_body
from lm.serve.server_metrics import ServerMetrics

Body = request_bodies.CompletionBody | request_bodies.ChatBody
_PAGE = pathlib.Path(__file__).with_name('chat_page.html')


def application(models: Sequence[ServedModel], thread: EngineThread, limits: Limits) -> Any:
  """Returns the ASGI application of an engine that runs in `thread`.

  Its `models` are that of the engine, which answers where a request names none, and that with each adapter.
  """
  server = _Server(models, thread, limits)
  routing = require('starlette.routing', 'serve')
  routes = [routing.Route(path, endpoint, methods=[method]) for method, path, endpoint in (
      ('GET', '/', server.page), ('GET', '/health', server.health), ('GET', '/version', server.version),
      ('GET', '/metrics', server.metrics_text), ('GET', '/openapi.json', server.openapi),
      ('GET', '/tokenizer_info', server.tokenizer_info), ('GET', '/v1/models', server.models),
      ('GET', '/v1/models/{id:path}', server.model), ('POST', '/v1/completions', server.completions),
      ('POST', '/v1/chat/completions', server.chat), ('POST', '/v1/responses', server.responses),
      ('POST', '/v1/embeddings', server.embeddings), ('POST', '/v1/score', server.score),
      ('POST', '/tokenize', server.tokenize), ('POST', '/detokenize', server.detokenize))]
  http = require('starlette.exceptions', 'serve').HTTPException
  app = require('starlette.applications', 'serve').Starlette(routes=routes, exception_handlers={
      ApiError: server.refused, http: server.no_route, Exception: server.failed})
  return Guard(app, limits)


class _Server:
  """The endpoints."""

  def __init__(self, models: Sequence[ServedModel], thread: EngineThread, limits: Limits):
    self._models, self._thread, self._limits = models, thread, limits
    self._responses = require('starlette.responses', 'serve')
    self._metrics = ServerMetrics(models[0].name, models[0].context, thread.engine)
    self._created = int(time.time())
    self._page, self._page_headers = read_page(_PAGE)

  def _json(self, value: Any, status: int = 200, headers: Any = None) -> Any:
    return self._responses.Response(as_json(value), status, headers, 'application/json')

  async def page(self, request: Any) -> Any:
    return self._responses.HTMLResponse(self._page, headers=self._page_headers)

  async def health(self, request: Any) -> Any:
    return self._responses.Response(status_code=200 if self._thread.failure is None else 503)

  async def version(self, request: Any) -> Any:
    return self._json({'version': openapi.version()})

  async def metrics_text(self, request: Any) -> Any:
    return self._responses.Response(self._metrics.text(), media_type='text/plain; version=0.0.4; charset=utf-8')

  async def openapi(self, request: Any) -> Any:
    return self._json(openapi.document())

  async def models(self, request: Any) -> Any:
    return self._json({'object': 'list', 'data': [self._card(served) for served in self._models]})

  async def model(self, request: Any) -> Any:
    return self._json(self._card(self._model(request.path_params['id'])))

  def _card(self, served: ServedModel) -> dict[str, Any]:
    base = self._models[0]
    return {'id': served.name, 'object': 'model', 'created': self._created, 'owned_by': 'lm',
            'parent': None if served is base else base.name, 'max_model_len': served.context,
            'max_tokens': self._limits.most_tokens, 'has_chat_template': served.template is not None,
            'reads_source': served.model.reads_source}

  def _model(self, name: str | None) -> ServedModel:
    """Returns the model of a name; ApiError where there is none."""
    for served in self._models:
      if name in (None, served.name):
        return served
    names = ', '.join(repr(served.name) for served in self._models)
    raise ApiError(404, f'the model {name[:100]!r} is not served here; what is served is {names}', 'model',
                   'model_not_found')

  async def _read(self, request: Any, read: Callable[[Any], Any]) -> tuple[Any, ServedModel]:
    """Returns the body of a request, read by a function of `request_bodies`, and the model that it names."""
    body = read(await read_body(request, self._limits.most_bytes))
    return body, self._model((body.chat if isinstance(body, request_bodies.ResponseBody) else body).model)

  async def completions(self, request: Any) -> Any:
    body, served = await self._read(request, request_bodies.read_completion)
    settings = body.settings
    if body.echo:
      served.check_is_decoder('echo is', 'echo')
    prompts = [served.encode(prompt, body.adds_special_tokens) for prompt in body.prompts]
    grammar = await self._grammar(body, served)
    requests, echoes = [], []
    for prompt, ids in zip(body.prompts, prompts):
      room = served.room(ids, settings.max_tokens, 'prompt')
      room = min(room, DEFAULT_TOKENS) if settings.max_tokens is None else room
      scores_prompt = body.echo and settings.logprobs is not None
      requests.append(self._engine_request(served, ids, body, room, grammar, scores_prompt=scores_prompt))
      echoes += [served.echo(prompt, ids)] * settings.n if body.echo else []
    writer = CompletionWriter(body, served.name, served.texts, echoes)
    return await self._answer(request, requests, writer, body, served)

  async def chat(self, request: Any) -> Any:
    body, served = await self._read(request, request_bodies.read_chat)
    return await self._chat(request, body, served, ChatWriter(body, served.name, served.texts))

  async def responses(self, request: Any) -> Any:
    body, served = await self._read(request, request_bodies.read_response)
    return await self._chat(request, body.chat, served, ResponseWriter(body, served.name))

  async def _chat(self, request: Any, body: request_bodies.ChatBody, served: ServedModel, writer: Writer) -> Any:
    ids = await asyncio.to_thread(served.encode_chat, body.messages, body.tool_use)   # a template may take seconds
    room = served.room(ids, body.settings.max_tokens, 'messages')
    grammar = await self._grammar(body, served)
    requests = [self._engine_request(served, ids, body, room, grammar, served.chat_ends)]
    return await self._answer(request, requests, writer, body, served)

  async def _grammar(self, body: Body, served: ServedModel) -> generate.Grammar | None:
    """Returns what the answers have to match; None for any text."""
    if body.format is None:
      return None
    return await asyncio.to_thread(body.format.compile, served.grammars)   # a large schema may take a second

  def _engine_request(self, served: ServedModel, ids: np.ndarray, body: Body, room: int,
                      grammar: generate.Grammar | None, ends: Sequence[int] = (), scores_prompt: bool = False
                      ) -> generate.Request:
    """Returns the engine's request for a prompt, after which there is `room`; `ends` end an answer too."""
    settings = body.settings
    stop_ids = tuple(dict.fromkeys((*settings.sampling.stop_ids, *ends)))
    breakers = served.last_ids(settings.breakers) if settings.sampling.dry_multiplier else ()
    sampling = sampling_fields.replace(settings.sampling, stop_ids=stop_ids, dry_sequence_breakers=breakers)
    served.check_ids(tuple(sampling.ids), 'logit_bias or stop_token_ids')
    seed = random.SystemRandom().randint(0, sampling_fields.MOST_SEED) if settings.seed is None else settings.seed
    text, source = served.text_and_source(ids)
    return generate.Request(text, sampling, self._limits.tokens(settings.max_tokens, room), seed, settings.n,
                            settings.logprobs or 0, scores_prompt, grammar, source, served.adapter)

  async def _answer(self, request: Any, requests: Sequence[generate.Request], writer: Writer, body: Body,
                    served: ServedModel) -> Any:
    """Returns the answer of requests: a stream, or the whole that its chunks join to."""
    answer = RunningAnswer(self._thread, served.tokenizer, requests, body.settings.stop, self._metrics)

    async def chunks() -> AsyncIterator[Chunk]:
      for chunk in writer.begin():
        yield chunk
      async for piece in answer.pieces():
        for chunk in writer.add(piece):
          yield chunk
      for chunk in writer.end(answer.usage):
        yield chunk

    if body.stream:
      return _stream(self._responses.StreamingResponse, _frames(chunks(), writer, self._limits), answer)

    async def collect() -> Any:
      parts = [chunk async for chunk in chunks()]
      return self._json(writer.whole(parts, answer.usage))
    return await self._finish(request, answer, collect())

  async def _finish(self, request: Any, answer: RunningAnswer, work: Coroutine[Any, Any, Any]) -> Any:
    """Returns the result of some work on an answer, whose rows are free afterwards."""
    try:
      return await self._until_disconnected(request, work)
    finally:
      answer.abort()

  async def _until_disconnected(self, request: Any, work: Coroutine[Any, Any, Any]) -> Any:
    """Returns the result of some work, which is cancelled where the client goes away, or where it takes too long."""
    task, disconnection = asyncio.create_task(work), asyncio.create_task(_disconnected(request.receive))
    try:
      await asyncio.wait((task, disconnection), timeout=self._limits.seconds, return_when=asyncio.FIRST_COMPLETED)
      if task.done():
        return task.result()
      raise ApiError(499, 'the client went away') if disconnection.done() else self._limits.too_late()
    finally:
      for each in task, disconnection:
        each.cancel()
      await asyncio.gather(task, disconnection, return_exceptions=True)

  async def embeddings(self, request: Any) -> Any:
    body, served = await self._read(request, request_bodies.read_embeddings)
    served.check_is_decoder('embeddings are', 'model')
    texts = [served.encode(text, param='input') for text in body.texts]
    for ids in texts:
      served.check_length(ids, 'input')
    data = []
    for i, ids in enumerate(texts):
      work = self._thread.call(lambda ids=ids: served.embed(ids))
      vector = await self._until_disconnected(request, work)
      value = base64.b64encode(vector.astype('<f4').tobytes()).decode() if body.as_base64 else vector.tolist()
      data.append({'object': 'embedding', 'index': i, 'embedding': value})
    count = sum(map(len, texts))
    return self._json({'object': 'list', 'data': data, 'model': served.name,
                       'usage': {'prompt_tokens': count, 'total_tokens': count}})

  async def score(self, request: Any) -> Any:
    """Answers with log p(text_2 | text_1) in nats, of each pair."""
    body, served = await self._read(request, request_bodies.read_score)
    pairs = []   # (ids, source, the number of tokens of the context)
    for first, second in body.pairs:
      context, source = served.text_and_source(served.encode(first, param='text_1'))
      ids = np.concatenate([context, served.encode(second, False, 'text_2')]) if second else context
      served.check_length(ids, 'text_2')
      served.check_length(() if source is None else source, 'text_1')
      pairs.append((ids, source, len(context)))
    requests = [generate.Request(ids, max_tokens=0, scores_prompt=True, source=source, adapter=served.adapter)
                for ids, source, _ in pairs]
    answer = RunningAnswer(self._thread, served.tokenizer, requests, (), self._metrics)

    async def collect() -> list[Piece]:
      return [piece async for piece in answer.pieces()]
    pieces = sorted(await self._finish(request, answer, collect()), key=lambda piece: piece.choice)
    data = [{'object': 'score', 'index': i, 'score': sum(value for value, _ in piece.prompt[start - 1:]),
             'tokens': len(ids) - start} for i, (piece, (ids, _, start)) in enumerate(zip(pieces, pairs))]
    count = sum(len(ids) + (0 if source is None else len(source)) for ids, source, _ in pairs)
    return self._json({'object': 'list', 'data': data, 'model': served.name,
                       'usage': {'prompt_tokens': count, 'total_tokens': count}})

  async def tokenize(self, request: Any) -> Any:
    body, served = await self._read(request, request_bodies.read_tokenize)
    if body.messages is not None:
      ids = await asyncio.to_thread(served.encode_chat, body.messages, NO_TOOLS, body.adds_generation_prompt)
    elif body.adds_special_tokens:
      ids = served.encode(body.prompt)
    else:
      ids = served.tokenizer.parse(body.prompt)[0]
    ids = [int(i) for i in ids]
    strings = {'token_strs': [served.texts.text(i) for i in ids]} if body.with_strings else {}
    return self._json({'count': len(ids), 'max_model_len': served.context, 'tokens': ids, **strings})

  async def tokenizer_info(self, request: Any) -> Any:
    return self._json(self._models[0].tokenizer_info())

  async def detokenize(self, request: Any) -> Any:
    body, served = await self._read(request, request_bodies.read_detokenize)
    served.check_ids(body.tokens, 'tokens')
    return self._json({'prompt': served.tokenizer.decode(body.tokens)})

  async def refused(self, request: Any, error: ApiError) -> Any:
    return self._json(error.body(), error.status, error.headers)

  async def no_route(self, request: Any, error: Any) -> Any:
    refusal = ApiError(error.status_code, f'{request.method} {request.url.path[:200]}: {error.detail}; the endpoints '
                                          'are listed in /openapi.json')
    return self._json(refusal.body(), error.status_code, error.headers)

  async def failed(self, request: Any, error: Exception) -> Any:
    """Answers where there is a fault in this program; Starlette raises it again, so that it is logged."""
    return self._json(ApiError(500, f'the server failed: {type(error).__name__}; its log says more').body(), 500)


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
  """Returns when the client has gone away."""
  while (await receive())['type'] != 'http.disconnect':
    pass


def _stream(base: type, frames: AsyncIterator[bytes], answer: RunningAnswer) -> Any:
  """Returns a response that streams frames, and frees the slots of the answer also where the client goes away."""
  class Stream(base):
    async def __call__(self, *args: Any) -> None:
      try:
        await super().__call__(*args)
      finally:
        answer.abort()
  return Stream(frames, media_type='text/event-stream', headers={'Cache-Control': 'no-store',
                                                                 'X-Accel-Buffering': 'no'})


async def _frames(chunks: AsyncIterator[Chunk], writer: Writer, limits: Limits) -> AsyncIterator[bytes]:
  """Yields the server-sent events of an answer; the last one is the error, where it fails on the way."""
  try:
    async with asyncio.timeout(limits.seconds):
      async for chunk in chunks:
        yield writer.frame(chunk)
    yield writer.last_frame
  except (TimeoutError, ApiError) as error:
    refusal = limits.too_late() if isinstance(error, TimeoutError) else error
    yield b'data: ' + as_json(refusal.body()) + b'\n\n'
