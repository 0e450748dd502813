"""A small run that the tests of training share, and functions that read its workdir."""
import dataclasses
import math
import types

import jax
import numpy as np
from helpers.meshes import mesh_of

from lm import optim, sharding, train
from lm.data import dataset
from lm.data.batch import special
from lm.data.rows.packed_documents import Stream
from lm.data.tokenizers.folder import Bytes
from lm.models import layers, transformer
from lm.objectives.next_token import next_token
from lm.optim import schedules
from lm.workdir import checkpoint, track

TOKENIZER = Bytes(('<|a|>', '<|b|>'))

V = TOKENIZER.vocab_size

TEXTS = [f'{i} is {"ha" * (i % 7)}' + ' Z' * (i == 10) for i in range(30)]


@dataclasses.dataclass(frozen=True)
class Bigram:
  """The smallest model that `train` can train: logits from the token alone, without Flax, quick to compile."""
  width: int = 8
  dropout: float = 0.1
  vocab: int = V + 1   # a size that few meshes divide

  max_length = math.inf

  def init(self, key):
    make = lambda key: sharding.store(0.3 * jax.random.normal(key, (self.vocab, self.width)), 'VD')
    return {name: make(k) for name, k in zip(('embedding', 'head'), jax.random.split(key))}

  def apply(self, params, batch, *, key=None, cache=None):
    embedding, head = (sharding.gather(params[name], 'VD') for name in ('embedding', 'head'))
    x = layers.lookup(embedding, sharding.constrain(batch.tokens, 'BT'))
    return transformer.Output(layers.dropout(x, self.dropout, key), transformer.Head(head, vocab=self.vocab), None)


@dataclasses.dataclass(frozen=True)
class Data:
  """Documents in memory, with exactly the members that `train` and its evaluators read of a data set."""
  texts: tuple[str, ...] = tuple(TEXTS)
  length: int = 16
  fingerprint: str = 'fingerprint'
  tokenizer = TOKENIZER

  source_length, kind = None, np.ndarray
  columns = inputs = types.MappingProxyType({})
  validation_sets, template = (), None

  def open(self, workdir, control=(), check=dataset.unchecked):
    check(self.fingerprint, self.tokenizer.fingerprint)
    return self

  def load_tokenizer(self, workdir):
    return self.tokenizer

  @property
  def tokens(self):
    return np.concatenate([self.tokenizer.encode(text) for text in self.texts])

  @property
  def offsets(self):
    return np.concatenate([[0], np.cumsum([len(text) for text in self.texts])])

  def batches(self, split, objective, rows, seed=0, repeat=True):
    store = self if split == 'train' else Data(tuple(text.upper().replace('Z', '') for text in TEXTS))
    return Stream(objective, special(TOKENIZER, ()), self.length, rows, seed, repeat, store=store)


RUN = train.Run(Bigram(), next_token(), Data(), optim.adamw(schedules.warmup_constant(0.05, 100, 2)), steps=6, batch=8,
                evaluate_every=3, save_every=2, keep=5)


def go(workdir, run=RUN, mesh='fsdp:2', **changes) -> train.Result:
  """Trains the run, with `changes` to its fields, in a workdir and on a mesh of this shape."""
  with jax.set_mesh(mesh_of(mesh)):
    return train.train(dataclasses.replace(run, **changes), workdir, mesh_of(mesh))


def saved(workdir, run=RUN, mesh='fsdp:2', **changes):
  """Returns (step, state) of the last checkpoint, with NumPy arrays as leaves."""
  with jax.set_mesh(mesh_of(mesh)), checkpoint.Checkpoints(workdir / 'checkpoints', create=False) as checkpoints:
    restored = checkpoints.restore(train.abstract_state(dataclasses.replace(run, **changes), mesh_of(mesh)))
    return restored.step, jax.tree.map(np.asarray, restored.state)


def steps_kept(workdir) -> list[int]:
  """Returns the steps of the checkpoints in a workdir, in order."""
  return sorted(int(path.name) for path in (workdir / 'checkpoints').iterdir() if path.name.isdigit())


def logged(workdir, name='loss') -> dict[int, float]:
  """Returns the logged values of a metric by step, and asserts that no step logged it twice."""
  rows = [(row['step'], row[name]) for row in track.read_metrics(workdir / 'metrics.jsonl') if name in row]
  assert len(dict(rows)) == len(rows)
  return dict(rows)


def same(a, b) -> bool:
  """Returns whether two trees of arrays agree in dtypes and bytes."""
  return all(jax.tree.leaves(jax.tree.map(lambda x, y: x.dtype == y.dtype and x.tobytes() == y.tobytes(), a, b)))
