"""On every mesh, losses, gradients, training and scores are those of one device."""
import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.experts import KINDS
from helpers.meshes import on, packed_batch, random_params
from helpers.runs import Bigram
from jax.sharding import PartitionSpec as P

from lm import evaluate, sharding
from lm.models import attention, layers, rotary, stack, transformer
from lm.objectives.next_token import next_token
from lm.objectives.unlikelihood import unlikelihood
from lm.sharding import axes

VOCAB, ROWS, TIME = 33, 8, 8
BATCH = packed_batch(VOCAB, ROWS, TIME, 3)
MESHES = ['replica:2,fsdp:2,tensor:2', 'replica:4,expert:2', 'fsdp:2,expert:2,tensor:2', 'fsdp:2,expert:4']
# These programs are run once: optimising them takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})


def model():
  """Returns a model with every kind of weight that a letter of the table splits: embedding, heads, hidden units,
  experts.
  """
  mixer = attention.Attention(8, 4, 4, rotary.Rotary(), bias=True, scores=attention.AttentionScores(dropout=0.3))
  experts = dataclasses.replace(KINDS['qwen2'], shared=layers.FeedForward(16, bias=True), bias=True)
  block = layers.Block(mixer, experts, layers.RMSNorm(), layers.LayerNorm(), dropout=0.2)
  return transformer.Transformer(VOCAB, 32, stack.stacks([block]), layers.LayerNorm(), TIME, positions=True, tied=False)


def loss_and_grads(params, batch, key):
  """Returns the loss, which reads the vocabulary in parts, and its gradients."""
  def mean_loss(params):
    loss, weight, _ = unlikelihood(next_token(), 0.5).loss(model().apply, params, batch, key)
    return loss / weight
  return jax.value_and_grad(mean_loss)(params)


@functools.cache
def on_one_device():
  return jax.tree.map(np.asarray, jit(loss_and_grads)(random_params(model()), BATCH, jax.random.key(2)))


@pytest.mark.slow
@pytest.mark.parametrize('mesh', MESHES)
def test_losses_and_gradients_are_those_of_one_device(mesh):
  expected = on_one_device()
  with on(mesh):
    rows = sharding.shard_rows(BATCH, jax.sharding.get_mesh())
    actual = jit(lambda *args: loss_and_grads(*args))(random_params(model()), rows, jax.random.key(2))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * (np.abs(b).max() + 0.01)),
               actual, expected)


@pytest.mark.parametrize('mesh', ['replica:2,fsdp:2,tensor:2'])
def test_texts_have_the_scores_that_they_have_on_one_device(mesh):
  rng = np.random.default_rng(0)
  texts = [rng.integers(0, VOCAB, n, dtype=np.int32) for n in (8, 7, 8, 6, 8)]   # rows that the mesh cannot split
  table = rng.normal(size=(2, VOCAB, 8)).astype('f4')
  params, bigram = dict(zip(('embedding', 'head'), table)), Bigram(dropout=0., vocab=VOCAB)
  bigram = types.SimpleNamespace(apply=bigram.apply, max_length=TIME, causal=True)
  expected = evaluate.log_probabilities(bigram, params, texts)
  with on(mesh):
    laid_out = {key: sharding.store(jnp.asarray(value), 'VD') for key, value in params.items()}
    actual = evaluate.log_probabilities(bigram, laid_out, texts)
  for a, b in zip(actual, expected):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_a_letter_is_split_over_several_mesh_axes():
  with on('replica:2,fsdp:2,tensor:2'):
    mesh = jax.sharding.get_mesh()
    assert sharding.spec('BTD') == P(('replica', 'fsdp'), None, None)
    assert [sharding.parts(letter) for letter in 'BDNT'] == [4, 2, 2, 1]
    assert [sharding.padded_rows(rows) for rows in (1, 4, 5)] == [4, 4, 8]
    rows = sharding.shard_rows(np.arange(8), mesh)
    for shard in rows.addressable_shards:   # the first mesh axis of the tuple is the slower one
      replica, fsdp = np.argwhere(mesh.devices == shard.device)[0][:2]
      np.testing.assert_array_equal(shard.data, 2 * (2 * replica + fsdp) + np.arange(2))
    part = jax.shard_map(lambda x: x + 10 * sharding.part_index('B'), in_specs=sharding.spec('B'),
                         out_specs=sharding.spec('B'))(rows)
    np.testing.assert_array_equal(part, [0, 1, 12, 13, 24, 25, 36, 37])
  with on('fsdp:2,expert:2'), pytest.raises(ValueError, match='w: .* D has size 6, .* 4, .* fsdp:2, expert:2; choose '
                                            'another --mesh, where that size is 1 or 2 or 3, or'):
    sharding.check('DF', (6, 4), 'w')


@pytest.mark.parametrize('entry,message', [
    ({'N': ('fsdp',), 'K': ('fsdp',)}, 'splits both B and N over fsdp; give them different mesh axes'),
    ({'K': ('replica',)}, 'both B and K|query heads N over .*tensor.* and key heads K over .*replica'),
    ({'B': ('replica', 'fsdp')}, 'splits experts E over .*expert.*, which do not all split activations; take'),
    ({'F': ('units',)}, 'splits F over units, which is not a mesh axis; add it to AXES')])
def test_a_table_that_would_split_tensors_wrongly_is_refused(entry, message, monkeypatch):
  monkeypatch.setattr(axes, 'TABLE', axes.TABLE | entry)
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh()
