"""Small random decoders, and functions that decode with them."""
import jax
import numpy as np
from jax.sharding import NamedSharding

from lm import generate
from lm.generate import completion
from lm.models import transformer

GREEDY = generate.Sampling(temperature=0)

PROMPTS = ['def f(x):', '', 'a longer prompt, 27 bytes.', 'def f(x):']


class Bytes:
  """A tokenizer with one token per byte of UTF-8, as few members as generation needs, and a bos before each prompt."""
  vocab_size, bos_id, eos_id, adds_bos = 258, 256, 257, True

  @property
  def eos_ids(self):
    return (self.eos_id,)

  def encode_batch(self, texts):
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

  def decode_bytes(self, ids):
    return bytes(int(i) for i in ids if i < 256)

  def decode(self, ids):
    return self.decode_bytes(ids).decode(errors='replace')


def make(family=transformer.llama, mesh=None, **kwargs):
  """Returns (model, params): a tiny random decoder whose greedy text varies, with 264 rows for 258 token ids."""
  model = family(264, 32, 2, 4, max_length=128, **kwargs)
  rng = np.random.default_rng(0)

  def value(path, like):   # NumPy draws the values, because compiling the initializer would take longer
    x = rng.normal(0, 0.03 if 'bias' in path[-1].key else 0.6, like.shape).astype(np.float32)
    return jax.device_put(x, mesh and NamedSharding(mesh, like.sharding.spec))

  return model, jax.tree.map_with_path(value, jax.eval_shape(model.init, jax.random.key(0)))


def rows_of(model, params, prompts, sampling, n, seed=0, tokenizer=None, draft=None):
  """Returns the new token ids of each prompt as one array: up to the end of its text, and at most `n`."""
  tokenizer = tokenizer or Bytes()
  ids = tokenizer.encode_batch(prompts)
  request = completion.Completion(model, params, tokenizer, sampling, n, seed, draft)
  pieces = completion.complete(request, ids, completion.prompt_batch(model, ids, tokenizer))
  return [np.concatenate(row) for row in zip(*pieces)]


def tokens_of(*args, **kwargs):
  """Returns the rows of `rows_of` as one array [prompts, n], padded with eos."""
  rows, n = rows_of(*args, **kwargs), args[4]
  eos = (kwargs.get('tokenizer') or Bytes()).eos_ids[0]
  return np.stack([np.pad(row, (0, n - len(row)), constant_values=eos) for row in rows])


def text_of(ids, tokenizer=None, prompt=(), stop=()):
  """Returns the strings that the streaming decoder gives: one after each token id, and one at the end."""
  text = generate.TextStream(tokenizer or Bytes(), np.int32(prompt), stop)
  return [text.push(i) for i in ids] + [text.end()]
