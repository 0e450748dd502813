"""Folders of weights: their tensors and their bytes."""
import functools
import json

import jax.numpy as jnp
import numpy as np

from lm.hf import files

DTYPES = ('bool', 'uint8', 'int8', 'int16', 'uint16', 'float16', 'int32', 'uint32', 'float32', 'float64', 'int64',
          'uint64', jnp.bfloat16, jnp.float8_e4m3fn, jnp.float8_e5m2)
SINGLE, INDEX = 'model.safetensors', 'model.safetensors.index.json'


def array(shape, dtype=np.float32, start=0):
  return (np.arange(start, start + np.prod(shape, dtype=int)) % 2).reshape(shape).astype(dtype)


def example():
  """Returns tensors of every dtype, with odd sizes, a scalar, an empty tensor, and a name outside ASCII."""
  return {f't.{np.dtype(dtype).name}': array((3, i + 1), dtype, i) for i, dtype in enumerate(DTYPES)} | {
      'scalar': np.float32(3), 'empty': np.zeros((2, 0, 5), np.float16), 'é "quoted"': array((7,), np.uint8)}


def write(folder, tensors, **options):
  files.write(folder, {name: (x.shape, x.dtype, functools.partial(np.asarray, x)) for name, x in tensors.items()},
              **options)
  return folder


def same(weights, tensors):
  assert set(weights) == set(tensors)
  for name, x in tensors.items():
    assert (weights[name].shape, weights[name].dtype, weights[name].tobytes()) == (x.shape, x.dtype, x.tobytes())


def raw(header, data=b''):
  text = header if isinstance(header, bytes) else json.dumps(header).encode()
  return len(text).to_bytes(8, 'little') + text + data


def put(folder, **contents):
  """Writes the files of a folder: `a=...` is a.safetensors, and `index=...` the map of weights."""
  folder.mkdir(parents=True, exist_ok=True)
  for name, content in contents.items():
    if name == 'index':
      (folder / INDEX).write_text(json.dumps({'metadata': {}, 'weight_map': content}))
    else:
      (folder / f'{name}.safetensors').write_bytes(content)
  return folder


def tensor(shape=(2,), begin=0, dtype='U8'):
  return {'dtype': dtype, 'shape': list(shape), 'data_offsets': [begin, begin + int(np.prod(shape))]}
