"""Runs that the doctor examines: small models, and data of every kind in memory."""
import contextlib
import dataclasses
import functools

import jax
import numpy as np
from helpers.every_run import CASES, COLUMNS, DECODER
from helpers.meshes import mesh_of
from helpers.runs import RUN, Data

from lm import train
from lm.data.batch import Dialogue, Pair, Rated, RatedPair, special
from lm.data.rows.packed_documents import Stream
from lm.data.rows.packed_records import Packed
from lm.data.tokenizers import CONTROL
from lm.data.tokenizers.base import TokenizerBase
from lm.doctor.subject import Subject
from lm.models import EncoderDecoder
from lm.objectives import distillation, next_token
from lm.train import interfaces


@dataclasses.dataclass(frozen=True)
class Letters(TokenizerBase):
  """A tokenizer of 18 characters with all control tokens: 64 ids."""
  bos, eos, ends, adds_bos = '<s>', '</s>', (), True

  @functools.cached_property
  def _control(self):
    return {name: 18 + i for i, name in enumerate((self.bos, self.eos, *CONTROL))}

  @functools.cached_property
  def _table(self):
    return [bytes([byte]) for byte in b'abcdefghijklmnopq '] + [b''] * len(self._control)

  def encode_batch(self, texts):
    return [np.int32([b'abcdefghijklmnopq '.index(byte) for byte in text.encode()]) for text in texts]


TEXTS = tuple(('a bad cab ', 'hide ', 'jam pie on a lake ', 'a', 'big dog ')[i % 5] * (1 + i % 3) + 'abcdefghij'[i % 10]
              for i in range(30))


class Records(list):
  """Records of a kind, as `packed_records.RecordStore`."""

  def __init__(self, kind, texts):
    documents = [np.int32([18, *Letters().encode(text), 19]) for text in texts]
    dialogues = [Dialogue(ids, np.arange(len(ids)) >= len(ids) // 2) for ids in documents]
    others = dialogues[1:] + dialogues[:1]
    super().__init__({Dialogue: dialogues, Pair: [Pair(*pair) for pair in zip(dialogues, others)],
                      Rated: [Rated(a, i % 2 == 0, b) for i, (a, b) in enumerate(zip(dialogues, others))],
                      RatedPair: [RatedPair((a.tokens[1:-1],), b.tokens[1:-1], 0.5) for a, b in zip(dialogues, others)]
                      }[kind])
    sizes = [len(ids) for ids in documents]
    two = [a + b for a, b in zip(sizes, sizes[1:] + sizes[:1])]
    self.positions = np.array({Dialogue: [n - 1 for n in sizes], RatedPair: [n - 4 for n in two]}.get(
        kind, [n - 2 for n in two]))


@dataclasses.dataclass(frozen=True)
class InMemory(Data):
  """Data in memory of the kind that an objective needs, with columns of zeros."""
  texts: tuple[str, ...] = TEXTS
  length: int = 64
  kind: type = np.ndarray
  source_length: int | None = None
  columns: dict = dataclasses.field(default_factory=dict)
  tokenizer = Letters()

  def batches(self, split, objective, rows, seed=0, repeat=True):
    settings = (objective, special(self.tokenizer, objective.control), self.length, rows, seed, repeat,
                self.source_length)
    if self.kind is np.ndarray:
      batches = Stream(*settings, store=self)
    else:
      batches = Packed(*settings, records=Records(self.kind, self.texts))
    stored = {name: np.zeros((batches.rows_per_epoch, self.length, *shape), dtype)
              for name, (dtype, shape) in self.columns.items()}
    return dataclasses.replace(batches, stored=stored or None)


def longer(model):
  """Returns a model for rows of 64 positions."""
  if isinstance(model, EncoderDecoder):
    return model
  inner = {name: longer(getattr(model, name)) for name in ('trunk', 'decoder') if hasattr(model, name)}
  return dataclasses.replace(model, **inner) if inner else model.clone(max_length=64)


@dataclasses.dataclass(frozen=True)
class Changed:
  """A model with another `apply`, which is given the model, the parameters and the batch, and whether there is a cache.
  """
  model: object
  change: object

  def __post_init__(self):   # protocols see no members that `__getattr__` finds, from Python 3.12 on
    for name in interfaces.Decoder.__protocol_attrs__ if hasattr(interfaces.Decoder, '__protocol_attrs__') else ():
      if not hasattr(type(self), name) and hasattr(self.model, name):
        object.__setattr__(self, name, getattr(self.model, name))

  def __getattr__(self, name):
    return getattr(self.model, name)

  def apply(self, params, batch, *, key=None, cache=None):
    return self.change(self.model, params, batch, cache)


def run_of(name, **changes) -> train.Run:
  """Returns a run for a case of `every_run`."""
  model, goal = CASES[name]
  model, constants = longer(model), ()
  if name == 'distil':
    constants = (train.Constants('teacher', longer(DECODER), None),)
    goal = distillation.distil(next_token.next_token(), longer(DECODER).apply)
  data = InMemory(kind=goal.needs, source_length=64 if name == 't5' else None, columns=COLUMNS.get(name, {}))
  run = dataclasses.replace(RUN, model=model, objective=goal, data=data, constants=constants)
  return dataclasses.replace(run, **changes)


@contextlib.contextmanager
def examined(run, mesh='fsdp:1'):
  """Yields a subject with new parameters of a run, on a mesh of this shape."""
  devices = mesh_of(mesh)
  with jax.set_mesh(devices):
    data = run.data.open(None)
    state = jax.jit(lambda: train.init(run))()
    constants = {each.name: jax.jit(each.model.init)(jax.random.key(1)) for each in run.constants}
    with contextlib.closing(train.DataFeed(run, data, devices)) as feed:
      yield Subject(run, data, devices, state.params, constants, feed, state, is_new=True)
