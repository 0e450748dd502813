"""Models of others are imported, trained on, and exported, without torch."""
import dataclasses
import functools
import io
import json
import pathlib

import export_hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sentencepiece
from helpers.meshes import on
from helpers.slow import slow

from lm import load, optim, sharding, train
from lm.data import dataset
from lm.data.batch import Batch
from lm.data.chat import conversation, dialogues
from lm.data.text import corpora, source
from lm.data.tokenizers.folder import Bytes
from lm.evaluate import annotate
from lm.hf import files, pretrained, weights
from lm.models import encoder, encoder_decoder, stack, transformer
from lm.models import layers as parts
from lm.objectives.next_token import next_token
from lm.optim import schedules

TOKENIZER = Bytes(('<|bos|>', '<|eos|>'))
MODEL = transformer.llama(TOKENIZER.vocab_size + 7, 16, 2, heads=4, kv_heads=2, max_length=32)
TOKENS = np.random.default_rng(0).integers(0, TOKENIZER.vocab_size, (8, 32), np.int32)


@functools.partial(jax.jit, static_argnums=0)
def logits(model, params):
  out = model.apply(params, Batch(TOKENS))
  return out.head(out.hidden)


@pytest.fixture(scope='module')
def params():
  return jax.jit(MODEL.init)(jax.random.key(0))


@pytest.fixture(scope='module')
def folder(params, tmp_path_factory):
  """Returns a folder that `transformers` could open."""
  folder = tmp_path_factory.mktemp('exported') / 'model'
  pretrained.write(folder, MODEL, params, TOKENIZER)
  return folder


def same(a, b):
  return jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_what_was_exported_opens_as_the_same_model(folder, params):
  loaded = pretrained.load(str(folder))
  assert same(loaded.params, params)
  assert np.array_equal(logits(loaded.model, loaded.params), logits(MODEL, params))
  text = 'def f(x):\n\treturn "\u00e9\U0001f600"'
  assert np.array_equal(loaded.tokenizer.encode(text), TOKENIZER.encode(text))
  assert (loaded.tokenizer.bos_id, loaded.tokenizer.eos_id) == (TOKENIZER.bos_id, TOKENIZER.eos_id)


@pytest.mark.parametrize('mesh', ['fsdp:4,tensor:2', *slow('fsdp:1', 'fsdp:2,tensor:2')])
def test_parameters_are_read_into_the_shards_of_any_mesh(folder, params, tmp_path, mesh):
  with on(mesh):
    direct = pretrained.load(str(folder))
    imported = pretrained.save(str(folder), tmp_path / 'imported')
    again = pretrained.load(str(tmp_path / 'imported'))
    layout = jax.tree.map(lambda x: x.sharding, jax.jit(MODEL.init)(jax.random.key(0)))
    for opened in (direct, imported, again):
      assert same(opened.params, params)
      assert jax.tree.map(lambda x: x.sharding, opened.params) == layout


def test_half_precision_weights_stay_half_and_train_in_float32(params, tmp_path):
  pretrained.write(tmp_path / 'half', MODEL, params, TOKENIZER, dtype=jnp.bfloat16)
  loaded = pretrained.load(str(tmp_path / 'half'))
  assert {x.dtype for x in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
  assert json.loads((tmp_path / 'half' / 'config.json').read_text())['dtype'] == 'bfloat16'
  start = pretrained.start(tmp_path / 'half', MODEL)(MODEL)
  assert same(start, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))
  assert {x.dtype for x in jax.tree.leaves(start)} == {jnp.dtype(jnp.float32)}


