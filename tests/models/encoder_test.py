"""BERT equals transformers; each position sees what it should; one computation agrees with itself done in other ways.
"""
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.encoders import (
  assert_same,
  count_residuals,
  exported,
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

from lm.data.batch import Batch
from lm.hf import bert, files, weights
from lm.models import encoder

VOCAB, ROWS, TIME = 97, 4, 24
MODEL = encoder.bert(VOCAB, 32, 2, 4, TIME, dropout=0.1)
CONFIG = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 48,
          'vocab_size': VOCAB, 'max_position_embeddings': TIME, 'type_vocab_size': 3}


@pytest.fixture(scope='module')
def opened(transformers, tmp_path_factory):
  """Returns (torch model, our model, params, folder), with random weights and logits of order one."""
  import torch
  torch.manual_seed(0)
  folder = tmp_path_factory.mktemp('bert')
  theirs = transformers.BertForMaskedLM(transformers.BertConfig(**CONFIG)).eval()
  theirs.config._attn_implementation = 'eager'
  with torch.no_grad():
    for p in theirs.parameters():
      p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5 if p.ndim > 1 else p + 0.3 * torch.randn_like(p))
  theirs.save_pretrained(folder)
  return theirs, *load(folder), folder


def make_batch(rng=None):
  """Returns a batch of rows of unequal length with types, padded on the right; a third of the words is predicted. No
  word is the padding token, whose embedding torch does not train.
  """
  rng = np.random.default_rng(1) if rng is None else rng
  tokens, targets = rng.integers(1, VOCAB, (2, ROWS, TIME)).astype('i4')
  segments = (np.arange(TIME)[None] < np.array([[24], [17], [3], [9]])).astype('i4')
  selected = (rng.uniform(size=tokens.shape) < 0.4) * segments
  return Batch(tokens, targets, selected.astype('f4'), segments=segments,
               types=rng.integers(0, 2, tokens.shape).astype('i4'))


def call(theirs, batch, **options):
  import torch
  mask = None if batch.segments is None else torch.tensor(batch.segments)
  types = None if batch.types is None else torch.tensor(batch.types).long()
  return theirs(torch.tensor(batch.tokens).long(), attention_mask=mask, token_type_ids=types, **options)


def test_logits_are_those_of_transformers(opened, record_property):
  theirs, model, params, _ = opened
  batch = make_batch()
  plain = Batch(batch.tokens)
  for b in (plain, batch):
    expected = call(theirs, b).logits.detach().numpy()
    real = np.ones(b.tokens.shape, bool) if b.segments is None else b.segments > 0
    assert np.std(expected) > 0.5
    assert_small(record_property, 'BertForMaskedLM', 'logits', (forward(model, params, b) - expected)[real])


def test_packed_rows_are_as_if_alone(opened, record_property):
  theirs, model, params, _ = opened
  batch, lengths = make_batch(), (11, 1, 7)
  ends = np.cumsum(lengths)
  segments = np.repeat([1, 2, 3, 0], [*lengths, TIME - ends[-1]])[None].repeat(ROWS, 0).astype('i4')
  positions = np.concatenate([np.arange(n) for n in (*lengths, TIME - ends[-1])])[None].repeat(ROWS, 0).astype('i4')
  actual = np.asarray(forward(model, params, batch._replace(segments=segments, positions=positions)))
  for start, end in zip(ends - lengths, ends):
    alone = Batch(batch.tokens[:, start:end], types=batch.types[:, start:end])
    expected = call(theirs, alone).logits.detach().numpy()
    assert_small(record_property, 'BertForMaskedLM', 'packed', actual[:, start:end] - expected)


