"""Scorers of texts equal transformers; a score depends on both texts and on nothing else; meshes agree."""
import json

import jax
import numpy as np
import pytest
from helpers.encoders import assert_same, jit, load, random_params
from helpers.hf_rows import assert_small
from helpers.meshes import mesh_of

from lm import sharding
from lm.data.batch import Batch
from lm.hf import files, weights
from lm.models import encoder

VOCAB, ROWS, TIME = 96, 4, 24
CONFIG = {'hidden_size': 32, 'num_hidden_layers': 2, 'num_attention_heads': 4, 'intermediate_size': 48,
          'vocab_size': VOCAB, 'max_position_embeddings': TIME, 'type_vocab_size': 2, 'num_labels': 1,
          'layer_norm_eps': 1e-6}
CASES = {'BertForSequenceClassification': {'hidden_act': 'gelu_new'},
         'RemBertForSequenceClassification': {'hidden_act': 'gelu', 'input_embedding_size': 12,
                                              'output_embedding_size': 20}}
MODEL = encoder.scorer(encoder.bert(VOCAB, 32, 2, 4, TIME)).clone(embedding_size=16)
scores_of = jit(lambda model, params, batch: (lambda out: out.head(out.hidden[:, :1])[:, 0])(
    model.apply(params, batch)), static_argnums=0)


@pytest.fixture(scope='module', params=CASES)
def opened(transformers, tmp_path_factory, request):
  """Returns (torch model, our model, params, folder), with random weights and scores of order one."""
  import torch
  torch.manual_seed(0)
  kind = getattr(transformers, request.param)
  theirs = kind(kind.config_class(**CONFIG, **CASES[request.param])).eval()
  theirs.config._attn_implementation = 'eager'
  with torch.no_grad():
    for p in theirs.parameters():
      p.copy_(torch.randn_like(p) * p.shape[-1] ** -0.5 if p.ndim > 1 else p + 0.3 * torch.randn_like(p))
  folder = tmp_path_factory.mktemp(request.param)
  theirs.save_pretrained(folder)
  return theirs, *load(folder), folder


def make_batch():
  rng = np.random.default_rng(1)
  segments = (np.arange(TIME)[None] < np.array([[24], [17], [3], [9]])).astype('i4')
  types = (np.arange(TIME)[None] >= np.array([[12], [5], [2], [4]])).astype('i4')
  return Batch(rng.integers(1, VOCAB, (ROWS, TIME)).astype('i4'), segments=segments, types=types)


def call(theirs, batch):
  import torch
  with torch.no_grad():
    return theirs(torch.tensor(batch.tokens).long(), attention_mask=torch.tensor(batch.segments),
                  token_type_ids=torch.tensor(batch.types).long()).logits[:, 0].numpy()


def test_scores_are_those_of_transformers(opened, record_property):
  theirs, model, params, _ = opened
  expected = call(theirs, make_batch())
  assert np.std(expected) > 0.1
  difference = scores_of(model, params, make_batch()) - expected
  assert_small(record_property, type(theirs).__name__, 'scores', difference, 1e-5)


def test_exported_files_are_the_imported_ones(opened, record_property, tmp_path):
  theirs, model, params, folder = opened
  weights.write(tmp_path / 'out', model, params)
  with files.Weights(folder) as came, files.Weights(tmp_path / 'out') as goes:
    assert set(came) == set(goes)
    for name in came:
      assert came[name].tobytes() == goes[name].tobytes()
  again, info = type(theirs).from_pretrained(tmp_path / 'out', output_loading_info=True, attn_implementation='eager')
  assert not any(info[key] for key in ('missing_keys', 'unexpected_keys', 'mismatched_keys', 'error_msgs'))
  np.testing.assert_array_equal(call(again.eval(), make_batch()), call(theirs, make_batch()))
  record_property(type(theirs).__name__ + '/back', 'same')


def test_several_labels_are_refused(opened, tmp_path):
  _, model, params, folder = opened
  config = json.loads((folder / 'config.json').read_text())
  with files.Weights(folder) as saved:
    tensors = {name: np.array(tensor) for name, tensor in saved.items()}
  tensors['classifier.weight'] = np.zeros((2, 32), 'f4')
  files.write(tmp_path, {name: (x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()})
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match=r'classifier.weight of shape \(2, 32\) make score of shape \(64,\)'):
    load(tmp_path)


def test_the_port_of_bleurt_is_read_under_its_names(opened, tmp_path):
  """Its tensors are those of BERT under another root; its embeddings may have a size of their own."""
  _, model, params, folder = opened
  config = json.loads((folder / 'config.json').read_text())
  config |= {'architectures': ['BleurtForSequenceClassification'], 'model_type': 'bleurt'}
  if 'input_embedding_size' in config:
    config['embedding_size'] = config.pop('input_embedding_size')
  with files.Weights(folder) as saved:
    tensors = {name.replace('rembert.', 'bleurt.').replace('bert.', 'bleurt.').replace(
        'embedding_hidden_mapping_in', 'embedding_projection'): np.array(x) for name, x in saved.items()}
  tensors['bleurt.embeddings.position_ids'] = np.arange(TIME)
  files.write(tmp_path, {name: (x.shape, x.dtype, lambda x=x: x) for name, x in tensors.items()})
  (tmp_path / 'config.json').write_text(json.dumps(config))
  again, tree = load(tmp_path)
  assert again == model
  jax.tree.map(np.testing.assert_array_equal, tree, params)


def test_padding_changes_nothing_and_each_token_and_type_counts():
  params, batch = random_params(MODEL), make_batch()
  scores = scores_of(MODEL, params, batch)
  padding = batch._replace(tokens=np.where(batch.segments, batch.tokens, 7))
  np.testing.assert_array_equal(scores_of(MODEL, params, padding), scores)
  for place in (0, 2):
    tokens, types = batch.tokens.copy(), batch.types.copy()
    tokens[:, place] = (tokens[:, place] + 1) % VOCAB
    types[:, place] = 1 - types[:, place]
    for changed in (batch._replace(tokens=tokens), batch._replace(types=types)):
      assert np.all(np.abs(scores_of(MODEL, params, changed) - scores) > 1e-4)


def test_scores_and_gradients_are_the_same_on_every_mesh():
  batch = jax.tree.map(lambda x: np.concatenate([x, x[::-1]]), make_batch())

  def loss(params, batch):
    out = MODEL.apply(params, batch)
    return (out.head(out.hidden)[:, 0] ** 2).sum()

  def on_mesh(shape):
    mesh = mesh_of(shape)
    with jax.set_mesh(mesh):
      shapes = jax.eval_shape(MODEL.init, jax.random.key(0))
      layouts = jax.tree.map(lambda x: jax.sharding.NamedSharding(mesh, x.sharding.spec), shapes)
      inputs = jax.device_put(random_params(MODEL), layouts), sharding.shard_rows(batch, mesh)
      return jax.tree.map(np.asarray, jit(jax.value_and_grad(loss))(*inputs))

  assert_same(on_mesh('fsdp:4,tensor:2'), on_mesh('fsdp:1'), 1e-5)


def test_a_scorer_starts_from_another_encoder():
  base = encoder.bert(VOCAB, 32, 2, 4, TIME)
  params = random_params(base)
  model = encoder.scorer(base)
  started = model.start(lambda model: params, base)
  assert jax.tree.structure(started) == jax.tree.structure(jax.eval_shape(model.init, jax.random.key(0)))
  batch = make_batch()
  hidden = jit(lambda model, params: model.apply(params, batch).hidden, static_argnums=0)
  np.testing.assert_array_equal(hidden(model, started), hidden(base, params))
