"""Requests of lm-evaluation-harness per second: our client against the harness's own `hf` backend, on one model.

  python experiments/benchmarks/harness_requests.py

Both answer the same requests for log-probabilities, each in a process of its own, in turn; the model is a small random
GPT-2 of 4 layers, whose tokens are bytes. Reading the model and compiling are not counted. Use the machine for nothing
else meanwhile. Linux only. Install what it needs with pip install 'lm[benchmark,eval]' accelerate.
"""
import os
import pathlib
import tempfile
import types
from typing import Any

from interleaved import Prepared, compare, in_process, machine, open_folder, torch_library, transformers_library

from lm import launch  # nothing slow here: the imports of an arm count in its memory and its start-up time


def write_model(folder: str, width: int) -> None:
  """Writes a random GPT-2 whose tokens are bytes."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax

  from lm.data.tokenizers.folder import Bytes
  from lm.hf import pretrained
  from lm.models import transformer
  tokenizer = Bytes()
  model = transformer.gpt2(tokenizer.vocab_size, width, 4, 4, max_length=512)
  pretrained.write(pathlib.Path(folder, 'exported'), model, jax.jit(model.init)(jax.random.key(0)), tokenizer)


def requests(count: int) -> list[Any]:
  """Returns requests with contexts of 20 to 300 bytes, each with four continuations, as multiple choice has."""
  import numpy as np
  rng = np.random.default_rng(0)
  word = lambda size: ''.join(rng.choice(list('abcdefghij klmnop'), size=size))
  contexts = ['q' + word(rng.integers(20, 300)) + '?' for _ in range(-(-count // 4))]
  return [types.SimpleNamespace(args=(context, ' a' + word(rng.integers(4, 60)))) for context in contexts
          for _ in range(4)][:count]


def ours(folder: str, count: int) -> Prepared:
  """The arm of our client; it forgets its answers after each step."""
  model, params = open_folder(pathlib.Path(folder, 'exported'))
  from lm.data import tokenizers
  from lm.evaluate import harness
  tokenizer, items = tokenizers.load(pathlib.Path(folder, 'exported')), requests(count)
  make = harness.client_class()

  def step() -> float:
    scores = make(model, params, tokenizer).loglikelihood(items, disable_tqdm=True)
    return -sum(log_p for log_p, _ in scores) / count
  return step, {}


def theirs(folder: str, count: int, batch: int) -> Prepared:
  """The arm of the `hf` backend."""
  torch_library()
  transformers_library()
  from lm_eval.models.huggingface import HFLM
  client = HFLM(str(pathlib.Path(folder, 'exported')), device='cpu', dtype='float32', batch_size=batch)
  items = requests(count)
  return lambda: -sum(log_p for log_p, _ in client.loglikelihood(items, disable_tqdm=True)) / count, {}


def main(*, requests_per_step: int = 256, width: int = 128, batch: int = 16, rounds: int = 5) -> None:
  """Compares the two, and prints a table; the losses of both have to agree.

  Args:
    requests_per_step: requests that are answered between two looks at the clock.
    width: of the model.
    batch: the batch size of the hf backend.
    rounds: how often each is measured.
  """
  missing = machine('jax', 'torch', 'transformers', 'accelerate', 'lm_eval')
  if missing:
    raise ImportError(f"{', '.join(sorted(missing))}: not installed; pip install 'lm[benchmark,eval]' accelerate")
  with tempfile.TemporaryDirectory() as folder:
    in_process(write_model, folder, width)
    arms = {'lm': (ours, folder, requests_per_step), 'hf': (theirs, folder, requests_per_step, batch)}
    compare(f'log-probabilities, width {width}, batch {batch} of hf', arms, requests_per_step, rounds, 1, 'requests')


if __name__ == '__main__':
  launch.tool(main)
