"""Stored columns hold what the model says of each position, in every epoch, on any mesh, and through a kill."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.meshes import on

from lm import optim, sharding, train
from lm.data import dataset
from lm.data.rows.packed_documents import Stream
from lm.data.text.source import Source
from lm.data.tokenizers.folder import Bytes
from lm.evaluate import annotate
from lm.models import layers, transformer
from lm.objectives import objective
from lm.objectives.next_token import next_token
from lm.optim import schedules

TOKENIZER = Bytes(('<|mask|>',))
TEXTS = ['abc', 'of many lines ' * 20, 'a longer text, which is cut', '', 'xyz' * 9, 'more', 'and more of it']
SOURCE = Source('tiny', {'train': TEXTS, 'validation': ['not in the other']}, 'fingerprint')
V = TOKENIZER.vocab_size + 1   # even, so that it can be split


@dataclasses.dataclass(frozen=True)
class Bigram:
  """Logits from a table by the last token."""
  scale: float = 1.

  max_length = 99

  def init(self, key):
    return {'table': sharding.constrain(self.scale * jax.random.normal(key, (V, V)), 'V-')}

  def apply(self, params, batch, *, key=None, cache=None):
    x = layers.lookup(params['table'], sharding.constrain(batch.tokens, 'BT'))
    return transformer.Output(x, transformer.Head(sharding.constrain(jnp.eye(V), 'V-')), None)


def load(model):
  return jax.jit(lambda: model.init(jax.random.key(7)))()


def log_probabilities(apply, params, batch):
  outputs = apply(params, batch)
  return {'reference': objective.target_log_probabilities(outputs.hidden, outputs.head, batch.targets)}


def annotated(function=log_probabilities, model=Bigram(), folder=None) -> annotate.Annotated:
  return annotate.Annotated(dataset.Text(SOURCE, TOKENIZER, 16, rules=()), train.Constants('reference', model, load),
                            {'reference': (np.float32, ())}, function, folder)


def batches(workdir, data=None, shape='fsdp:1', split='train', **options):
  with on(shape):
    return (data or annotated()).open(workdir).batches(split, next_token(), 4, **options)


@pytest.fixture
def table():
  with on('fsdp:1'):
    logits = np.asarray(load(Bigram())['table'], np.float64)
  return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


@pytest.mark.parametrize('shape', ['fsdp:1', 'fsdp:4,tensor:2'])
def test_each_position_has_the_log_probability_of_the_model_in_every_epoch(tmp_path, table, shape):
  stream = batches(tmp_path, shape=shape)
  assert stream.steps_per_epoch > 1
  rows = []
  for step in range(3 * stream.steps_per_epoch):
    batch = stream(step)
    np.testing.assert_allclose(batch.columns['reference'], table[batch.tokens, batch.targets], atol=2e-6)
    rows += [row.tobytes() for row in batch.tokens]
  n = stream.rows_per_epoch
  assert sorted(rows[:n]) == sorted(rows[n:2 * n]) and rows[:n] != rows[n:2 * n]   # the same rows in another order


def test_an_interrupted_annotation_continues(tmp_path, monkeypatch):
  whole = batches(tmp_path / 'whole')
  count, composed, compose = whole.steps_per_epoch, [], Stream.compose
  assert count > 3

  def killed_at(call):
    def composing(self, places):
      composed.append(places)
      if len(composed) == call:
        raise KeyboardInterrupt
      return compose(self, places)
    composed.clear()
    monkeypatch.setattr(Stream, 'compose', composing)

  monkeypatch.setattr(annotate, '_EVERY', 1)
  killed_at(4)   # two pieces are stored, and the third is being written
  with pytest.raises(KeyboardInterrupt):
    batches(tmp_path / 'cut')
  for remaining in (count - 2, 0):
    killed_at(None)
    resumed = batches(tmp_path / 'cut')
    assert len(composed) == remaining
  assert np.array_equal(resumed.stored['reference'], whole.stored['reference'])


def test_columns_of_something_else_are_refused(tmp_path):
  batches(tmp_path)
  with pytest.raises(ValueError, match='data'):
    batches(tmp_path, annotated(model=Bigram(2.)))
  with pytest.raises(ValueError, match='seed: 0 before, 1 now'):
    batches(tmp_path, seed=1)
  (tmp_path / 'data/columns/train/columns.json').write_text('{"rows')
  with pytest.raises(ValueError, match='is damaged'):
    batches(tmp_path)


def test_a_run_trains_on_stored_columns(tmp_path, table):
  """The loss is the difference to the reference, so it is zero where the model equals the reference."""
  def loss(apply, params, batch, key):
    outputs = apply(params, batch, key=key)
    mine = objective.target_log_probabilities(outputs.hidden, outputs.head, batch.targets)
    gap = jnp.sum(batch.weights * jnp.square(mine - batch.columns['reference']))
    tokens = jnp.sum(batch.weights)
    return gap, tokens, {'nll': -jnp.sum(batch.weights * mine), 'tokens': tokens, 'correct': jnp.float32(0),
                         'gap': (gap, tokens)}

  run = train.Run(Bigram(), objective.Objective(next_token().forms, loss), annotated(),
                  optim.sgd(schedules.warmup_constant(0.1, 10, 1)), steps=3, batch=4, start=load)
  with on('fsdp:2'):
    result = train.train(run, tmp_path, jax.sharding.get_mesh())
  assert result.finished and result.metrics['validation/loss'] < 1e-9 and result.metrics['validation/gap'] < 1e-9
