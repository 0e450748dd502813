"""Clients come, wait, go away and are late: rows are free within a step, and nothing is lost for the others."""
import asyncio
import threading

import pytest
from helpers.scripted_engine import ScriptedEngine, application, text_script

from lm import serve
from lm.generate import Request
from lm.serve import api_errors

pytest.importorskip('starlette')
pytest.importorskip('prometheus_client')

BODY = {'prompt': 'a', 'max_tokens': 60}
FOREVER = text_script('x' * 60, ends=False)


class Steps:
  """Lets an engine compute as many steps as a test allows."""

  def __init__(self):
    self._semaphore, self._calls, self._allowed = threading.Semaphore(0), 0, 0

  def __call__(self):
    self._calls += 1
    self._semaphore.acquire(timeout=20)

  def allow(self, count):
    self._allowed += count
    self._semaphore.release(count)

  def allow_next(self):
    """Allows one more step if the engine waits for it."""
    if self._calls > self._allowed:
      self.allow(1)


def post(app, path, body, disconnect=None):
  """Returns a task of a request in this event loop; its result is (status, headers, body).

  The client goes away when the event `disconnect` is set.
  """
  import json
  sent = iter([{'type': 'http.request', 'body': json.dumps(body).encode(), 'more_body': False}])
  parts = []

  async def receive():
    for message in sent:
      return message
    await (disconnect or asyncio.Event()).wait()
    return {'type': 'http.disconnect'}

  async def send(message):
    parts.append(message)

  async def run():
    scope = {'type': 'http', 'method': 'POST', 'path': path, 'raw_path': path.encode(), 'query_string': b'',
             'headers': [(b'host', b'x')], 'asgi': {'spec_version': '2.3'}, 'scheme': 'http', 'root_path': '',
             'http_version': '1.1', 'client': None, 'server': None}
    await app(scope, receive, send)
    return parts[0]['status'], dict(parts[0]['headers']), b''.join(part.get('body', b'') for part in parts[1:])
  task = asyncio.create_task(run())
  task.parts = parts
  return task


async def until(condition):
  for _ in range(4000):
    if condition():
      return
    await asyncio.sleep(.005)
  raise AssertionError('it did not happen')


@pytest.mark.parametrize('stream', (False, True))
def test_a_client_that_goes_away_frees_its_row_within_a_step(stream):
  steps = Steps()
  engine = ScriptedEngine(FOREVER, rows=1, wait=steps)

  async def main(app, thread):
    disconnect = asyncio.Event()
    first, second = post(app, '/v1/completions', {**BODY, 'stream': stream}, disconnect), None
    await until(lambda: engine.remaining)
    second = post(app, '/v1/completions', {**BODY, 'max_tokens': 2})
    await until(lambda: thread.count == 2)
    steps.allow(3)
    await until(lambda: engine.steps == 3)
    disconnect.set()
    await first
    await until(lambda: thread.count == 1 or steps.allow_next())
    assert engine.steps <= 5   # the step that it computed, and those that this test allowed to see the end
    steps.allow(10)
    assert (await second)[0] == 200

  with application(engine) as (app, thread):
    asyncio.run(main(app, thread))
    assert len(engine.aborted) == 1 and thread.count == 0


def test_a_queue_that_is_full_refuses_and_what_waits_is_written():
  steps = Steps()
  engine = ScriptedEngine(text_script('abc'), rows=2, wait=steps)

  async def main(app, thread):
    accepted = [post(app, '/v1/completions', {**BODY, 'n': 2}) for _ in range(2)]
    await until(lambda: thread.count == 4)
    status, headers, body = await post(app, '/v1/completions', BODY)
    assert status == 429 and headers[b'retry-after'] == b'1' and b'rate_limit_error' in body
    steps.allow(100)
    for task in accepted:
      status, _, body = await task
      assert status == 200 and body.count(b'abc') == 2
    assert (await post(app, '/v1/completions', BODY))[0] == 200

  with application(engine, most=4) as (app, thread):
    asyncio.run(main(app, thread))


