"""The base of `pretrain.py` gives its tokenizer and shape too, and flags that do not fit it are refused."""
import argparse
import inspect
import pathlib
import shutil

import finetune_chat
import jax
import jax.numpy as jnp
import numpy as np
import preference
import pretrain
import pytest

from lm import launch, load, lora, models, scripts, sharding, signature
from lm.data import tokenizers
from lm.hf import pretrained
from lm.launch import program as launcher

pytestmark = pytest.mark.usefixtures('compiled_once')


def knobs(*argv):
  (values, shared), _ = launch.parse([pretrain.experiment, launcher._train], ['pretrain.py', '--validation=0.3', *argv])
  return {'knobs': values, 'init': shared['init'], 'init_ignore_tokenizer': shared['init_ignore_tokenizer']}


@pytest.fixture(scope='module')
def mesh():
  with jax.set_mesh(mesh := sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    yield mesh


@pytest.fixture(scope='module')
def folder(tmp_path_factory, mesh):
  """Returns a folder with a run that has a tokenizer and a shape of its own, an import of it, and texts of two kinds.
  """
  folder = tmp_path_factory.mktemp('init')
  for name, module in (('old', argparse), ('new', inspect)):
    (folder / name).mkdir()
    lines = inspect.getsource(module).splitlines(keepends=True)
    for i in range(0, 800, 20):
      (folder / name / f'{i}.txt').write_text(''.join(lines[i:i + 20]))
  scripts.trust(pathlib.Path(pretrain.__file__))
  launch.start(pretrain.experiment, workdir=folder / 'run', mesh=mesh, **knobs(
      f'--text={folder}/old/*.txt', '--vocab=500', '--layers=1', '--width=16', '--heads=2', '--length=16', '--batch=4',
      '--steps=2', '--warmup=1', '--precision=bfloat16'))
  loaded = load.open_trained(folder / 'run')
  pretrained.write(folder / 'hf', loaded.model, loaded.params, loaded.tokenizer)
  pretrained.save(str(folder / 'hf'), folder / 'imported')
  return folder


@pytest.mark.parametrize('source', ['run', 'hf', 'imported'])
def test_init_gives_parameters_tokenizer_and_shape(folder, source):
  if source != 'run':
    pytest.importorskip('tokenizers')
  loaded, texts = load.open_trained(folder / 'run'), f'--text={folder}/new/*.txt'
  base = load.open_base(str(folder / source))
  for flag in ('init', 'model'):
    run = signature.call(pretrain.experiment, knobs(texts, f'--{flag}={folder / source}')['knobs']).open()
    assert run.data.tokenizer.fingerprint == base.tokenizer.fingerprint and run.start is None
    assert run.data.length == run.model.max_length == 16 and run.model.dtype == np.float32
    shapes = lambda model: jax.tree.map(lambda x: x.shape, jax.eval_shape(model.init, jax.random.key(0)))
    assert shapes(run.model) == shapes(loaded.model)
  text = 'new text of old words'
  assert np.array_equal(run.data.tokenizer.encode(text), loaded.tokenizer.encode(text))
  started = load.start_from(run, str(folder / source)).start(run.model)
  assert jax.tree.all(jax.tree.map(np.array_equal, started, loaded.params))


def test_a_precision_is_obeyed_where_the_base_is_a_run(folder):
  name = str(folder / 'run')
  assert load.open_base(name).model == load.open_trained(folder / 'run').model   # with its own precision, bfloat16
  for dtype in (np.dtype('float32'), jnp.dtype('bfloat16')):
    chat = signature.call(finetune_chat.experiment, model=name, precision=dtype.name).open()
    aligned = signature.call(preference.experiment, model=name, precision=dtype.name).open()
    assert chat.model.dtype == aligned.model.dtype == aligned.data.model.model.dtype == dtype

  class Fixed(models.LanguageModel):
    pass
  with pytest.raises(ValueError, match='class Fixed cannot be made to compute in bfloat16; leave out --precision'):
    Fixed().with_dtype(jnp.bfloat16)


@pytest.mark.slow
def test_init_with_another_tokenizer_needs_a_flag(folder, tmp_path, mesh):
  flags = f'--init={folder}/run', f'--text={folder}/new/*.txt', '--batch=4', '--steps=2', '--warmup=1'
  for own in ('--vocab=480', '--tokenizer_kind=bytes'):
    with pytest.raises(ValueError, match='for another tokenizer .*--init_ignore_tokenizer'):
      launch.start(pretrain.experiment, workdir=tmp_path / 'run', mesh=mesh, **knobs(*flags, own))
    assert not (tmp_path / 'run' / 'data').exists()
  settings = knobs(*flags, '--vocab=480', '--init_ignore_tokenizer')
  run, result = launch.start(pretrain.experiment, workdir=tmp_path / 'run', mesh=mesh, **settings)
  assert result.finished and run.start_tokenizer is None and run.model.vocab == 500
  assert load.open_trained(tmp_path / 'run').tokenizer.vocab_size == 480


def test_a_model_may_be_refused_before_its_weights_are_read(folder, monkeypatch):
  def refuse(model):
    raise ValueError(f'no {type(model).__name__} here')
  monkeypatch.setattr(load, 'read_params', None)
  with pytest.raises(ValueError, match='no Transformer here'):
    load.open_trained(folder / 'run', check=refuse)


def test_weights_without_a_tokenizer_are_started_from_on_demand(folder, tmp_path):
  loaded = load.open_trained(folder / 'run')
  pretrained.write(tmp_path / 'hf', loaded.model, loaded.params, loaded.tokenizer)
  for name in ('tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'):
    (tmp_path / 'hf' / name).unlink(missing_ok=True)
  settings = knobs(f'--init={tmp_path}/hf', f'--text={folder}/new/*.txt', '--vocab=480')
  run = signature.call(pretrain.experiment, settings['knobs']).open()
  with pytest.raises(FileNotFoundError, match='there is no such tokenizer'):
    load.start_from(run, str(tmp_path / 'hf'))
  assert load.start_from(run, str(tmp_path / 'hf'), ignore_tokenizer=True).start is not None


def test_flags_of_shape_count_before_that_of_init_and_not_beside_a_model(folder):
  flags = f'--init={folder}/run', f'--text={folder}/new/*.txt'
  run = signature.call(pretrain.experiment, knobs(*flags, '--layers=1', '--width=32', '--heads=2')['knobs']).open()
  assert (run.model.width, run.model.vocab) == (32, 500)
  assert run.data.tokenizer == load.open_trained(folder / 'run').tokenizer
  with pytest.raises(ValueError, match='run does not fit the model of this run'):
    load.start_from(run, str(folder / 'run'))
  for own in ('--width=32', '--vocab=480', '--dropout=0.1', '--tokenizer_kind=bytes'):
    with pytest.raises(ValueError, match=f'--model=.* gives the shape and the tokenizer, and {own} is given too'):
      signature.call(pretrain.experiment, knobs(f'--model={folder}/run', flags[1], own)['knobs']).open()


@pytest.mark.slow
def test_a_run_is_opened_without_its_base(folder, tmp_path, mesh):
  shutil.copytree(folder / 'run', tmp_path / 'base')
  flags = f'--init={tmp_path}/base', f'--text={folder}/new/*.txt', '--batch=4', '--steps=2', '--warmup=1'
  launch.start(pretrain.experiment, workdir=tmp_path / 'run', mesh=mesh, **knobs(*flags))
  (tmp_path / 'base').rename(tmp_path / 'moved')
  opened = load.open_trained(tmp_path / 'run')
  assert opened.step == 2 and load.origin_folder(opened.run, opened.tokenizer) is None


def test_adapters_take_the_shape_of_their_base(folder):
  settings = knobs(f'--init={folder}/run', f'--text={folder}/new/*.txt', '--lora_rank=2')
  run = signature.call(pretrain.experiment, settings['knobs']).open()
  started = load.start_from(run, str(folder / 'run'))
  assert lora.base_model(run.model).width == 16 and started.constants[0].load.step == 2


def test_an_import_with_another_config_or_tokenizer_is_refused(folder, tmp_path):
  pytest.importorskip('tokenizers')
  pretrained.save(str(folder / 'hf'), tmp_path / 'imported')
  path = tmp_path / 'imported' / 'config.json'
  path.write_text(path.read_text().replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": 0.1').replace(
      '"rms_norm_eps": 1e-06', '"rms_norm_eps": 0.1'))
  with pytest.raises(ValueError, match='config.json of .* is not of the model that was imported'):
    pretrained.load(str(tmp_path / 'imported'))
  for name in ('tokenizer.json', 'tokenizer_config.json'):
    (tmp_path / 'imported' / name).unlink(missing_ok=True)
  tokenizers.Bytes(('<|x|>',)).save(tmp_path / 'imported')
  with pytest.raises(ValueError, match='is not the one that was imported'):
    load.open_base(str(tmp_path / 'imported'))


def test_weights_with_other_values_have_another_fingerprint(folder, tmp_path):
  loaded = load.open_trained(folder / 'run')
  prints = []
  for scale in (1., 1.001, 1.):
    params = jax.tree.map(lambda x, scale=scale: scale * x, loaded.params)
    pretrained.write(tmp_path / f'{len(prints)}', loaded.model, params, loaded.tokenizer)
    prints.append(pretrained.start(tmp_path / f'{len(prints)}', loaded.model).parameters)
  assert prints[0] == prints[2] != prints[1]