def test_an_import_keeps_dtypes_and_exports_the_imported_files(params, tmp_path):
  pretrained.write(tmp_path / 'half', MODEL, params, TOKENIZER, dtype=jnp.bfloat16)
  with files.Weights(tmp_path / 'half') as stored:   # one tensor in float32
    tensors = {name: (w.shape, w.dtype, lambda w=w: w) for name, w in stored.items()}
    shape, _, give = tensors['model.norm.weight']
    tensors['model.norm.weight'] = shape, np.dtype('f4'), lambda: give().astype('f4') + 1e-5
    files.write(tmp_path / 'new', tensors)
  (tmp_path / 'new' / 'model.safetensors').replace(tmp_path / 'half' / 'model.safetensors')
  pretrained.save(str(tmp_path / 'half'), tmp_path / 'imported')
  export_hf.main(model=str(tmp_path / 'imported'), out=tmp_path / 'out')
  with files.Weights(tmp_path / 'half') as came, files.Weights(tmp_path / 'out') as goes:
    assert set(came) == set(goes) and len({x.dtype for x in came.values()}) == 2
    assert all(came[name].dtype == goes[name].dtype and np.array_equal(came[name], goes[name]) for name in came)
  start, expected = (pretrained.start(tmp_path / name, MODEL)(MODEL) for name in ('imported', 'half'))
  assert same(start, expected) and {x.dtype for x in jax.tree.leaves(start)} == {jnp.dtype(jnp.float32)}


def run(texts, **changes):
  return train.Run(MODEL, next_token(), dataset.Text(corpora.text(f'{texts}/*.txt'), TOKENIZER, 32),
                   optim.adam(schedules.warmup_constant(1e-3, 4, 1)), steps=2, batch=2, evaluate_batches=1, **changes)


@pytest.mark.slow
def test_a_run_starts_from_a_folder(folder, params, tmp_path):
  (tmp_path / 'texts').mkdir()
  for i in range(60):
    (tmp_path / 'texts' / f'{i}.txt').write_text(f'text {i} of some ' + 'words ' * (i % 9 + 5))
  started = []

  def start(model):
    started.append(pretrained.start(folder, model)(model))
    return started[-1]

  with jax.set_mesh(mesh := sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    result = train.train(run(tmp_path / 'texts', start=start), tmp_path / 'run', mesh)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), result.params, params)
    assert 0 < max(jax.tree.leaves(moved)) < 2.5e-3   # two steps of Adam at a rate of 1e-3 from the imported weights
    train.train(run(tmp_path / 'texts', start=start), tmp_path / 'run', mesh)
    assert len(started) == 1   # a resumed run starts from its own checkpoint


@pytest.mark.parametrize('name,value,message', [
    ('hidden_act', 'relu', 'hidden_act='), ('num_hidden_layers', 3, 'is missing'),
    ('num_hidden_layers', 1, 'not weights'), ('architectures', ['OtherForCausalLM'], 'OtherForCausalLM'),
    ('intermediate_size', 50, 'shape'), ('hidden_size', -16, 'positive'), ('rms_norm_eps', 'small', 'rms_norm_eps'),
    ('sliding_window_of_mine', 5, 'sliding_window_of_mine=5'),
    ('rope_parameters', {'rope_type': 'dynamic', 'factor': 2.}, 'dynamic'), ('vocab_size', 7, 'tokens'),
    ('quantization_config', {'quant_method': 'gptq'}, 'gptq'), ('head_dim', 5, 'partial_rotary_factor')])
def test_a_config_that_does_not_fit_is_refused_by_its_field(folder, tmp_path, name, value, message):
  for path in folder.iterdir():
    (tmp_path / path.name).symlink_to(path) if path.suffix != '.safetensors' else (
        (tmp_path / path.name).write_bytes(path.read_bytes()))
  config = json.loads((folder / 'config.json').read_text()) | {name: value}
  (tmp_path / 'config.json').unlink()
  (tmp_path / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ValueError, match=message):
    pretrained.load(str(tmp_path))


