"""T5 equals transformers; each position sees what it should; one computation agrees with itself done in other ways."""
import functools
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.encoders import (
  assert_same,
  count_residuals,
  forward,
  gradients,
  jit,
  load,
  loss_and_grads,
  on_mesh,
  random_params,
  repeated,
)
from helpers.hf_rows import assert_small

from lm import declarations
from lm.data.batch import Batch
from lm.hf import files, t5, weights
from lm.hf.config import Config
from lm.models import attention, encoder_decoder
from lm.optim import groups

VOCAB, ROWS, TIME, SOURCE = 97, 4, 20, 40
V10 = {'d_model': 32, 'd_kv': 8, 'd_ff': 48, 'num_layers': 2, 'num_decoder_layers': 3, 'num_heads': 4,
       'vocab_size': VOCAB, 'relative_attention_num_buckets': 16, 'relative_attention_max_distance': 24,
       'decoder_start_token_id': 0}
V11 = V10 | {'feed_forward_proj': 'gated-gelu', 'tie_word_embeddings': False, 'd_kv': 12}
MODEL = encoder_decoder.t5(VOCAB, 32, 2, 4, 8, 48, gated=True, tied=False, dropout=0.1)
versions = pytest.mark.parametrize('version', ['1.0', '1.1'])


@pytest.fixture(scope='module')
def transformers():
  pytest.importorskip('torch')
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    return pytest.importorskip('transformers')


@pytest.fixture(scope='module')
def opened(transformers, tmp_path_factory):
  """Returns (torch model, our model, params, folder), with random weights and logits of order one."""
  import torch

  @functools.cache
  def make(version):
    torch.manual_seed(0)
    config = V10 if version == '1.0' else V11
    theirs = transformers.T5ForConditionalGeneration(transformers.T5Config(**config)).eval()
    theirs.config._attn_implementation = 'eager'
    theirs.encoder.config._attn_implementation = theirs.decoder.config._attn_implementation = 'eager'
    if version == '1.1':   # transformers ties these tables unless the files hold two different ones
      theirs.lm_head.weight = torch.nn.Parameter(torch.zeros(VOCAB, 32))
    with torch.no_grad():
      for name, p in theirs.named_parameters():
        scale = 1 if name == 'shared.weight' else p.shape[-1] ** -0.5
        p.copy_(torch.randn_like(p) * scale if p.ndim > 1 else p + 0.3 * torch.randn_like(p))
    folder = tmp_path_factory.mktemp('t5')
    theirs.save_pretrained(folder)
    return theirs, *load(folder), folder
  return make


def make_batch(rng=None):
  """Returns a batch of sources and targets of unequal lengths, padded on the right."""
  rng = np.random.default_rng(1)
  tokens, targets = rng.integers(1, VOCAB, (2, ROWS, TIME)).astype('i4')
  segments = (np.arange(TIME)[None] < np.array([[20], [13], [3], [9]])).astype('i4')
  source_segments = (np.arange(SOURCE)[None] < np.array([[31], [40], [1], [9]])).astype('i4')
  return Batch(tokens, targets, segments.astype('f4'), segments=segments, source_segments=source_segments,
               source=rng.integers(1, VOCAB, (ROWS, SOURCE)).astype('i4'))


def call(theirs, batch, **options):
  import torch
  def mask(segments):
    return None if segments is None else torch.tensor(segments)
  source, tokens = (torch.tensor(x).long() for x in (batch.source, batch.tokens))
  return theirs(input_ids=source, attention_mask=mask(batch.source_segments), decoder_input_ids=tokens,
                decoder_attention_mask=mask(batch.segments), **options)


@versions
def test_logits_are_those_of_transformers(opened, version, record_property):
  theirs, model, params, _ = opened(version)
  assert model.tied == (version == '1.0')
  batch = make_batch()
  for b in (Batch(batch.tokens, source=batch.source), batch, batch._replace(segments=None)):
    expected = call(theirs, b).logits.detach().numpy()
    real = np.ones(b.tokens.shape, bool) if b.segments is None else b.segments > 0
    assert np.std(expected) > 0.5
    assert_small(record_property, 'T5ForConditionalGeneration', 'logits', (forward(model, params, b) - expected)[real])