@pytest.mark.parametrize('stream', (False, True))
def test_an_answer_that_takes_too_long_is_refused_and_frees_its_row(stream):
  steps = Steps()
  engine = ScriptedEngine(FOREVER, wait=steps)

  async def main(app, thread):
    status, _, body = await post(app, '/v1/completions', {**BODY, 'stream': stream})
    assert (status == 504 or stream) and b'not whole after 0.05 seconds' in body and b'[DONE]' not in body
    steps.allow(2)
    await until(lambda: thread.count == 0)

  with application(engine, seconds=.05) as (app, thread):
    asyncio.run(main(app, thread))
  assert len(engine.aborted) == 1


def test_an_engine_that_fails_tells_every_client(capfd):
  def fail():
    raise RuntimeError('no memory')

  async def main(app, thread):
    results = await asyncio.gather(*(post(app, '/v1/completions', {**BODY, 'stream': stream})
                                     for stream in (False, True, False)))
    assert all(status in (200, 500, 503) and b'the engine has stopped: no memory' in body
               for status, _, body in results)
    assert (await post(app, '/v1/embeddings', {'input': 'a'}))[0] == 503

  with application(ScriptedEngine(FOREVER, wait=fail)) as (app, thread):
    asyncio.run(main(app, thread))
  assert 'RuntimeError: no memory' in capfd.readouterr().err


def test_what_comes_while_the_engine_stops_is_told():
  deliveries = []
  thread = serve.EngineThread(ScriptedEngine(FOREVER))
  request = Request([97])
  thread.submit([request], lambda *event: deliveries.append(event), thread.close)   # after it accepted them
  (failed_request, error), = deliveries
  assert failed_request is request and error.status == 500 and 'has stopped' in str(error) and thread.count == 0

  futures, has_run, thread = [], threading.Event(), serve.EngineThread(ScriptedEngine(FOREVER))

  def fail():
    futures.append(thread.start(lambda: None))
    has_run.set()
    raise SystemExit('no memory')

  thread.start(fail)
  assert has_run.wait(20)
  with pytest.raises(api_errors.ApiError, match='has stopped: no memory'):
    futures[0].result(20)


def test_a_request_that_the_engine_refuses_counts_no_more_when_its_client_knows_of_it():
  class Refusing(ScriptedEngine):
    def submit(self, request):
      raise ValueError('it is too long')

  counts, thread = [], serve.EngineThread(Refusing(FOREVER))
  thread.submit([Request([97], choices=3)], lambda _, error: counts.append((thread.count, str(error))), lambda: None)
  thread.start(lambda: None).result(20)
  thread.close()
  assert counts == [(0, 'it is too long')]


def test_a_stop_string_frees_the_row_of_its_choice_within_a_step_and_the_others_go_on():
  steps = Steps()
  engine = ScriptedEngine(lambda request, choice: b'xa' + b'-' * 49 if choice else b'yyyyyyya' + b'-' * 50, rows=2,
                          wait=steps)

  async def main(app, thread):
    task = post(app, '/v1/completions', {**BODY, 'n': 2, 'stop': 'a', 'max_tokens': 51})
    await until(lambda: engine.remaining)
    waiting = post(app, '/v1/completions', {**BODY, 'max_tokens': 2})
    await until(lambda: thread.count == 3)
    steps.allow(2)   # the end of the second choice
    await until(lambda: len(engine.aborted) == 1 or steps.allow_next())
    assert engine.steps <= 4
    steps.allow(3)
    assert (await waiting)[0] == 200 and not task.done()   # it has the row of the second choice
    steps.allow(10)
    status, _, body = await task
    assert status == 200 and body.count(b'"finish_reason":"stop"') == 2 and b'"yyyyyyy"' in body and b'"x"' in body
    await until(lambda: thread.count == 0 or steps.allow_next())

  with application(engine) as (app, thread):
    asyncio.run(main(app, thread))
  assert engine.steps <= 20
