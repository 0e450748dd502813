"""What every request passes before an endpoint sees it: its origin, its key, and limits of its size and its cost."""
import dataclasses
import hmac
import re
import urllib.parse
import uuid
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NoReturn

from lm.serve.answers_format import as_json
from lm.serve.api_errors import ApiError, bad_request
from lm.workdir.parsing import json_value

_OPEN = ('/', '/health', '/metrics', '/version', '/openapi.json')   # without a key


@dataclasses.dataclass(frozen=True)
class Limits:
  """What the server allows.

  Attributes:
    key: has to be sent as a bearer token; None for no key.
    origins: of other web pages whose scripts may use the server; by default its own page alone.
    hosts: names by which it may be addressed, so that no page elsewhere reaches a local server by a name of its own;
      empty for any name.
    most_bytes: of a body.
    most_tokens: of an answer; a body that wants more is refused, and one without a number gets at most these. None for
      what the context has room for.
    seconds: until an answer has to be whole.
  """
  key: str | None = dataclasses.field(default=None, repr=False)
  origins: Sequence[str] = ()
  hosts: Sequence[str] = ()
  most_bytes: int = 1 << 20
  most_tokens: int | None = None
  seconds: float = 600.

  def tokens(self, max_tokens: int | None, room: int) -> int:
    """Returns the largest number of tokens of an answer; ApiError where the body wants more than the server allows."""
    if self.most_tokens is None:
      return room
    if max_tokens is not None and max_tokens > self.most_tokens:
      raise bad_request(f'max_tokens={max_tokens} is more than the {self.most_tokens} that this server writes',
                        'max_tokens')
    return min(room, self.most_tokens)

  def too_late(self) -> ApiError:
    """Returns the error of a request that takes too long."""
    return ApiError(504, f'the answer was not whole after {self.seconds:g} seconds; want fewer tokens, or try again '
                         'when the server has less to do', code='timeout')


async def read_body(request: Any, most: int) -> Any:
  """Returns the JSON of a request of at most `most` bytes. Raises ApiError where it is larger, or no JSON.

  What a client sends beyond them is dropped, up to 64 times as much, because it reads no answer while it sends.
  """
  chunks, size = [], 0
  async for chunk in request.stream():
    size += len(chunk)
    if size <= most:
      chunks.append(chunk)
    elif size > 64 * most:
      break
  if size > most:
    raise ApiError(413, f'the body has more than {most:,} bytes, the most that this server reads; send less at a time',
                   headers={'Connection': 'close'})
  try:
    return json_value(b''.join(chunks), parse_constant=_no_number)
  except ValueError as error:
    raise bad_request(f'the body is no JSON: {str(error)[:200]}', code='invalid_json') from None


def _no_number(name: str) -> NoReturn:
  """Raises ValueError for NaN and infinities, which Python reads, and no answer could repeat."""
  raise ValueError(f'{name} is no number of JSON')


class Guard:
  """An ASGI application around another one: refuses requests by their headers, and adds headers to answers."""

  def __init__(self, app: Callable[..., Awaitable[None]], limits: Limits):
    self._app, self._limits = app, limits

  async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
    if scope['type'] != 'http':
      await self._app(scope, receive, send)
      return
    names = {name.decode('latin-1'): value.decode('latin-1') for name, value in scope['headers']}
    id = names.get('x-request-id', '')
    headers = {'X-Request-Id': id if re.fullmatch(r'[!-~]{1,128}', id) else uuid.uuid4().hex}
    origin = names.get('origin')
    if origin in self._limits.origins:
      headers |= {'Access-Control-Allow-Origin': origin, 'Vary': 'Origin'}

    async def send_with_headers(message: Any) -> None:
      if message['type'] == 'http.response.start':
        added = [(name.lower().encode(), value.encode()) for name, value in headers.items()]
        message = {**message, 'headers': [*message.get('headers', ()), *added]}
      await send(message)

    if scope['method'] == 'OPTIONS' and origin in self._limits.origins:
      headers |= {'Access-Control-Allow-Methods': 'GET, POST', 'Access-Control-Max-Age': '600',
                  'Access-Control-Allow-Headers': 'authorization, content-type, x-request-id'}
      await _send(send_with_headers, 204, b'')
      return
    refusal = self._refusal(scope['path'], names)
    if refusal is not None:
      headers |= refusal.headers
      await _send(send_with_headers, refusal.status, as_json(refusal.body()))
      return
    await self._app(scope, receive, send_with_headers)

  def _refusal(self, path: str, headers: dict[str, str]) -> ApiError | None:
    """Returns why a request is refused, or None."""
    host, origin = headers.get('host', ''), headers.get('origin')
    name = urllib.parse.urlsplit(f'//{host}').hostname if _is_host(host) else None
    if self._limits.hosts and name not in self._limits.hosts:
      return ApiError(403, f'the server is not addressed as {host[:100]!r}, but as {" or ".join(self._limits.hosts)}; '
                           'start it with --host to open it to the network')
    if origin is not None and origin not in self._limits.origins and origin.partition('://')[2] != host:
      return ApiError(403, f'scripts of {origin[:100]!r} may not use this server; start it with --cors={origin[:100]}')
    key = self._limits.key
    if key is None or path in _OPEN:
      return None
    sent = headers.get('authorization', '')
    if hmac.compare_digest(sent.encode(), f'Bearer {key}'.encode()):
      return None
    return ApiError(401, 'the API key is missing or wrong; send it as the header "Authorization: Bearer <key>"',
                    code='invalid_api_key', headers={'WWW-Authenticate': 'Bearer'})


def _is_host(host: str) -> bool:
  return re.fullmatch(r'[A-Za-z0-9._-]+(:\d+)?|\[[0-9a-fA-F:.]+\](:\d+)?', host) is not None


async def _send(send: Any, status: int, body: bytes) -> None:
  await send({'type': 'http.response.start', 'status': status,
              'headers': [(b'content-type', b'application/json'), (b'content-length', str(len(body)).encode())]})
  await send({'type': 'http.response.body', 'body': body})