@versions
def test_packed_rows_are_as_if_alone(opened, version, record_property):
  theirs, model, params, _ = opened(version)
  batch = make_batch()
  pieces = (slice(0, 9), slice(0, 3)), (slice(9, 10), slice(3, 30)), (slice(10, 17), slice(30, 38))
  segments, source_segments = np.zeros((ROWS, TIME), 'i4'), np.zeros((ROWS, SOURCE), 'i4')
  for i, (tokens, source) in enumerate(pieces):
    segments[:, tokens] = source_segments[:, source] = i + 1
  actual = np.asarray(forward(model, params, batch._replace(segments=segments, source_segments=source_segments)))
  for tokens, source in pieces:
    alone = Batch(batch.tokens[:, tokens], source=batch.source[:, source])
    expected = call(theirs, alone).logits.detach().numpy()
    assert_small(record_property, 'T5ForConditionalGeneration', 'packed', actual[:, tokens] - expected)


@versions
def test_loss_and_gradients_are_those_of_torch(opened, version, record_property, tmp_path):
  import torch
  theirs, model, params, folder = opened(version)
  model = model if version == '1.0' else model.clone(remat=None)
  batch = make_batch()
  loss, grads = jit(functools.partial(loss_and_grads, model))(params, batch)
  theirs.zero_grad()
  result = call(theirs, batch, labels=torch.tensor(np.where(batch.weights > 0, batch.targets, -100)).long())
  result.loss.backward()
  assert_small(record_property, 'T5ForConditionalGeneration', 'loss', float(loss) - result.loss.item())
  assert_same(grads, gradients(theirs, model, t5.FAMILY, folder, tmp_path / 'gradients'), 2e-5)
  assert all(np.abs(g).max() > 1e-4 for g in jax.tree.leaves(grads))


@pytest.mark.parametrize('version,unstack', [('1.0', False), ('1.1', True)])
def test_cached_decoding_equals_the_full_forward(opened, version, unstack, record_property):
  """Tokens are padded on the left, sources on the right, and the cache has more slots than needed."""
  _, model, params, _ = opened(version)
  batch, pads = make_batch(), np.array([0, 3, 0, 5])
  expected = np.asarray(forward(model, params, batch._replace(segments=None)))
  step = jit(lambda params, batch, cache: model.apply(params, batch, cache=cache))
  tokens = np.stack([np.roll(row, pad) for row, pad in zip(batch.tokens, pads)])
  segments = (np.arange(TIME)[None] >= pads[:, None]).astype('i4')
  params, cache, logits = model.unstack(params) if unstack else params, model.init_cache(ROWS, TIME + 4), []
  for part in (slice(0, 12), *(slice(i, i + 1) for i in range(12, TIME))):
    part_batch = Batch(tokens[:, part], segments=segments[:, part])
    if part.start == 0:
      part_batch = part_batch._replace(source=batch.source, source_segments=batch.source_segments)
    out = step(params, part_batch, cache)
    if cache.source_segments_BS is not None:   # the source is not encoded again
      for old, new in zip(cache.layers, out.cache.layers):
        np.testing.assert_array_equal(old.source.k_BKSH, new.source.k_BKSH)
    cache = out.cache
    logits.append(out.head(out.hidden))
  logits = np.concatenate(logits, axis=1)
  for row, pad in enumerate(pads):
    difference = logits[row, pad:] - expected[row, :TIME - pad]
    assert_small(record_property, 'T5ForConditionalGeneration', 'cached', difference)


@pytest.mark.slow
def test_another_source_takes_the_place_of_the_one_in_the_cache():
  params, tokens = jax.tree.map(jnp.asarray, random_params(MODEL)), make_batch().tokens[:, :3]
  read = lambda source, cache: MODEL.apply(params, Batch(tokens, source=source), cache=cache)
  empty, (first, second) = MODEL.init_cache(ROWS, 3), np.split(make_batch().source, 2, axis=1)
  used = read(first, empty).cache._replace(segments_BS=empty.segments_BS, index=empty.index)
  np.testing.assert_array_equal(read(second, used).hidden, read(second, empty).hidden)


@versions
def test_exported_files_are_the_imported_ones(opened, transformers, version, record_property, tmp_path):
  theirs, model, params, folder = opened(version)
  weights.write(tmp_path / 'out', model, params, extra={'decoder_start_token_id': 0})
  with files.Weights(folder) as came, files.Weights(tmp_path / 'out') as goes:
    assert set(came) == set(goes)
    for name in came:
      assert came[name].tobytes() == goes[name].tobytes()
  again, info = transformers.T5ForConditionalGeneration.from_pretrained(
      tmp_path / 'out', output_loading_info=True, attn_implementation='eager')
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'))
  batch = make_batch()
  np.testing.assert_array_equal(call(again.eval(), batch).logits.detach(), call(theirs, batch).logits.detach())
  record_property('T5ForConditionalGeneration/back', 'same')


