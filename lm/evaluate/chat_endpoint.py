"""Replies of a chat model behind an address that speaks OpenAI's protocol, kept on disk."""
import dataclasses
import hashlib
import http.client
import json
import os
import pathlib
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lm.workdir import atomic

_TEMPORARY = (408, 429, 500, 502, 503, 504)   # statuses after which a second attempt may succeed
_LONGEST_WAIT = 60.                           # seconds

Messages = Sequence[Mapping[str, Any]]
Tools = Sequence[Mapping[str, Any]]   # each {'type': 'function', 'function': {'name': ..., 'parameters': ...}}


class _NoRedirects(urllib.request.HTTPRedirectHandler):
  """Follows no redirection, with which texts and the key would go to another server."""

  def redirect_request(self, *_):
    return None


_OPENER = urllib.request.build_opener(_NoRedirects)


@dataclasses.dataclass(frozen=True)
class Endpoint:
  """A chat model behind an address; it is asked with temperature 0.

  Args:
    address: such as http://localhost:8000/v1, to which /chat/completions is added.
    model: the name of the model, as the server has it.
    key: sent as a bearer token; None for none.
    max_tokens: of a reply; None for what the server has room for.
    seconds: to wait for a reply.
    attempts: how often a request is sent before it counts as failed, with growing pauses between.
    sleep: waits for so many seconds.
  """
  address: str
  model: str
  key: str | None = dataclasses.field(default=None, repr=False)
  max_tokens: int | None = 1024
  seconds: float = 120.
  attempts: int = 6
  sleep: Callable[[float], None] = time.sleep

  def __post_init__(self):
    if not self.address.startswith(('http://', 'https://')):
      raise ValueError(f'address={self.address} begins with neither http:// nor https://; give an address such as '
                       'http://localhost:8000/v1')
    if (self.max_tokens is not None and self.max_tokens < 1) or self.attempts < 1 or not self.seconds > 0:
      raise ValueError(f'max_tokens={self.max_tokens}, attempts={self.attempts} and seconds={self.seconds} have to be '
                       'above 0')

  @property
  def url(self) -> str:
    address = self.address.rstrip('/')
    return address if address.endswith('/chat/completions') else f'{address}/chat/completions'

  def body(self, messages: Messages, tools: Tools = ()) -> dict[str, Any]:
    """Returns the JSON of a request."""
    body = {'model': self.model, 'messages': list(messages), 'temperature': 0}
    if self.max_tokens is not None:
      body['max_tokens'] = self.max_tokens
    return {**body, 'tools': list(tools)} if tools else body

  def ask(self, messages: Messages) -> str:
    """Returns the text of a reply; empty where the model gave none, as in a refusal. Raises as `message`."""
    content = self.message(messages).get('content')
    return content if isinstance(content, str) else ''

  def message(self, messages: Messages, tools: Tools = ()) -> dict[str, Any]:
    """Returns the message of a reply, which may have `tool_calls` of the tools.

    Raises ConnectionError where there is no reply after all attempts, and ValueError where the server refuses the
    request or speaks another protocol.
    """
    headers = {'Content-Type': 'application/json', **({'Authorization': f'Bearer {self.key}'} if self.key else {})}
    request = urllib.request.Request(self.url, json.dumps(self.body(messages, tools)).encode(), headers)
    for attempt in range(self.attempts):
      wait = min(2. ** attempt, _LONGEST_WAIT)
      try:
        with _OPENER.open(request, timeout=self.seconds) as response:
          return self._message(response.read())
      except urllib.error.HTTPError as error:
        text = error.read(500).decode(errors='replace')
        if error.code not in _TEMPORARY:
          raise ValueError(f'{self.url} refuses the request with status {error.code}: {text}') from None
        problem, wait = f'status {error.code}: {text}', _seconds(error.headers.get('Retry-After'), wait)
      except (OSError, http.client.HTTPException) as error:   # URLError, timeouts and lost connections
        problem = str(error) or type(error).__name__
      if attempt + 1 < self.attempts:
        print(f'{self.url} gives no reply ({problem[:300]}); attempt {attempt + 2} of {self.attempts} follows in '
              f'{wait:g} seconds', file=sys.stderr)
        self.sleep(wait)
    raise ConnectionError(f'{self.url} gives no reply after {self.attempts} attempts ({problem[:300]})')

  def _message(self, data: bytes) -> dict[str, Any]:
    try:
      return dict(json.loads(data)['choices'][0]['message'])
    except (ValueError, LookupError, TypeError, AttributeError):
      raise ValueError(f'{self.url} answers, but not as OpenAI does: {data[:200]!r}; check the address') from None


def _seconds(header: str | None, default: float) -> float:
  """Returns the seconds of a Retry-After header, within limits; the default where it has none, or a date."""
  try:
    return min(max(float(header or ''), 0.), _LONGEST_WAIT)
  except ValueError:
    return default


class KeptReplies:
  """An endpoint whose replies are kept in a file, so that no request is sent twice, also after a stop.

  A line of the file is a reply, with the digest of its request. A last line that was cut off by a kill is removed.
  """

  def __init__(self, endpoint: Endpoint, file: pathlib.Path):
    self.endpoint, self.file = endpoint, file
    self.sent = 0   # requests that were not kept already
    self._lock = threading.Lock()
    self._replies: dict[str, str] = {}
    lines = file.read_bytes().split(b'\n') if file.is_file() else [b'']
    for number, line in enumerate(lines[:-1], 1):
      try:
        record = json.loads(line)
        self._replies[record['request']] = record['reply']
      except (ValueError, LookupError, TypeError):
        raise ValueError(f'{file} line {number} is no kept reply; name another file, or delete it') from None
    if lines[-1]:
      atomic.write(file, b'\n'.join([*lines[:-1], b'']))

  def ask(self, messages: Messages) -> str:
    """Returns a reply, as `Endpoint.ask` does; it may be called by several threads."""
    digest = hashlib.sha256(json.dumps([self.endpoint.url, self.endpoint.body(messages)]).encode()).hexdigest()
    reply = self._replies.get(digest)
    if reply is not None:
      return reply
    reply = self.endpoint.ask(messages)
    with self._lock:
      self.sent += 1
      self._replies[digest] = reply
      with atomic.naming(self.file), open(self.file, 'ab') as file:
        file.write(json.dumps({'request': digest, 'reply': reply}).encode() + b'\n')
        file.flush()
        os.fsync(file.fileno())
    return reply