def test_missing_folders_and_shapes_that_do_not_fit_are_refused_before_anything_is_read(folder, tmp_path, params):
  with pytest.raises(FileNotFoundError, match='config.json'):
    pretrained.start(tmp_path, MODEL)
  with pytest.raises(FileNotFoundError, match='is no folder'):
    pretrained.load('/no/such/folder')
  wider = transformer.llama(MODEL.vocab, 32, 2, heads=4, kv_heads=2, max_length=32)
  with pytest.raises(ValueError, match=r'key: .\[2, 16, 2, 4\]. there, .\[2, 32, 2, 8\]. in this run'):
    pretrained.start(folder, wider)
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'file').write_text('')
  for write in (lambda: pretrained.write(tmp_path / 'full', MODEL, params, TOKENIZER),
                lambda: pretrained.save(str(folder), tmp_path / 'full')):
    with pytest.raises(ValueError, match='full'):
      write()
  assert [path.name for path in (tmp_path / 'full').iterdir()] == ['file']


@pytest.mark.parametrize('model,architecture', [
    (transformer.gpt2(64, 16, 2, 2, 32), 'GPT2LMHeadModel'), (MODEL, 'LlamaForCausalLM'),
    (encoder.bert(64, 16, 2, 2, 32), 'BertForMaskedLM'),
    (encoder_decoder.t5(64, 16, 2, 2, 8, 24), 'T5ForConditionalGeneration'),
    (encoder_decoder.t5(64, 16, 3, 2, 8, 24, gated=True, tied=False), 'T5ForConditionalGeneration')])
def test_our_models_belong_to_a_family_and_their_tensors_come_back(model, architecture, tmp_path):
  exporter, values = weights.export_config(model)
  assert exporter.architecture == architecture and values['architectures'] == [architecture]
  params = jax.jit(model.init)(jax.random.key(1))
  weights.write(tmp_path / 'out', model, params)
  again, family = weights.open_model(tmp_path / 'out')
  with files.Weights(tmp_path / 'out') as tensors:
    assert same(weights.load_params(again, family, tensors), params)


def test_weights_are_copied_in_blocks_and_the_pages_of_large_ones_given_back():
  rng, released = np.random.default_rng(0), []
  for array in (rng.normal(size=(300, 500)), rng.normal(size=(70, 30, 50)), rng.normal(size=(1 << 12, 1 << 12)),
                rng.normal(size=1 << 17), np.float64(3.)[None], np.zeros((0, 5))):
    source = array.astype('f4').T
    target = np.full(source.shape, np.nan, 'f4')
    weights._copy(target, source, lambda: released.append(None))
    assert np.array_equal(target, source) and not released
  weights._copy(target := np.zeros((1 << 13, 1 << 13), 'f4'), np.broadcast_to(np.float32(1), target.shape),
                lambda: released.append(int(target.sum())))
  # The pages of two quarters and a half.
  assert released[:3] == [1 << 24, 1 << 25, 1 << 25] and released[-1] == 1 << 26


def test_jax_uses_the_buffers_that_were_read_without_a_copy():
  for size in (1, 3, 1 << 16):
    array = weights._empty_aligned((size, 5), jnp.bfloat16)
    array[...] = 1
    assert array.shape == (size, 5) and jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


def test_of_a_model_on_the_hub_only_the_files_at_the_top_are_fetched(tmp_path, monkeypatch):
  hub = pytest.importorskip('huggingface_hub')
  names = ['config.json', 'model-00001-of-00002.safetensors', 'model.safetensors.index.json', 'tokenizer.model',
           'original/model.safetensors', 'original/config.json', 'original/tokenizer.model', 'onnx/x/model.safetensors',
           'pytorch_model.bin', 'README.md']
  fetched = []

  def download(name, **patterns):
    fetched.extend(hub.utils.filter_repo_objects(names, **patterns))
    return str(tmp_path)
  monkeypatch.setattr(hub, 'snapshot_download', download)
  assert pretrained.locate('some/model') == tmp_path and fetched == names[:4]