def test_an_untied_model_with_one_stored_table_is_read(transformers, tmp_path):
  """transformers 5 saves such files for models made or trained with `tie_word_embeddings` false."""
  config = transformers.T5Config(**V11)
  theirs = transformers.T5ForConditionalGeneration(config).eval()
  theirs.save_pretrained(tmp_path / 'in')
  with files.Weights(tmp_path / 'in') as stored:
    assert 'lm_head.weight' not in stored
  model, params = load(tmp_path / 'in')
  assert not model.tied
  batch = make_batch()
  expected = call(theirs, batch).logits.detach().numpy()
  assert np.abs(forward(model, params, batch) - expected)[batch.segments > 0].max() <= 1e-4 * np.abs(expected).max()
  weights.write(tmp_path / 'out', model, params, extra={'decoder_start_token_id': 0})
  again = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path / 'out')
  np.testing.assert_array_equal(call(again.eval(), batch).logits.detach(), expected)


@pytest.mark.slow
@versions
def test_every_switch_of_a_config_matters_or_is_refused(opened, version, tmp_path):
  _, model, params, folder = opened(version)
  config = json.loads((folder / 'config.json').read_text())
  batch = make_batch()
  before = forward(model, params, batch)
  aside = {'dtype', 'transformers_version', 'initializer_factor', 'use_cache', 'model_type', 'classifier_dropout',
           'dropout_rate', 'pad_token_id', 'bos_token_id', 'eos_token_id', 'decoder_start_token_id'}
  if version == '1.1':   # these fields mean something else in 1.1, which always claims to be tied
    aside |= config.keys() - {'feed_forward_proj', 'dense_act_fn', 'is_gated_act', 'scale_decoder_outputs'}
  kinds = {bool: lambda x: not x, int: lambda x: x // 2, float: lambda x: x * 1e4, list: lambda x: ['T5EncoderModel'],
           str: lambda x: 'gated-silu' if x.startswith('gated') else 'gelu'}
  for name, value in {**config, 'is_folding_model': False}.items():
    if name in aside:
      continue
    changes = {name: kinds[type(value)](value)}
    if changes == {'feed_forward_proj': 'gated-silu'}:
      changes['dense_act_fn'] = 'silu'
    (tmp_path / 'config.json').write_text(json.dumps({**config, **changes}))
    with files.Weights(folder) as stored:
      try:
        changed, kind = weights.open_model(tmp_path)
        same = np.array_equal(forward(changed, weights.load_params(changed, kind, stored), batch), before)
      except ValueError:
        same = False
    assert not same, f'{changes} is ignored'


def test_older_files_are_read(opened, tmp_path):
  _, model, params, folder = opened('1.0')
  with files.Weights(folder) as saved:
    tensors = {name: np.array(tensor) for name, tensor in saved.items()}
  copies = 'encoder.embed_tokens.weight', 'decoder.embed_tokens.weight', 'lm_head.weight'
  tensors |= dict.fromkeys(copies, tensors['shared.weight'])
  tensors['decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight'] = np.ones((16, 4), 'f4')
  files.write(tmp_path / 'older', {name: (x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()})
  config = {**V10, 'model_type': 't5', 'n_positions': 512, 'output_past': True, 'is_encoder_decoder': True,
            'task_specific_params': {'summarization': {'num_beams': 4}}}
  (tmp_path / 'older' / 'config.json').write_text(json.dumps(config))
  again, tree = load(tmp_path / 'older')
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, tree, params)


@pytest.mark.parametrize('buckets,distance', [(32, 128), (16, 24), (32, 100), (12, 40), (4, 3)])
def test_distances_fall_into_the_buckets_of_transformers(transformers, buckets, distance):
  import torch
  from transformers.models.t5.modeling_t5 import T5Attention
  places = np.arange(300)
  for causal in (False, True):
    actual = encoder_decoder.RelativePositions(buckets, distance)(places, places, causal)
    expected = T5Attention._relative_position_bucket(
        torch.tensor(places[None] - places[:, None]), not causal, buckets, distance)
    np.testing.assert_array_equal(actual, expected)


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
