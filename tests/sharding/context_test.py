"""Where a mesh splits the positions of rows, losses, gradients, texts and scores are those of one device."""
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.every_run import CASES, configured
from helpers.experts import KINDS
from helpers.meshes import mesh_of, on, packed_batch, random_params
from helpers.slow import slow

from lm import evaluate, generate, sharding, train
from lm.data.rows.stages import Stage
from lm.generate.engine import Engine
from lm.models import attention, encoder_decoder, latent, layers, prediction_heads, rotary, stack, transformer
from lm.objectives import preference
from lm.objectives.multi_token import multi_token
from lm.objectives.next_token import next_token
from lm.objectives.objective import by_position
from lm.objectives.unlikelihood import unlikelihood

VOCAB, ROWS, TIME = 32, 4, 16
# These programs are run once: optimising them takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})


def block(mixer, feed_forward=None):
  return layers.Block(mixer, feed_forward or layers.FeedForward(16), layers.RMSNorm(), layers.RMSNorm(), dropout=0.2)


def decoder(*blocks):
  return transformer.Transformer(VOCAB, 16, stack.stacks(blocks), layers.RMSNorm(), TIME, positions=True, tied=False)


def window():
  """Returns attention whose queries share two heads of keys, with a window, sinks, a softcap and dropout."""
  return attention.Attention(8, 2, 4, rotary.Rotary(), bias=True, sinks=True,
                             scores=attention.AttentionScores(window=5, softcap=3., dropout=0.3))


def chunks():
  """Returns attention to chunks of positions, whose frequencies depend on the length of a text."""
  longer = rotary.LongRope((1., 2.), (3., 4.), original=3, attention=1.)
  return attention.Attention(8, 4, 4, rotary.Rotary(scaling=longer), scores=attention.AttentionScores(chunk=4))


def prefixed(batch):
  return batch._replace(bidirectional=batch.positions < 3)


def with_source(batch):
  rng = np.random.default_rng(2)
  segments = np.sort(rng.integers(1, 4, (ROWS, 2 * TIME))).astype('i4')
  return batch._replace(source=rng.integers(0, VOCAB, (ROWS, 2 * TIME)).astype('i4'), source_segments=segments)


def paired(batch):
  """Returns the batch with answers that are preferred and others by turns, and scores of a reference."""
  return batch._replace(weights=np.where(batch.segments % 2, 1, -1).astype('f4'),
                        columns={'reference': -batch.weights})


MIXTURE = block(latent.LatentAttention(8, 8, 8, 4, 4, 4), dataclasses.replace(KINDS['qwen2'], bias=True))
RUNS = {
    'multi_token': (prediction_heads.sequential(decoder(block(window()), block(chunks())), 2),
                    multi_token(next_token()), prefixed),
    'unlikelihood': (decoder(MIXTURE), unlikelihood(next_token(), 0.5), prefixed),
    't5': (encoder_decoder.t5(VOCAB, 16, 1, heads=8, head_size=4, hidden=16), next_token(), with_source),
    'preference': (decoder(block(chunks())), preference.preference(preference.dpo()), paired)}


@functools.cache
def loss_and_gradients(name, mesh):
  """Returns the loss with dropout, and its gradients, in NumPy."""
  model, objective, change = RUNS[name]

  def mean_loss(params, batch):
    loss, weight, _ = objective.loss(model.apply, params, batch, jax.random.key(2))
    return loss / weight

  with on(mesh):
    rows = change(packed_batch(VOCAB, ROWS, TIME, 4))
    rows = rows if mesh is None else sharding.shard_rows(rows, jax.sharding.get_mesh())
    return jax.tree.map(np.asarray, jit(jax.value_and_grad(mean_loss))(random_params(model), rows))


@pytest.mark.parametrize('name, mesh', [
    ('preference', 'context:2,tensor:2'),
    *slow(('multi_token', 'fsdp:2,context:4'), ('t5', 'fsdp:2,context:4'), ('unlikelihood', 'context:2,tensor:2')),
    pytest.param('multi_token', 'context:4', marks=[pytest.mark.slow, pytest.mark.long])])
def test_losses_and_gradients_are_those_of_one_device(name, mesh):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * (np.abs(b).max() + 0.01)),
               loss_and_gradients(name, mesh), loss_and_gradients(name, None))


