"""Does a server that runs for long keep its memory, rows and pages? Clients come, and many go away in the middle.

  python experiments/benchmarks/server_soak.py

The server is a process of its own, with a small random GPT-2 whose tokens are bytes. Each client sends one request
after the other: prompts, settings, numbers of choices, stop strings and formats are random, and a part of the clients
closes its connection while the answer is being written. At the end no row and no page is in use, nothing has been
compiled, and memory has grown by 5 % at most since a tenth of the time; otherwise the exit code is 1. Linux only.
"""
import collections
import http.client
import json
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time

from interleaved import in_process, machine
from served_models import server, write_model

from lm import launch

_FIGURES = ('vllm:num_requests_running', 'vllm:num_requests_waiting', 'vllm:kv_cache_usage_perc',
            'lm:compilations_after_warmup')


def random_body(rng: random.Random) -> dict[str, object]:
  """Returns the body of a completion."""
  shared = 'The beginning that many prompts share, which is longer than a page of sixty-four tokens. '
  body = {'prompt': rng.choice(['', shared]) + 'x' * rng.randint(0, 90), 'max_tokens': rng.randint(1, 80),
          'top_p': rng.choice([1, .9]), **rng.choice([{'temperature': 0}, {'n': 3}, {'n': 2, 'temperature': .8}]),
          'logprobs': rng.choice([None, 2]), 'stop': rng.choice([None, ['e'], ['\n', 'th']]),
          'stream': rng.random() < .7}
  if rng.random() < .2:
    body['structured_outputs'] = rng.choice([{'regex': '[a-z]{1,40}'}, {'json': {'type': 'integer'}}])
  return body


class Clients:
  """Threads that send requests until `end` is set, and `counts`, by what became of the requests."""

  def __init__(self, port: int, count: int, disconnects: float, seed: int):
    self._port, self._disconnects = port, disconnects
    self.end, self.counts = threading.Event(), collections.Counter()
    self._threads = [threading.Thread(target=self._run, args=(random.Random(f'{seed} {i}'),)) for i in range(count)]
    for thread in self._threads:
      thread.start()

  def join(self) -> None:
    self.end.set()
    for thread in self._threads:
      thread.join()

  def _run(self, rng: random.Random) -> None:
    while not self.end.is_set():
      connection = http.client.HTTPConnection('127.0.0.1', self._port, timeout=300)
      try:
        outcome = self._request(connection, rng)
      except (OSError, http.client.HTTPException) as error:
        outcome = f'failed: {type(error).__name__}'
      finally:
        connection.close()
      self.counts[outcome] += 1   # the interpreter's lock makes lost counts unlikely, and none decides anything

  def _request(self, connection: http.client.HTTPConnection, rng: random.Random) -> str:
    body = random_body(rng)
    connection.request('POST', '/v1/completions', json.dumps(body), {'Content-Type': 'application/json'})
    if rng.random() < self._disconnects:
      if body['stream']:
        connection.getresponse().read(rng.randint(1, 2000))
      else:
        self.end.wait(rng.random() / 2)
      return 'disconnected'
    response = connection.getresponse()
    text = response.read()
    if response.status == 429:
      self.end.wait(.1)
      return 'refused, the queue is full'
    is_whole = text.endswith(b'data: [DONE]\n\n') if body['stream'] else b'"finish_reason"' in text
    if response.status == 200 and is_whole:
      return 'answered'
    return f'failed: status {response.status}, {text[-300:].decode()}'


def figures(port: int) -> dict[str, float]:
  """Returns the figures of the server that have to be 0 at the end."""
  connection = http.client.HTTPConnection('127.0.0.1', port, timeout=60)
  connection.request('GET', '/metrics')
  lines = connection.getresponse().read().decode().splitlines()
  connection.close()
  return {name: float(line.rpartition(' ')[2]) for line in lines for name in _FIGURES if line.startswith(f'{name}{{')}


def megabytes(process: subprocess.Popen) -> float:
  """Returns the memory of a process that is in use."""
  status = pathlib.Path(f'/proc/{process.pid}/status').read_text()
  return int(status.split('VmRSS:')[1].split()[0]) / 1024


def soak(*, minutes: float = 10, clients: int = 6, disconnects: float = 0.33, seed: int = 0) -> None:
  """Prints ten lines while it runs, and what is left at the end.

  Args:
    minutes: how long clients come.
    clients: that send requests at the same time.
    disconnects: the share of requests whose client goes away before the end of the answer.
    seed: of the requests.
  """
  if not minutes > 0 or clients < 1 or not 0 <= disconnects <= 1:
    raise ValueError(f'minutes={minutes:g} must be above 0, clients={clients} at least 1, and disconnects='
                     f'{disconnects:g} from 0 to 1')
  machine('jax')
  with tempfile.TemporaryDirectory() as folder:
    in_process(write_model, folder)
    with server(pathlib.Path(folder, 'exported'), '--rows=4', '--waiting=16') as (process, port):
      load, memory = Clients(port, clients, disconnects, seed), []
      for i in range(10):
        time.sleep(6 * minutes)
        memory.append(megabytes(process))
        time_and_memory = f'{(i + 1) * minutes / 10:5.1f} min  {memory[-1]:6.0f} MB'
        print(f'{time_and_memory}  {dict(load.counts)}  {figures(port)}', flush=True)
      load.join()
      for _ in range(600):   # the rows of the last clients are free within a step
        if not any(figures(port).values()):
          break
        time.sleep(.1)
      last = figures(port)
      process.send_signal(signal.SIGTERM)
      code = process.wait(120)
  failed = [name for name in load.counts if name.startswith('failed')]
  growth = memory[-1] / memory[0] - 1
  print(f'at the end {last}; memory {growth:+.1%}; exit code of the server {code}; {dict(load.counts)}')
  if failed or any(last.values()) or growth > .05 or code:
    sys.exit(1)


if __name__ == '__main__':
  launch.tool(soak)
