"""An engine that writes what a test scripts, and a server of it; no step waits for a compiled program."""
import contextlib
import dataclasses
import threading
import time

import numpy as np
from helpers import decoders

from lm import serve
from lm.data.chat import Turns
from lm.data.tokenizers.base import Bytes
from lm.generate import Event, Scores

CONTROL = ('<|system|>', '<|user|>', '<|assistant|>', '<|end|>')
TOKENS = Bytes(CONTROL)
CHAT = Turns()
ENDS = TOKENS.eos_id, TOKENS.control_id('<|end|>')


class ScriptedEngine:
  """Writes `script(request, choice)`, token ids, of each choice, `size` tokens at a step, in `rows` rows.

  `wait` is called at the beginning of each step.
  """
  compilations, pool, drafter = 0, None, None

  def __init__(self, script, size=1, rows=4, wait=lambda: None):
    self.script, self.size, self.rows, self.wait = script, size, rows, wait
    self.remaining, self.aborted, self.steps, self._events = {}, [], 0, []
    self._starts = {}

  @property
  def running(self):
    return min(len(self.remaining), self.rows)

  @property
  def waiting(self):
    return len(self.remaining) - self.running

  @property
  def is_busy(self):
    return bool(self.remaining or self._events)

  def submit(self, request):
    self._starts[request] = time.perf_counter()
    for choice in range(request.choices):
      self.remaining[request, choice] = list(self.script(request, choice))[:request.max_tokens]

  def abort(self, request, choice=None):
    self.aborted.append(request)
    for name in list(self.remaining):
      if name[0] is request and choice in (None, name[1]):
        del self.remaining[name]
        self._events.append(Event(*name, [], self._scores(request, []), 'abort'))

  def step(self):
    self.wait()
    self.steps += 1
    events, self._events = self._events, []
    return events + [self._event(*name) for name in list(self.remaining)[:self.rows]]

  def _event(self, request, choice):
    name, prompt = (request, choice), None
    ids, self.remaining[name] = self.remaining[name][:self.size], self.remaining[name][self.size:]
    finish = None
    if not self.remaining[name]:
      finish = 'stop' if set(ids) & set(ENDS) else 'length'
      del self.remaining[name]
    if request.scores_prompt:
      prompt = self._scores(request, request.ids[1:])
    return Event(request, choice, ids, self._scores(request, ids), finish, prompt, self._starts[request])

  def _scores(self, request, ids):
    """Returns scores by which token i is the most probable one, and the tokens after it follow."""
    top = np.arange(request.top)
    values = -.25 * (1 + np.asarray(ids, int) % 7)
    return Scores(values, np.asarray(ids, int)[:, None] + top, values[:, None] - top)


def text_script(text, ends=True):
  """Returns a script that writes a text, byte by byte, and ends it."""
  return lambda request, choice: [*text.encode(), *([TOKENS.eos_id] if ends else [])]


@contextlib.contextmanager
def application(engine, template=CHAT, most=12, model=None, tokenizer=TOKENS, context=128, name='tiny', adapters=None,
                **limits):
  """Yields the application of a server and the thread of its engine. `adapters` are templates by name."""
  model, params = model or decoders.make()
  thread = serve.EngineThread(engine, most)
  try:
    model = serve.ServedModel(name, model, params, tokenizer, context, template)
    others = [dataclasses.replace(model, name=each, template=own, adapter=i)
              for i, (each, own) in enumerate((adapters or {}).items(), 1)]
    yield serve.application([model, *others], thread, serve.Limits(**limits)), thread
  finally:
    thread.close()


@contextlib.contextmanager
def address_of(engine, *args, **kwargs):
  """Yields the address of a server that listens on a port of this machine."""
  import uvicorn
  with application(engine, *args, **kwargs) as (app, _):
    # A new configuration of logging would close the streams of earlier handlers, which may be pytest's own.
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, log_level='error', lifespan='off', ws='none',
                                           http='h11', timeout_graceful_shutdown=1))
    listener = serve.listen('127.0.0.1', 0)
    thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]})
    thread.start()
    try:
      yield serve.address(listener)
    finally:
      server.should_exit = True
      thread.join()
      listener.close()


@contextlib.contextmanager
def client_of(engine, *args, **kwargs):
  """Yields a client of a server whose engine is `engine`."""
  from starlette.testclient import TestClient
  with application(engine, *args, **kwargs) as (app, _), TestClient(app, raise_server_exceptions=False) as client:
    yield client
