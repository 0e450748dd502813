"""The web server of a study: the page of each rater, which never learns a system's name, and the page of results."""
import json
import pathlib
import socket
import sqlite3
from typing import Any

from lm.data.text.source import require
from lm.evaluate.people import exports, results, study
from lm.evaluate.people.page_headers import read_page
from lm.evaluate.people.vote_store import Vote, VoteStore

_PAGE = pathlib.Path(__file__).with_name('page.html')
_LARGEST_BODY = 65536   # bytes
_LONGEST_COMMENT = 5000   # characters
_UNKNOWN = 'This link belongs to no one in this study. Ask for the link again, and open the whole of it.'


class _Refused(Exception):
  """An answer to a request that is wrong, with the HTTP status."""

  def __init__(self, status: int, message: str):
    super().__init__(message)
    self.status = status


def application(store: VoteStore) -> Any:
  """Returns the Starlette application of a study; ImportError if Starlette is not installed."""
  routing = require('starlette.routing', 'human')
  server = _Server(store)
  routes = [routing.Route(path, endpoint, methods=[method]) for method, path, endpoint in (
      ('GET', '/rate/{token}', server.page), ('GET', '/rate/{token}/task', server.task),
      ('POST', '/rate/{token}/vote', server.vote), ('POST', '/rate/{token}/skip', server.skip),
      ('POST', '/rate/{token}/undo', server.undo), ('GET', '/results/{token}', server.page),
      ('GET', '/results/{token}/data', server.results), ('GET', '/results/{token}/{name}.csv', server.csv))]
  return require('starlette.applications', 'human').Starlette(routes=routes, exception_handlers={
      _Refused: server.refused, sqlite3.OperationalError: server.unavailable, 404: server.not_here})


def serve(store: VoteStore, host: str, port: int) -> None:
  """Prints the links of a study and serves it until it is interrupted. Port 0 takes any that is free.

  Raises OSError, in one clear line, where the port is in use.
  """
  uvicorn, app = require('uvicorn', 'human'), application(store)
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  with socket.socket(family, socket.SOCK_STREAM) as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
      listener.bind((host, port))
    except OSError as error:
      raise OSError(f'cannot listen on {host} port {port} ({error.strerror}); give another --port or --host') from None
    listener.listen(128)
    name = socket.gethostname() if host in ('0.0.0.0', '::') else f'[{host}]' if ':' in host else host
    print(*links(store, f'http://{name}:{listener.getsockname()[1]}'), sep='\n', flush=True)
    config = uvicorn.Config(app, log_level='warning', access_log=False, lifespan='off', ws='none', server_header=False,
                            timeout_graceful_shutdown=2)
    uvicorn.Server(config).run(sockets=[listener])


def links(store: VoteStore, address: str) -> list[str]:
  """Returns a line for each rater, and one for the results, with their private links."""
  width = len(f'rater {len(store.raters)}')
  lines = []
  for rater, token in store.raters.items():
    progress = store.progress(rater)
    lines.append(f'{f"rater {rater}":{width}}  {address}/rate/{token}  {progress.answered} of {progress.total} answers')
  lines.append(f'{"results":{width}}  {address}/results/{store.results_token}  for you alone')
  return [*lines, 'Ctrl-C stops the server; the same command starts it again']


