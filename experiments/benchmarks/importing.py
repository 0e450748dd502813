"""How fast are weights imported, compared with `transformers`, on this CPU? 1.2 billion parameters in bfloat16.

  python experiments/benchmarks/importing.py --rounds=1

The arm `import` does what import_hf.py does: it reads the weights and writes a checkpoint. `open` only reads the
weights, and `read` only the bytes of the file. Use the machine for nothing else meanwhile. Linux only. Install PyTorch
and transformers with pip install 'lm[benchmark]'.
"""
import os
import pathlib
import tempfile

import interleaved
from interleaved import Prepared

from lm import launch  # nothing slow here: the imports of an arm count in its memory and its start-up time


def write_model(folder: pathlib.Path) -> None:
  """Writes a random model of the shape of Llama 3.2 1B."""
  import jax
  import jax.numpy as jnp
  import numpy as np

  from lm.data.tokenizers.folder import Bytes
  from lm.hf import pretrained
  from lm.models import transformer
  model, rng = transformer.llama(128_256, 2048, 16, 32, kv_heads=8, hidden=8192), np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32).astype(jnp.bfloat16),
                        jax.eval_shape(model.init, jax.random.key(0)))
  pretrained.write(folder, model, params, Bytes(('<|bos|>', '<|eos|>')))


def ours_import(folder: pathlib.Path) -> Prepared:
  """An arm that reads the weights and writes a checkpoint."""
  os.environ['JAX_PLATFORMS'] = 'cpu'
  import jax

  from lm import sharding
  from lm.hf import pretrained

  def step():
    with tempfile.TemporaryDirectory() as out, jax.set_mesh(sharding.make_mesh()):
      pretrained.save(str(folder), pathlib.Path(out) / 'imported')
  return step, {}


def ours_open(folder: pathlib.Path) -> Prepared:
  """An arm that reads the weights."""
  def step():
    interleaved.open_folder(folder)
  return step, {}


def theirs_open(folder: pathlib.Path) -> Prepared:
  """An arm that opens the weights with `transformers`, and reads each once."""
  torch, transformers = interleaved.torch_library(), interleaved.transformers_library()

  def step():
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    with torch.inference_mode():   # the file is memory-mapped: the first use of a weight reads it from disk
      for parameter in model.parameters():
        parameter.float().sum()
  return step, {}


def benchmark(*, rounds: int = 3) -> None:
  """Prints a table.

  Args:
    rounds: number of rounds.
  """
  if rounds < 1:
    raise ValueError(f'--rounds={rounds} must be 1 or more')
  interleaved.machine('jax', 'jaxlib', 'torch', 'transformers')
  with tempfile.TemporaryDirectory() as root:
    folder = pathlib.Path(root) / 'large'
    interleaved.in_process(write_model, folder)
    file = folder / 'model.safetensors'
    size = file.stat().st_size
    results = interleaved.compare(f'import of {size / 1e9:.2f} GB', {
        'import': (ours_import, folder), 'open': (ours_open, folder), 'transformers': (theirs_open, folder),
        'read': (interleaved.read_file, file)}, size // 10 ** 6, rounds, 1, 'MB')
    print('  peak memory relative to the file:',
          ', '.join(f'{name} {result.peak * 1e9 / size:.2f}x' for name, result in results.items()))


if __name__ == '__main__':
  launch.tool(benchmark)