@pytest.mark.slow
def test_a_tokenizer_that_changes_text_is_exported_as_its_own_file(tmp_path):
  """A folder with only tokenizer.model, which changes text, is imported, trained from, and written."""
  model_file = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
      sentence_iterator=iter(['anna bert carl dora'] * 9), model_writer=model_file, vocab_size=300, model_type='bpe',
      byte_fallback=True, minloglevel=2, hard_vocab_limit=False)
  model = MODEL.clone(vocab=300)
  weights.write(tmp_path / 'in', model, jax.jit(model.init)(jax.random.key(0)))
  (tmp_path / 'in' / 'tokenizer.model').write_bytes(model_file.getvalue())
  tokens = pretrained.save(str(tmp_path / 'in'), tmp_path / 'imported').tokenizer
  started = run(tmp_path, start=pretrained.start(tmp_path / 'imported', model))
  assert load.origin_folder(started, tokens) == tmp_path / 'imported'   # the folder from which `export_hf` copies files
  assert load.origin_folder(started, TOKENIZER) is None
  export_hf.main(model=str(tmp_path / 'imported'), out=tmp_path / 'out')
  assert not (tmp_path / 'out' / 'tokenizer.json').exists()
  assert pretrained.load(str(tmp_path / 'out')).tokenizer.fingerprint == tokens.fingerprint
  params = jax.jit(model.init)(jax.random.key(0))
  with pytest.raises(ValueError, match='--like'):
    pretrained.write(tmp_path / 'alone', model, params, tokens)
  with pytest.raises(ValueError, match='is not that of the model'):
    pretrained.write(tmp_path / 'other', model, params, TOKENIZER, like=tmp_path / 'in')


def test_several_end_tokens_are_exported_and_read_back(params, tmp_path):
  pytest.importorskip('tokenizers')
  pretrained.write(tmp_path / 'first', MODEL, params, TOKENIZER)
  tokens = dataclasses.replace(pretrained.load(str(tmp_path / 'first')).tokenizer, ends=(7, 9))
  pretrained.write(tmp_path / 'out', MODEL, params, tokens)
  assert pretrained.load(str(tmp_path / 'out')).tokenizer.eos_ids == (TOKENIZER.eos_id, 7, 9)


@pytest.mark.parametrize('annotated', [False, True])
def test_a_run_of_dialogues_is_exported_with_its_template_and_end_tokens(tmp_path, monkeypatch, annotated):
  """Also where the data is annotated, as that of preferences is."""
  tokens, template = Bytes(), conversation.Turns()
  data = dialogues.Dialogues(source.Source('talk', {}, 'f'), tokens, 32, template=template)
  start = dataclasses.replace(run(tmp_path), data=annotate.Annotated(data, None, {}, None) if annotated else data)
  model = transformer.llama(tokens.vocab_size, 16, 1, 2, max_length=32)
  params = jax.jit(model.init)(jax.random.key(0))
  loaded = load.TrainedModel(start, model, params, tokens, 1, tmp_path, {})
  monkeypatch.setattr(load, 'open_trained', lambda folder, best: loaded)
  export_hf.main(workdir=tmp_path / 'run', out=tmp_path / 'out')
  assert pretrained.folder_template(tmp_path / 'out').source == template.jinja(tokens)
  assert pretrained.load(str(tmp_path / 'out')).tokenizer.eos_ids == (tokens.eos_id, *template.ends(tokens))


def test_a_model_that_no_family_computes_is_not_exported(params, tmp_path):
  block = MODEL.layers[0].clone(attention_out_norm=parts.RMSNorm())
  odd = MODEL.clone(blocks=stack.stacks([block, MODEL.layers[1]]))
  with pytest.raises(ValueError, match='no known family'):
    pretrained.write(tmp_path / 'odd', odd, jax.jit(odd.init)(jax.random.key(0)), TOKENIZER)
  assert not pathlib.Path(tmp_path / 'odd').exists()
