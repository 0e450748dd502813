"""T5 is that of `transformers`: logits, losses, gradients, and files of all versions."""
import functools
import json

import jax
import numpy as np
import pytest
from helpers.encoders import (
  assert_same,
  exported,
  forward,
  gradients,
  jit,
  load,
  loss_and_grads,
)
from helpers.hf_rows import assert_small
from helpers.t5_cases import ROWS, SOURCE, TIME, V10, V11, VOCAB, make_batch

from lm.data.batch import Batch
from lm.hf import files, t5, weights
from lm.models import encoder_decoder

versions = pytest.mark.parametrize('version', ['1.0', '1.1'])


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


@versions
def test_exported_files_are_the_imported_ones(opened, transformers, version, record_property, tmp_path):
  theirs, model, params, folder = opened(version)
  again = exported(transformers.T5ForConditionalGeneration, model, params, folder, tmp_path / 'out',
                   {'decoder_start_token_id': 0})
  batch = make_batch()
  np.testing.assert_array_equal(call(again, batch).logits.detach(), call(theirs, batch).logits.detach())
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
