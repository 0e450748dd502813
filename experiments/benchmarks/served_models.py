"""Servers of random models, for the benchmarks of the server."""
import contextlib
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

_SERVER = pathlib.Path(__file__).parents[1] / 'serve.py'


def write_model(folder: str, width: int = 64, layers: int = 4, heads: int = 4, vocab: int | None = None) -> None:
  """Writes a random GPT-2 whose tokens are bytes, and whose `vocab`, if given, has ids that are no tokens."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax

  from lm.data.tokenizers.folder import Bytes
  from lm.hf import pretrained
  from lm.models import transformer
  tokenizer = Bytes()
  model = transformer.gpt2(vocab or tokenizer.vocab_size, width, layers, heads, max_length=512)
  pretrained.write(pathlib.Path(folder, 'exported'), model, jax.jit(model.init)(jax.random.key(0)), tokenizer)


@contextlib.contextmanager
def server(folder: pathlib.Path, *flags: str) -> Iterator[tuple[subprocess.Popen, int]]:
  """Yields the process of a server with these flags, and its port."""
  process = subprocess.Popen([sys.executable, str(_SERVER), f'--model={folder}', '--port=0', *flags],
                             stdout=subprocess.PIPE, text=True)
  try:
    line = next((line for line in process.stdout if ' answers at http://' in line), None)
    if line is None:
      raise RuntimeError(f'the server ended with exit code {process.wait()} before it answered')
    yield process, int(line.split(' answers at http://')[1].split()[0].rpartition(':')[2])
  finally:
    process.kill()
    process.communicate()
