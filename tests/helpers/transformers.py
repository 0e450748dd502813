"""Small decoders with random parameters, and batches for them."""
import jax
import jax.numpy as jnp
import numpy as np

from lm.data.batch import Batch
from lm.models import transformer

VOCAB, ROWS, TIME, THETA = 24, 3, 8, 100.

LLAMA = transformer.llama(VOCAB, 16, 2, heads=4, kv_heads=2, hidden=12, max_length=TIME, theta=THETA, tied=False)

GPT2 = transformer.gpt2(VOCAB, 8, 2, heads=2, max_length=TIME, remat=None)


def random_params(model, scale=0.4):
  """Returns random float32 parameters. None keeps its initial value, so that each of them affects the output."""
  rng = np.random.default_rng(0)
  return jax.tree_util.tree_map_with_path(
      lambda path, x: jnp.asarray((path[-1].key == 'scale') + scale * rng.normal(size=x.shape), jnp.float32),
      jax.eval_shape(model.init, jax.random.key(0)))


def make_batch(packed):
  """Returns a batch [ROWS, TIME] of distinct tokens with random targets and weights.

  If packed, the first row is one document, the second has two documents and padding, and the third has two documents
  with positions that are read in both directions.
  """
  rng = np.random.default_rng(1)
  batch = Batch(rng.permutation(VOCAB).reshape(ROWS, TIME).astype('i4'),
                rng.integers(0, VOCAB, (ROWS, TIME)).astype('i4'), rng.uniform(0.5, 2, (ROWS, TIME)).astype('f4'))
  if not packed:
    return batch
  segments = np.array([[1] * 8, [1, 1, 1, 2, 2, 2, 0, 0], [1, 1, 1, 1, 2, 2, 2, 2]], np.int32)
  positions = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 0, 1, 2, 0, 0], [0, 1, 2, 3, 0, 1, 2, 3]], np.int32)
  bidirectional = np.array([[0] * 8, [0] * 8, [1, 1, 0, 0, 0, 0, 1, 0]], bool)
  return batch._replace(weights=batch.weights * (segments > 0), segments=segments, positions=positions,
                        bidirectional=bidirectional)