class _Server:
  """The endpoints. What blocks, such as writing a vote to the disk, runs in a thread."""

  def __init__(self, store: VoteStore):
    self.store = store
    self.responses = require('starlette.responses', 'human')
    self.in_thread = require('starlette.concurrency', 'human').run_in_threadpool
    self.html, self.headers = read_page(_PAGE)

  async def page(self, request: Any) -> Any:
    token = request.path_params['token']
    is_valid = token == self.store.results_token if request.url.path.startswith('/results') else self.store.rater(token)
    return self.responses.HTMLResponse(self.html, 200 if is_valid else 404, self.headers)

  async def task(self, request: Any) -> Any:
    return await self._next(self._rater(request))

  async def vote(self, request: Any) -> Any:
    rater, body = self._rater(request), await _body(request)
    match body:
      case {'id': str(id), 'task': int(number), 'answer': answer, 'comment': str(comment), 'seconds': int() | float()
            | None as seconds} if 8 <= len(id) <= 64 and len(comment) <= _LONGEST_COMMENT:
        pass
      case _:
        raise _Refused(400, 'a vote has id, task, answer, comment and seconds')
    try:
      stored = await self.in_thread(self.store.add, id, rater, number, answer, comment, seconds)
    except ValueError as error:
      raise _Refused(400, str(error)) from None
    return await self._next(rater, stored=stored)

  async def skip(self, request: Any) -> Any:
    rater, body = self._rater(request), await _body(request)
    if type(number := body.get('task')) is not int or not 0 <= number < len(self.store.tasks[rater]):
      raise _Refused(400, f'there is no task {number}')
    await self.in_thread(self.store.skip, rater, number)
    return await self._next(rater)

  async def undo(self, request: Any) -> Any:
    rater, body = self._rater(request), await _body(request)
    vote = await self.in_thread(self.store.undo, rater, str(body.get('id')))
    if vote is None:
      raise _Refused(409, 'there is no such answer of yours')
    return await self._next(rater, vote)

  async def results(self, request: Any) -> Any:
    self._check_results_token(request)
    without = {int(rater) for rater in request.query_params.get('without', '').split(',') if rater.isdecimal()}
    summary = await self.in_thread(results.summarise, self.store, without)
    return self.responses.JSONResponse({**exports.as_json(summary), 'raters': list(self.store.raters)},
                                       headers=self.headers)

  async def csv(self, request: Any) -> Any:
    self._check_results_token(request)
    name = request.path_params['name']
    if name not in ('votes', 'results'):
      raise _Refused(404, f'there is no {name}.csv; there are votes.csv and results.csv')
    make = exports.votes_csv if name == 'votes' else lambda store: exports.results_csv(results.summarise(store))
    text = await self.in_thread(make, self.store)
    return self.responses.PlainTextResponse(text, media_type='text/csv', headers={
        **self.headers, 'Content-Disposition': f'attachment; filename="{name}.csv"'})

  async def refused(self, request: Any, error: _Refused) -> Any:
    return self._error(error.status, str(error))

  async def unavailable(self, request: Any, error: sqlite3.OperationalError) -> Any:
    """The disk is full, or the file is locked: the page keeps the answer and sends it again."""
    return self._error(503, f'the database cannot be written: {error}')

  async def not_here(self, request: Any, error: Any) -> Any:
    return self.responses.HTMLResponse(self.html, 404, self.headers)

  def _error(self, status: int, message: str) -> Any:
    return self.responses.JSONResponse({'error': message}, status, self.headers)

  def _rater(self, request: Any) -> int:
    rater = self.store.rater(request.path_params['token'])
    if rater is None:
      raise _Refused(404, _UNKNOWN)
    return rater

  def _check_results_token(self, request: Any) -> None:
    if request.path_params['token'] != self.store.results_token:
      raise _Refused(404, _UNKNOWN)

  async def _next(self, rater: int, undone: Vote | None = None, stored: bool = True) -> Any:
    """Returns what a rater sees next: the task of a vote that was just undone, with its answer, or the next task."""
    progress, shown = await self.in_thread(self.store.progress, rater), {}
    number = progress.number if undone is None else undone.number
    if number is not None:
      task = self.store.tasks[rater][number]
      shown = {'prompt': self.store.study.items[task.item].prompt, 'texts': study.texts(self.store.study, task)}
    if undone is not None:
      shown |= {'answer': undone.answer, 'comment': undone.comment}
    settings = self.store.study
    return self.responses.JSONResponse(
        {'stored': stored, 'mode': settings.mode, 'question': settings.question or study.QUESTIONS[settings.mode],
         'criteria': settings.criteria, 'scale': settings.scale, 'task': number, 'done': progress.answered,
         'total': progress.total, 'skipped': progress.skipped, 'last': progress.last, **shown}, headers=self.headers)


async def _body(request: Any) -> dict[str, Any]:
  """Returns the JSON object of a request, which is not read further where it is too long."""
  body = b''
  async for chunk in request.stream():
    body += chunk
    if len(body) > _LARGEST_BODY:
      raise _Refused(413, f'the answer has more than {_LARGEST_BODY:,} bytes; shorten the comment')
  try:
    fields = json.loads(body)
  except ValueError:
    fields = None
  if not isinstance(fields, dict):
    raise _Refused(400, 'the request is no JSON object')
  return fields
