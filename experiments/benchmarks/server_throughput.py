"""How many tokens a second does the server write for 16 clients, compared with one? And how long is the first awaited?

  python experiments/benchmarks/server_throughput.py --rounds=3
  python experiments/benchmarks/server_throughput.py --other=http://127.0.0.1:8001/v1    # beside another server

The model is a random GPT-2 of 124M parameters, float32, or `--model`. One server has one row and one client; another
has a row for each of its clients, and is measured with one client too, since a row that is not used costs time. All
take turns. `--other` is the address of a server of OpenAI's protocol that has the same model, such as llama.cpp's; it
is measured with one client and with all. The last line is the time that the scheduler itself takes between two steps
of the model, without the threads that send answers. Use the machine for nothing else meanwhile. Linux only.
"""
import collections
import concurrent.futures
import contextlib
import dataclasses
import http.client
import json
import pathlib
import statistics
import tempfile
import time
import urllib.parse
from typing import Any

from interleaved import in_process, machine, open_folder
from served_models import server, write_model

from lm import launch

_PROMPT = 'A prompt of some thirty letters: '
_LONG_PROMPT = (_PROMPT * 4)[:128]


@dataclasses.dataclass(frozen=True)
class Served:
  """A server that listens at an address, and the number of clients that it is measured with."""
  address: str   # of the API, such as http://127.0.0.1:8000/v1
  model: str     # its name in requests
  clients: int

  def complete(self, prompt: str, new_tokens: int) -> int:
    """Returns the number of tokens of an answer."""
    url = urllib.parse.urlsplit(self.address)
    connection = http.client.HTTPConnection(url.netloc, timeout=600)
    body = {'model': self.model, 'prompt': prompt, 'max_tokens': new_tokens, 'temperature': 0}
    connection.request('POST', f'{url.path}/completions', json.dumps(body), {'Content-Type': 'application/json'})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    if response.status != 200:
      raise RuntimeError(f'{self.address} answers with status {response.status}: {answer[:200].decode()}')
    return json.loads(answer)['usage']['completion_tokens']

  def tokens_per_second(self, requests: int, new_tokens: int) -> float:
    """Returns the rate of answers to all clients, of which each sends `requests` requests, one after the other."""
    def client(number: int) -> int:
      return sum(self.complete(f'{number} {i} {_PROMPT}', new_tokens) for i in range(requests))

    start = time.perf_counter()
    with concurrent.futures.ThreadPoolExecutor(self.clients) as pool:
      count = sum(pool.map(client, range(self.clients)))
    return count / (time.perf_counter() - start)

  def first_token(self) -> float:
    """Returns the seconds until an answer of one token to a prompt of 128 letters, which no earlier prompt shares."""
    start = time.perf_counter()
    self.complete(f'{start} {_LONG_PROMPT}'[:128], 1)
    return time.perf_counter() - start


class Timed:
  """An engine that adds up the seconds from the start of each step of the model to its result."""

  def __init__(self, engine: Any):
    self._engine, self.seconds = engine, 0.

  def __getattr__(self, name: str) -> Any:
    return getattr(self._engine, name)

  def step(self, *args: Any) -> Any:
    """Returns what the step of the engine returns, when it is computed."""
    import jax
    start = time.perf_counter()
    out = jax.block_until_ready(self._engine.step(*args))
    self.seconds += time.perf_counter() - start
    return out


def host_seconds(folder: pathlib.Path, rows: int, new_tokens: int) -> float:
  """Returns the median of the seconds of a step of the scheduler beside those of the model, with all rows in use."""
  model, params = open_folder(folder, sets_mesh=False)
  from lm import generate
  scheduler = generate.Scheduler(generate.Engine(model, model.unstack(params), 512, 256, [-1]), rows)
  scheduler.engine = engine = Timed(scheduler.engine)
  scheduler.warm_up()
  for seed in range(rows):
    scheduler.submit(generate.Request([seed] * 32, generate.Sampling(1., top_p=.9), max_tokens=new_tokens, seed=seed))
  while scheduler.waiting:
    scheduler.step()
  seconds = []
  while scheduler.running == rows:
    start, before = time.perf_counter(), engine.seconds
    scheduler.step()
    seconds.append(time.perf_counter() - start - (engine.seconds - before))
  return statistics.median(seconds)


def throughput(*, model: pathlib.Path | None = None, other: str | None = None, clients: int = 16, rounds: int = 3,
               requests: int = 2, new_tokens: int = 48) -> None:
  """Prints the tokens a second of each server, and their ratio to those of one row and one client.

  Args:
    model: a Hugging Face folder; none for a random GPT-2 of 124M parameters.
    other: the address of the API of another server, such as http://127.0.0.1:8001/v1.
    clients: that send requests at the same time.
    rounds: number of rounds, through all servers in turn.
    requests: that each client sends in a round.
    new_tokens: of each answer.
  """
  if min(clients, rounds, requests, new_tokens) < 1:
    raise ValueError(f'clients={clients}, rounds={rounds}, requests={requests} and new_tokens={new_tokens} must be 1 '
                     'or more')
  machine('jax')
  rates, firsts = collections.defaultdict(list), collections.defaultdict(list)
  with contextlib.ExitStack() as stack:
    if model is None:
      root = stack.enter_context(tempfile.TemporaryDirectory())
      in_process(write_model, root, 768, 12, 12, 50_257)
      model = pathlib.Path(root, 'exported')
    ports = [stack.enter_context(server(model, f'--rows={rows}', '--context=256'))[1] for rows in (1, clients)]
    one_row, all_rows = (f'http://127.0.0.1:{port}/v1' for port in ports)
    arms = {'one row, one client': Served(one_row, model.name, 1),
            f'{clients} rows, one client': Served(all_rows, model.name, 1),
            f'{clients} rows, {clients} clients': Served(all_rows, model.name, clients)}
    if other is not None:
      arms |= {f'other, {count} clients': Served(other, model.name, count) for count in (1, clients)}
    for served in arms.values():
      served.complete(_PROMPT, 2)
    for number in range(rounds):
      for name in list(arms)[::-1 if number % 2 else 1]:
        rates[name].append(arms[name].tokens_per_second(requests, new_tokens))
        firsts[name].append(arms[name].first_token())
    for name in arms:
      ratios = sorted(a / b for a, b in zip(rates[name], rates['one row, one client']))
      print(f'  {name:24} {statistics.median(rates[name]):8.1f} tokens/s, {statistics.median(ratios):5.2f} times '
            f'({ratios[0]:.2f} to {ratios[-1]:.2f}); first token after {statistics.median(firsts[name]):.3f} s')
    print(f'  between two steps of {clients} rows, the scheduler takes '
          f'{in_process(host_seconds, model, clients, new_tokens) * 1e3:.2f} ms')


if __name__ == '__main__':
  launch.tool(throughput)