def test_a_chunk_of_the_loss_has_positions_of_every_part(monkeypatch):
  """Otherwise, the devices would compute logits one after the other."""
  monkeypatch.setattr('lm.objectives.objective.chunk_length', lambda *args: 3)
  places = np.broadcast_to(np.arange(TIME, dtype=np.float32), (2, TIME))
  with on('context:2'):
    hidden = sharding.constrain(jnp.zeros((2, TIME, 1)), 'BTD')
    both = jax.jit(lambda x: by_position(lambda _, x: (x, jnp.full_like(x, jnp.max(x))), x, lambda x: x, (places,)))
    own, last = both(hidden)
  np.testing.assert_array_equal(own, places)
  half = TIME // 2
  np.testing.assert_array_equal(last, half + np.minimum(places % half // 3 * 3 + 2, half - 1))


@pytest.mark.parametrize('name', ['t5', 'unlikelihood', 'distil_stored', 'dpo', *slow(
    *(name for name in CASES if name not in ('t5', 'unlikelihood', 'distil_stored', 'dpo')))])
def test_every_objective_takes_rows_in_parts(name):
  with jax.set_mesh(mesh := mesh_of('context:2')):
    train.check(configured(name, batch=1), mesh)


@pytest.mark.slow
def test_texts_and_scores_are_those_of_one_device():
  """A prompt has any number of positions, and a step has one, whatever the mesh."""
  model, rng = RUNS['unlikelihood'][0], np.random.default_rng(0)
  texts = [rng.integers(3, VOCAB, n, dtype=np.int32) for n in (9, 7, 3)]

  def results(mesh):
    with on(mesh):
      params = random_params(model)
      prompt = model.prompt([text[:5] for text in texts], 4, 1, 2)
      engine = Engine(model, params, 24, VOCAB, [2])
      settings = generate.settings([generate.Sampling(0.8)] * 4, [0] * 4, np.arange(4))
      state, first = engine.prefill(prompt, settings, [6] * 4)
      _, later = engine.step(state, 5)
      return evaluate.log_probabilities(model, params, texts), first, later

  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-5), results('fsdp:2,context:4'),
               results(None))


def test_a_length_that_the_mesh_does_not_divide_is_refused():
  with jax.set_mesh(mesh := mesh_of('context:3')), pytest.raises(
      ValueError, match='--length=16 is not a multiple of 3, .* mesh context:3 .* choose 15 or 18, or another --mesh'):
    train.check(configured('next_token', batch=1), mesh)
  with jax.set_mesh(mesh := mesh_of('context:8')):
    with pytest.raises(ValueError, match='the length of a stage=4 is not a multiple of 8, .*; choose 8, or'):
      train.check(configured('next_token', batch=4, stages=(Stage(1, 16, 4),)), mesh)
    with pytest.raises(ValueError, match='heads of attention: .* size 2, .* multiple of 8, .* context:8'):
      train.check(configured('next_token', batch=1), mesh)


def test_a_cache_is_refused_where_rows_are_split():
  model = decoder(block(chunks()))
  with on('context:4'), pytest.raises(ValueError, match='a cache has all positions .* over context; trace'):
    jax.eval_shape(lambda: model.init_cache(1, TIME))


@pytest.mark.slow
def test_positions_are_exchanged_for_heads_and_activations_are_not_gathered():
  """A layer exchanges queries, keys, values and outputs; the backward pass does so again, and for their gradients."""
  model = decoder(*[block(attention.Attention(8, 8, 4, rotary.Rotary()))] * 3)   # a loop over layers: one body each way
  with on('context:4'):
    loss = lambda params, batch: next_token().loss(model.apply, params, batch, None)[0]
    batch = packed_batch(VOCAB, ROWS, TIME, 4)
    program = jax.jit(jax.grad(loss)).lower(random_params(model), batch).compile().as_text()
  assert len(re.findall(r' all-to-all\(', program)) == 4 + 8
  gathered = re.findall(r'= (\S+)\{\S* all-gather\(', program)
  assert gathered and not [array for array in gathered if array.startswith(f'f32[{ROWS},')]   # weights only
