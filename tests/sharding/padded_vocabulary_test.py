"""A vocabulary that its mesh axes do not divide: the numbers are those of one device, and padding is never seen."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers.meshes import on, packed_batch, random_params
from helpers.slow import slow

from lm import evaluate, generate, sharding
from lm.generate.engine import Engine
from lm.models import layers, transformer
from lm.objectives.distillation import JensenShannon, TopK, distil, distil_stored, reverse_kl
from lm.objectives.losses import nll, smoothing, token_loss, z_loss
from lm.objectives.next_token import next_token
from lm.objectives.unlikelihood import unlikelihood

VOCAB, WIDTH, ROWS, TIME = 37, 16, 4, 8
# Without blocks, which would read no vocabulary and take most of the time.
MODEL = transformer.Transformer(VOCAB, WIDTH, (), layers.RMSNorm(), 32, softcap=4.)
SMOOTHED = next_token(token_loss=token_loss(nll, smoothing(0.3), z_loss(0.1)))
STORED = TopK(VOCAB, VOCAB, 2.)   # all tokens, which leaves no place for padding
# These programs are run once: optimising them takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})


def losses(params, batch):
  """Returns a loss of every kind that reads the vocabulary, and what a teacher stores."""
  teacher = {**params, 'embedding': jnp.cos(jax.lax.stop_gradient(params['embedding']))}
  columns = STORED(MODEL.apply, teacher, batch)
  batch, params = batch._replace(columns=columns), {**params, 'teacher': teacher}
  objectives = [
      unlikelihood(SMOOTHED, 0.5), distil(SMOOTHED, MODEL.apply, JensenShannon(0.3), 0.5, hard=0.25),
      distil_stored(next_token(), STORED, reverse_kl)]
  sums = [objective.loss(MODEL.apply, params, batch, None) for objective in objectives]
  return sum(loss / weight for loss, weight, _ in sums), (columns, [metrics for *_, metrics in sums])


@functools.cache
def losses_and_gradients(mesh):
  with on(mesh):
    batch = packed_batch(VOCAB, ROWS, TIME, 3)
    batch = batch if mesh is None else sharding.shard_rows(batch, jax.sharding.get_mesh())
    return jax.tree.map(np.asarray, jit(jax.value_and_grad(losses, has_aux=True))(random_params(MODEL), batch))


@pytest.mark.parametrize('mesh', ['fsdp:2,tensor:4', *slow('tensor:2')])
def test_losses_and_gradients_are_those_of_one_device(mesh):
  expected = losses_and_gradients(None)
  assert set(expected[0][1][0]['teacher_ids'][0, 0]) == set(range(VOCAB))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-6 * (np.abs(b).max() + 0.01)),
               losses_and_gradients(mesh), expected)


def test_padding_is_neither_drawn_nor_scored():
  """At a high temperature, all tokens are as likely; all scores of a position are those of a distribution."""
  rows, drawn = 8, 12

  def results(mesh):
    with on(mesh):
      params = random_params(MODEL)
      engine = Engine(MODEL, params, 32, vocab=10 * VOCAB, ends=[VOCAB])
      settings = generate.settings([generate.Sampling(1e4, repetition_penalty=1.1)] * rows, [0] * rows, np.arange(rows))
      state, first = engine.prefill(MODEL.prompt([[5]] * rows, rows, 1, 2), settings, [drawn + 1] * rows)
      _, later = engine.step(state, drawn)
      ids = np.concatenate([first.ids_BT, later.ids_BT[:, :drawn]], axis=1)
      scores = evaluate.log_probabilities(MODEL, params, [np.int32([3, v]) for v in range(VOCAB)])
      return ids, np.concatenate(scores)

  (ids, scores), (expected_ids, expected) = results('fsdp:2,tensor:4'), results(None)
  np.testing.assert_array_equal(ids, expected_ids)
  assert ids.max() < VOCAB < 2 * len(set(ids.ravel()))
  np.testing.assert_allclose(scores, expected, rtol=0, atol=1e-5)
  assert np.exp(scores).sum() == pytest.approx(1, abs=1e-5)


def test_weights_at_rest_have_their_true_shape_and_their_share_of_the_bytes():
  with on('fsdp:2,tensor:4'):
    params = jax.eval_shape(MODEL.init, jax.random.key(0))
    state = jax.eval_shape(optax.adamw(1e-3).init, params)
  stored = [x for x in jax.tree.leaves((params, state)) if VOCAB in x.shape]
  assert [x.shape for x in stored] == 3 * [(VOCAB, WIDTH)]
  assert [np.prod(x.sharding.shard_shape(x.shape)) for x in stored] == 3 * [VOCAB * WIDTH / 8]
