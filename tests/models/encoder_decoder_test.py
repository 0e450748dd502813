"""An encoder-decoder: each position sees what it should; one computation agrees with itself done in other ways."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.encoders import (
  assert_same,
  count_residuals,
  forward,
  jit,
  on_mesh,
  random_params,
  repeated,
)
from helpers.t5_cases import ROWS, V11, VOCAB, make_batch

from lm import declarations
from lm.data.batch import Batch
from lm.hf import t5
from lm.hf.config import Config
from lm.models import attention, encoder_decoder
from lm.optim import groups

MODEL = encoder_decoder.t5(VOCAB, 32, 2, 4, 8, 48, gated=True, tied=False, dropout=0.1)


@pytest.mark.slow
def test_another_source_takes_the_place_of_the_one_in_the_cache():
  params, tokens = jax.tree.map(jnp.asarray, random_params(MODEL)), make_batch().tokens[:, :3]
  read = lambda source, cache: MODEL.apply(params, Batch(tokens, source=source), cache=cache)
  empty, (first, second) = MODEL.init_cache(ROWS, 3), np.split(make_batch().source, 2, axis=1)
  used = read(first, empty).cache._replace(segments_BS=empty.segments_BS, index=empty.index)
  np.testing.assert_array_equal(read(second, used).hidden, read(second, empty).hidden)


def test_the_decoder_sees_what_is_not_later_and_all_of_its_source():
  model, (s, t) = MODEL.clone(vocab=240, remat=None), (12, 8)
  tokens = np.random.default_rng(0).permutation(240)[:2 * (s + t)].reshape(2, -1).astype('i4')   # each occurs once
  segments = np.array([[1] * 8, [1, 1, 1, 2, 2, 2, 2, 0]], np.int32)
  source_segments = np.array([[1] * 12, [1] * 4 + [2] * 6 + [0] * 2], np.int32)
  batch = Batch(tokens[:, s:], segments=segments, source=tokens[:, :s], source_segments=source_segments)
  gradient = jit(jax.grad(lambda p, row, i: jnp.sum(model.apply(p, batch).hidden[row, i] ** 2)))
  params = random_params(model)
  for row, i in ((0, 0), (0, 5), (1, 2), (1, 4)):
    depends = np.any(np.asarray(gradient(params, row, i)['embedding'])[tokens] != 0, axis=-1)
    expected = np.zeros_like(depends)
    expected[row, :s] = source_segments[row] == segments[row, i]
    expected[row, s:] = (segments[row] == segments[row, i]) & (np.arange(t) <= i)
    np.testing.assert_array_equal(depends, expected)


@pytest.mark.slow
@pytest.mark.parametrize('causal', [True, False])
def test_attention_over_several_blocks_equals_the_dense_formula(causal):
  """With a bias, which has gradients; without causality, over another number of keys."""
  rng, time, keys = np.random.default_rng(5), 300, 300 if causal else 170
  q, dy = rng.normal(size=(2, 2, time, 4, 8)).astype('f4')
  k, v = rng.normal(size=(2, 2, keys, 2, 8)).astype('f4')
  bias = rng.normal(size=(4, time, keys)).astype('f4')
  segments, key_segments = (np.sort(rng.integers(0, 4, (2, n))).astype('i4') for n in (time, keys))
  key_segments = segments if causal else key_segments
  mask = (segments[:, :, None] == key_segments[:, None]) & (np.tril(np.ones((time, keys), bool)) | (not causal))

  def dense(q, k, v, bias):
    k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
    scores = jnp.where(mask[:, None], 0.5 * jnp.einsum('btnh,bsnh->bnts', q, k) + bias[None], -jnp.inf)
    return jnp.einsum('bnts,bsnh->btnh', jax.nn.softmax(scores), v)

  def blocks(q, k, v, bias):
    visible = attention.Visible(segments, key_segments, bias_NTS=bias)
    return attention.attend(q, k, v, visible, attention.AttentionScores(0.5, causal=causal))

  def and_grads(attend):
    y, back = jax.vjp(attend, q, k, v, bias)
    return y, *back(dy)

  assert_same(jit(lambda: and_grads(blocks))(), jit(lambda: and_grads(dense))(), 1e-5)


def test_a_window_that_is_not_causal_reaches_both_ways():
  mask = attention.Visible().mask(slice(0, 5), slice(0, 5), attention.AttentionScores(window=2, causal=False))[0, 0]
  np.testing.assert_array_equal(mask, np.abs(np.subtract.outer(np.arange(5), np.arange(5))) < 2)


def test_remat_saves_memory():
  """Gradients with and without rematerialisation equal those of torch in the test above."""
  params, batch = random_params(MODEL), make_batch()
  whole, lean = (MODEL.clone(remat=remat) for remat in (None, jax.checkpoint_policies.nothing_saveable))
  sizes = [count_residuals(model, params, batch) for model in (lean, MODEL, whole)]
  assert sizes[0] < 0.8 * sizes[1] < 0.8 * 0.9 * sizes[2]


@pytest.mark.slow
def test_loss_and_gradients_are_the_same_on_every_mesh():
  batch = repeated(make_batch())
  expected = on_mesh(MODEL, 'fsdp:1', batch)
  for shape in ('fsdp:4,tensor:2', 'fsdp:2,tensor:4'):
    assert_same(on_mesh(MODEL, shape, batch), expected)


def test_dropout_is_on_where_there_is_a_key():
  program = lambda key: str(jax.make_jaxpr(lambda p: MODEL.apply(p, make_batch(), key=key).hidden)(params))
  params = random_params(MODEL)
  assert program(None).count('name=_bernoulli') == 0
  # The embedding and the last norm of both sides, two branches of the encoder's block, three of the decoder's.
  assert program(jax.random.key(0)).count('name=_bernoulli') == 9


@pytest.mark.slow
def test_bfloat16_computes_near_float32():
  params, batch = jax.tree.map(lambda x: x * 0.5, random_params(MODEL)), make_batch()
  model = MODEL.clone(dtype=jnp.bfloat16)
  assert jax.eval_shape(model.apply, params, batch).hidden.dtype == jnp.bfloat16
  low, high = forward(model, params, batch), forward(MODEL, params, batch)
  assert low.dtype == jnp.float32
  assert 1e-4 < np.abs(low - high).max() / np.abs(high).max() < 0.05


def count(model):
  return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


def test_the_numbers_of_parameters_are_published_and_biases_do_not_decay():
  assert count(encoder_decoder.t5()) == 60_506_624   # T5 small, versions 1.0 and 1.1
  assert count(encoder_decoder.t5(layers=8, heads=6, hidden=1024, gated=True, tied=False)) == 76_961_152
  decayed = jax.tree_util.tree_leaves_with_path(groups.decay_mask(declarations.of(MODEL)))
  assert {path[-1].key for path, yes in decayed if not yes} == {'scale', 'encoder_bias', 'decoder_bias'}


def test_sizes_that_do_not_fit_are_refused():
  params, tokens = random_params(MODEL), np.zeros((1, 4), 'i4')
  with pytest.raises(ValueError, match='reads batch.source'):
    MODEL.apply(params, Batch(tokens))
  with pytest.raises(ValueError, match='the first batch has it'):
    MODEL.apply(params, Batch(tokens), cache=MODEL.init_cache(1, 4))
  with pytest.raises(ValueError, match='256 buckets .*less than twice 128'):
    encoder_decoder.RelativePositions(256)
  with pytest.raises(ValueError, match='scale_decoder_outputs=True is not supported'):
    t5.model(Config({**V11, 'scale_decoder_outputs': True}))
  with pytest.raises(ValueError, match='heads=0 is not positive'):
    encoder_decoder.t5(heads=0)