def test_masked_loss_and_gradients_are_those_of_torch(opened, record_property, tmp_path):
  import torch
  theirs, model, params, folder = opened
  batch = make_batch()
  loss, grads = jit(functools.partial(loss_and_grads, model))(params, batch)
  theirs.zero_grad()
  result = call(theirs, batch, labels=torch.tensor(np.where(batch.weights > 0, batch.targets, -100)).long())
  result.loss.backward()
  assert_small(record_property, 'BertForMaskedLM', 'loss', float(loss) - result.loss.item())
  assert_same(grads, gradients(theirs, model, bert.FAMILY, folder, tmp_path), 2e-5)
  assert all(np.abs(g).max() > 1e-4 for path, g in jax.tree_util.tree_leaves_with_path(grads)
             if path[-1].key != 'key_bias')   # it shifts all scores of a query alike


def test_exported_files_are_the_imported_ones(opened, transformers, record_property, tmp_path):
  theirs, model, params, folder = opened
  again = exported(transformers.BertForMaskedLM, model, params, folder, tmp_path / 'out')
  batch = make_batch()
  np.testing.assert_array_equal(call(again, batch).logits.detach(), call(theirs, batch).logits.detach())
  record_property('BertForMaskedLM/back', 'same')


def test_older_files_are_read(opened, tmp_path):
  """They have other names for norms, the tied weights twice, and the heads of pretraining."""
  _, model, params, folder = opened
  config = {**CONFIG, 'model_type': 'bert', 'architectures': ['BertForMaskedLM'], 'directionality': 'bidi',
            'position_embedding_type': 'absolute', 'pooler_type': 'first_token_transform', 'pooler_fc_size': 768}
  with files.Weights(folder) as saved:
    tensors = {bert.FAMILY.older(name): np.array(tensor) for name, tensor in saved.items()}
  assert 'bert.embeddings.LayerNorm.gamma' in tensors
  tensors |= {'bert.pooler.dense.weight': np.ones((32, 32), 'f4'), 'cls.seq_relationship.bias': np.ones(2, 'f4'),
              'bert.embeddings.position_ids': np.arange(TIME),
              'cls.predictions.decoder.weight': tensors['bert.embeddings.word_embeddings.weight'],
              'cls.predictions.decoder.bias': tensors['cls.predictions.bias']}

  def loaded(folder):
    files.write(folder, {name: (x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()})
    (folder / 'config.json').write_text(json.dumps(config))
    return load(folder)

  again, tree = loaded(tmp_path / 'older')
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, tree, params)
  tensors['cls.predictions.decoder.bias'] = tensors['cls.predictions.bias'] + 1
  with pytest.raises(ValueError, match=r'cls.predictions.decoder.bias is not cls.predictions.bias'):
    loaded(tmp_path / 'untied')


def test_every_switch_of_a_config_matters_or_is_refused(opened, tmp_path):
  _, model, params, folder = opened
  config = json.loads((folder / 'config.json').read_text())
  batch = make_batch()
  before = forward(model, params, batch)
  aside = {'dtype', 'transformers_version', 'initializer_range', 'use_cache', 'model_type', 'classifier_dropout',
           'attention_probs_dropout_prob', 'hidden_dropout_prob', 'pad_token_id', 'bos_token_id', 'eos_token_id'}
  kinds = {bool: lambda x: not x, int: lambda x: x // 2, float: lambda x: x * 1e9, str: lambda x: 'relu',
           list: lambda x: ['BertForPreTraining']}
  others = {name: kinds[type(value)](value) for name, value in config.items() if name not in aside}
  refused = set()
  for name, value in {**others, 'position_embedding_type': 'relative_key', 'is_folding_model': True}.items():
    (tmp_path / 'config.json').write_text(json.dumps({**config, name: value}))
    with files.Weights(folder) as stored:
      try:
        changed, kind = weights.open_model(tmp_path)
        same = np.array_equal(forward(changed, weights.load_params(changed, kind, stored), batch), before)
      except ValueError as error:
        same = False
        if name in str(error):
          refused.add(name)
    assert not same, f'{name}={value!r} is ignored'
  assert refused >= {'architectures', 'hidden_act', 'is_decoder', 'add_cross_attention', 'tie_word_embeddings',
                     'position_embedding_type', 'is_folding_model'}


