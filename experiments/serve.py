r"""Serves a trained run or a Hugging Face model: a chat page, and the endpoints of OpenAI's protocol.

  python experiments/serve.py --model=runs/quickstart
  python experiments/serve.py --model=gpt2 --port=8001
  curl -s http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \
    -d '{"prompt": "def ", "max_tokens": 40}'

Prints the address when it answers. Needs `pip install -e '.[serve]'`.
"""
import contextlib
import dataclasses
import functools
import os
import pathlib
import sys
from typing import Any, Literal

import jax

from lm import generate, launch, named, serve, sharding
from lm.options import ServedDrafts


def _slots(decoder: Any, context: int | None) -> int:
  """Returns the number of tokens of the longest text. Raises ValueError for more than the model reads at once."""
  longest = generate.longest_text(decoder)
  if context is not None and context > longest:
    raise ValueError(f'context={context} is more than the {longest} tokens that the model reads at once; give less')
  return context or min(longest, 1024 if decoder.reads_source else 4096)


def _drafting_engine(model: str, slots: int, weights: str) -> generate.Engine:
  """Returns the engine of a model that drafts tokens of texts of up to `slots` tokens."""
  decoder, params, tokenizer, _ = named.to_serve(model, False, weights)
  return generate.Engine(decoder, params, slots, tokenizer.vocab_size, tokenizer.eos_ids)


def _scheduler(engine: generate.Engine, rows: int, pages: int | None, drafter: Any) -> generate.Scheduler:
  """Returns a scheduler; prints what it cannot do: texts as long as a context, or prompts that share pages."""
  scheduler = generate.Scheduler(engine, rows, pages=pages, drafter=drafter)
  if scheduler.context < engine.slots:
    print(f'--pages={pages} have room for texts of {scheduler.context} tokens, a prompt and its answer together',
          file=sys.stderr)
  if scheduler.sharing_obstacle is not None:
    print(f'each prompt is read from its beginning, as prompts share nothing: {scheduler.sharing_obstacle}',
          file=sys.stderr)
  return scheduler


def main(*, model: str = 'runs/quickstart', adapters: tuple[str, ...] = (), best: bool = False, name: str | None = None,
         host: str = '127.0.0.1', port: int = 8000, rows: int = 8, context: int | None = None, pages: int | None = None,
         waiting: int = 64, api_key: str | None = None, cors: tuple[str, ...] = (), max_tokens: int | None = None,
         max_body: int = 1 << 20, deadline: float = 600, drain: int = 60,
         weights: Literal['float32', 'int8', 'int4'] = 'float32', mesh: str | None = None,
         drafting: ServedDrafts = ServedDrafts()) -> None:
  """Serves a model until Ctrl-C or SIGTERM; answers that are being written are finished first.

  Args:
    model: the workdir of a run, a Hugging Face folder, an imported model, or an id on the hub.
    adapters: runs that trained adapters of the model with --lora_rank, as name=workdir, several of them after commas. A
      request chooses one by giving its name as the model.
    best: use the best checkpoint of a run by its metric, instead of the newest.
    name: how clients name the model; none for the name of its folder, or its id.
    host: the address to listen on; 0.0.0.0 opens the server to the network.
    port: 0 takes any that is free.
    rows: answers that are written at the same time; others wait.
    context: the longest text, a prompt and its answer together, in tokens; none for that of the model, 4096 at most.
      For an encoder-decoder, the longest prompt, and the longest answer; none for 1024.
    pages: pages of the cache, of 64 tokens each: prompts that begin alike share those of the beginning, which is read
      once, as in a conversation that goes on. None for a whole context for each row; 0 for a cache without pages, as on
      a mesh that splits rows.
    waiting: answers that may wait; a request for more is refused with status 429.
    api_key: what clients have to send as a bearer token; none for the environment variable LM_API_KEY, or for no key.
    cors: origins of other web pages that may use the server, such as https://example.org.
    max_tokens: the most tokens of an answer; none for what the context has room for.
    max_body: the most bytes of a request.
    deadline: seconds after which an answer that is not whole is refused.
    drain: seconds that answers have to end in when the server is stopped.
    weights: int8 or int4 rounds the matrices of a decoder, to a quarter or a fifth of the memory. For one device.
    mesh: the size of each mesh axis, such as fsdp:4,tensor:2; none puts all devices on fsdp.
  """
  if min(rows, max_body, drain) < 1 or waiting < 0 or not deadline > 0 or max_tokens is not None and max_tokens < 1:
    raise ValueError(f'rows={rows}, max_body={max_body}, drain={drain}, deadline={deadline:g} and '
                     f'max_tokens={max_tokens} must be at least 1, and waiting={waiting} at least 0')
  if context is not None and context < 2:
    raise ValueError(f'context={context} must be at least 2: a token of a prompt, and one of an answer')
  serve.check_packages()   # before the model is read, which may take long
  name = name or (pathlib.Path(model).resolve().name if pathlib.Path(model).is_dir() else model)
  stored = named.adapters(adapters, model, name, best)
  listener = serve.listen(host, port)
  mesh = sharding.make_mesh(mesh)
  with jax.set_mesh(mesh):
    decoder, params, tokenizer, template = named.to_serve(model, best, weights, list(stored.values()))
  on_mesh = functools.partial(jax.set_mesh, mesh) if weights == 'float32' else contextlib.nullcontext
  with on_mesh():
    engine = generate.Engine(decoder, params, _slots(decoder, context), tokenizer.vocab_size, tokenizer.eos_ids)
    drafter = drafting.make(lambda name: _drafting_engine(name, engine.slots, weights))
    scheduler = _scheduler(engine, rows, pages, drafter)
  print(f'{model} is open; its programs are compiled now, or read from disk where they are kept', file=sys.stderr)
  thread = serve.EngineThread(scheduler, rows + waiting, on_mesh)
  thread.start(scheduler.warm_up).result()
  served = serve.ServedModel(name, decoder, params, tokenizer, scheduler.context, template)
  models = [served, *(dataclasses.replace(served, name=own, template=run.run.data.template or template, adapter=i)
                      for i, (own, run) in enumerate(stored.items(), 1))]
  key = api_key or os.environ.get('LM_API_KEY') or None
  if key is None and not serve.hosts(host):
    print('anyone on the network can use this server; --api_key=... asks for a key', file=sys.stderr)
  app = serve.application(models, thread, serve.Limits(key, cors, serve.hosts(host), max_body, max_tokens, deadline))
  print(f'{served.name} answers at {serve.address(listener)} (a {"chat" if template else "completion"} page; the base '
        'URL of clients is this and /v1); Ctrl-C stops it', flush=True)
  serve.serve(app, listener, drain, lambda: thread.count)
  thread.close()


if __name__ == '__main__':
  launch.tool(main)