@pytest.mark.parametrize('head', ['BertForPreTraining', 'BertForTokenClassification', 'BertLMHeadModel'])
def test_other_heads_are_refused_by_name(head):
  with pytest.raises(ValueError, match=rf"\['{head}'\].* is not supported.*BertForMaskedLM"):
    weights.family_of({'architectures': [head], 'model_type': 'bert'})


def test_a_position_depends_on_all_of_its_segment_and_on_nothing_else():
  model, batch = MODEL.clone(vocab=ROWS * TIME), make_batch()
  params = random_params(model)
  segments = np.repeat([1, 2, 0], [10, 9, 5])[None].repeat(ROWS, 0).astype('i4')
  tokens = np.random.default_rng(0).permutation(ROWS * TIME).reshape(ROWS, TIME).astype('i4')
  hidden = lambda params, row, t: jnp.sum(model.apply(params, Batch(tokens, segments=segments)).hidden[row, t] ** 2)
  gradient = jit(jax.grad(hidden))
  for row, t in ((0, 0), (1, 9), (2, 10), (3, 20)):
    depends = np.any(np.asarray(gradient(params, row, t)['embedding'])[tokens] != 0, axis=-1)
    expected = np.zeros_like(depends)
    expected[row] = segments[row] == segments[row, t]
    np.testing.assert_array_equal(depends, expected)
  assert batch.tokens.shape == tokens.shape


@pytest.mark.slow
def test_remat_changes_nothing_and_saves_memory():
  params, batch = random_params(MODEL), make_batch()
  whole, lean = (MODEL.clone(remat=remat) for remat in (None, jax.checkpoint_policies.nothing_saveable))
  sizes = [count_residuals(model, params, batch) for model in (lean, MODEL, whole)]
  assert sizes[0] < 0.8 * sizes[1] < 0.8 * 0.9 * sizes[2]
  expected = jit(functools.partial(loss_and_grads, whole))(params, batch)
  assert_same(jit(functools.partial(loss_and_grads, MODEL))(params, batch), expected)


@pytest.mark.slow
def test_loss_dropout_and_gradients_are_the_same_on_every_mesh():
  batch, key = repeated(make_batch()), jax.random.key(2)
  expected = on_mesh(MODEL, 'fsdp:1', batch, key)
  for shape in ('fsdp:4,tensor:2', 'fsdp:2,tensor:4'):
    assert_same(on_mesh(MODEL, shape, batch, key), expected)


def test_dropout_is_on_where_there_is_a_key():
  program = lambda model, key: str(jax.make_jaxpr(lambda p: model.apply(p, make_batch(), key=key).hidden)(params))
  params, without = random_params(MODEL), encoder.bert(VOCAB, 32, 2, 4, TIME)
  assert program(MODEL, None) == program(without, None)
  assert program(MODEL, jax.random.key(0)).count('name=_bernoulli') == 3   # the embedding, and both branches of a block


@pytest.mark.slow
def test_bfloat16_computes_near_float32():
  params, batch = jax.tree.map(lambda x: x * 0.5, random_params(MODEL)), make_batch()
  model = MODEL.clone(dtype=jnp.bfloat16)
  assert jax.eval_shape(model.apply, params, batch).hidden.dtype == jnp.bfloat16
  low, high = forward(model, params, batch), forward(MODEL, params, batch)
  assert low.dtype == jnp.float32
  assert 1e-4 < np.abs(low - high).max() / np.abs(high).max() < 0.05


def test_the_number_of_parameters_is_published_and_bad_sizes_are_refused():
  shapes = jax.eval_shape(encoder.bert().init, jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(shapes)) == 109_514_298   # BERT base, uncased
  with pytest.raises(ValueError, match='25 tokens are more than the 24'):
    jax.eval_shape(MODEL.apply, random_params(MODEL), Batch(np.zeros((1, TIME + 1), 'i4')))
  with pytest.raises(ValueError, match='heads=3 does not divide width=32'):
    encoder.bert(width=32, heads=3)
  with pytest.raises(ValueError, match='an encoder has no cache'):
    MODEL.apply(random_params(MODEL), make_batch(), cache=())
