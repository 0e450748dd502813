"""Every experiment trains at a small size, and lowers at its own size for many devices; every tool starts."""
import inspect
import re
import sys

import jax
import numpy as np
import pytest
from absl import flags
from helpers.declared import bound
from helpers.experiment_scripts import ROOT, SCRIPTS, TINY, TOOLS
from helpers.slow import slow

from lm import launch, optim, sharding, signature, train
from lm import load as trained
from lm.data import tokenizers
from lm.data.text import corpora
from lm.launch import program as launcher
from lm.models import transformer
from lm.workdir import track


def names(experiments: bool) -> list[str]:
  has = {name: re.search(r'^def experiment\(', path.read_text(), re.MULTILINE) for name, path in SCRIPTS.items()}
  return sorted(name for name, value in has.items() if bool(value) is experiments)


# Experiments most of whose parts another one lowers.
LIKE_ANOTHER = (
    'denoise', 'diffusion', 'distill', 'finetune_chat', 'infill', 'learned_metric', 'mup', 'overfit', 'preference')
LIKE_FINETUNE_CHAT = 'customer_service', 'summarise'   # other data, and another report
EXPERIMENTS = [name for name in names(experiments=True) if name not in LIKE_ANOTHER + LIKE_FINETUNE_CHAT]
CASES = [*EXPERIMENTS, *slow(*LIKE_ANOTHER),
         *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.long]) for name in LIKE_FINETUNE_CHAT)]


@pytest.mark.parametrize('name', CASES)
def test_an_experiment_trains(name, scripts, texts, small, tmp_path, monkeypatch):
  assert name in TINY, f'give {name} the flags that make it tiny'
  small_default = corpora.text(f'{texts}/*.txt')
  monkeypatch.setattr(corpora, 'python_library', lambda validation=0.05: small_default)
  argv = [f'{name}.py', *(flag.format(folder=texts) for flag in TINY[name])]
  (knobs, shared), debug = launch.parse([scripts[name].experiment, launcher._train], argv)
  mesh = sharding.make_mesh('fsdp:1', jax.devices()[:1])
  assert not debug and shared['workdir'] is None
  with jax.set_mesh(mesh):
    run = train.build(signature.call(scripts[name].experiment, knobs))
    result = train.train(run, tmp_path / 'run', mesh)
  assert result.finished and result.step == 2 and np.isfinite(list(result.metrics.values())).all()
  rows = track.read_metrics(tmp_path / 'run' / 'metrics.jsonl')
  losses = [row['loss'] for row in rows if 'loss' in row]
  # The loss of a new model is that of a uniform distribution.
  assert len(losses) == 2 and losses[0] < 1.1 * np.log(run.model.vocab)


def defaults(module, name: str, texts) -> train.Run:
  knobs = {flag.name: flag.default for flag in signature.flags(module.experiment)}
  if 'steps' in knobs and knobs['steps'] is None:   # otherwise the time of a step would be measured
    knobs['steps'] = 1000
  if 'teacher' in knobs:   # otherwise the teacher would be a run
    knobs['teacher'] = str(texts / 'teacher')
  return train.build(signature.call(module.experiment, knobs))


@pytest.mark.parametrize('shape', [
    'fsdp:4,tensor:2', pytest.param('fsdp:8', marks=[pytest.mark.slow, pytest.mark.long])])
@pytest.mark.parametrize('name', CASES)
def test_an_experiment_lowers_at_its_own_size_on_many_devices(name, shape, scripts, texts, small):
  mesh = sharding.abstract_mesh(shape)
  with jax.sharding.use_abstract_mesh(mesh):
    run = defaults(scripts[name], name, texts)
    train.check(run, mesh)
    state = train.abstract_state(run, mesh)
    inputs = state, train.abstract_batch(run, mesh), train.abstract_constants(run)
    lowered = train.make_step(run).trace(*inputs).lower(lowering_platforms=('tpu',))
  assert f'num_partitions = {mesh.size}' in lowered.as_text()[:400]
  new, metrics = lowered.out_info
  described = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)
  assert described(new) == described(state) and metrics['loss'].shape == ()
  split = [leaf for leaf in jax.tree.leaves(state.params) if leaf.ndim > 1 and any(leaf.sharding.spec)]
  whole = sum(leaf.size for leaf in jax.tree.leaves(state.params))
  assert sum(leaf.size for leaf in split) > 0.98 * whole   # hardly any stored parameter is replicated


@pytest.mark.parametrize('name', names(experiments=True) + names(experiments=False))
def test_a_script_explains_itself_and_its_flags(name, scripts, capsys):
  module, text = scripts[name], SCRIPTS[name].read_text()
  assert name in TINY or name in TOOLS, f'give {name} a line in one of the tables'
  functions = [getattr(module, function) for function in re.search(r'launch\.(?:run|tool)\((\w+)', text).groups()]
  functions += [launcher._train] if 'launch.run(' in text else []
  with pytest.raises(SystemExit) as stop:
    launch.parse(functions, [f'{name}.py', '--help'])
  out = capsys.readouterr().out
  assert not stop.value.code and module.__doc__.split('\n')[0] in out
  described = signature.notes_of(functions[0])
  assert set(described) <= {flag.name for flag in signature.flags(functions[0])}   # names only flags that exist
  assert f'python {SCRIPTS[name].relative_to(ROOT)}' in module.__doc__
  for example in re.findall(r'--(\w+)', module.__doc__):
    assert re.search(rf'^  --{example} ', out, re.MULTILINE), f'the example of {name} uses --{example}'
  if name in TOOLS or 'launch.run(' in text:
    launch.parse(functions, [f'{name}.py', *TINY.get(name, TOOLS.get(name))])
  with pytest.raises(flags.Error, match='unknown flag --nosuchflag'):
    launch.parse(functions, [f'{name}.py', '--nosuchflag=1'])
  assert sys.modules.get('tensorflow') is None


SHARED = {   # flags that siblings have too
    **dict.fromkeys(('infill', 'denoise', 'distill'), (
        'evaluate_every', 'evaluate_batches', 'save_every', 'accumulate', 'precision', 'warmup', 'weight_decay')),
    'finetune_chat': ('evaluate_batches', 'keep', 'clip', 'schedule', 'lora_alpha', 'size'),
    'preference': ('evaluate_batches', 'keep', 'clip', 'schedule', 'lora_alpha', 'weight_decay')}


@pytest.mark.parametrize('name', names(experiments=True))
def test_an_experiment_has_few_flags_of_its_own_and_those_of_its_siblings(name, scripts):
  listed = signature.flags(scripts[name].experiment)
  assert sum(not flag.title for flag in listed) <= 25
  assert {flag.name for flag in listed} >= set(SHARED.get(name, ()))
  lines = inspect.getsource(scripts[name].experiment).splitlines()
  assert len(lines) - len((scripts[name].experiment.__doc__ or '').splitlines()) < 80


def test_flags_of_groups_reach_the_runs_of_all_experiments(scripts):
  """This covers the experiments that read no folder: the run has the value that the flag gives."""
  for name in ('pretrain', 'infill', 'denoise', 'finetune_chat'):
    run = signature.call(scripts[name].experiment, evaluate_every=7, evaluate_batches=3, save_every=9, keep=5,
                         patience=2, accumulate=2, precision='bfloat16', lr=0.5, warmup=4, schedule='constant',
                         steps=40, batch=8)
    assert (run.evaluate_every, run.evaluate_batches, run.save_every, run.keep, run.patience, run.accumulate) == (
        7, 3, 9, 5, 2, 2), name
    params = {'embedding': np.ones((4, 2), 'f4'), 'norm': {'scale': np.ones(2, 'f4')}}
    state = bound(run.optimizer, params).init(params)
    assert run.model.dtype == 'bfloat16' and float(optim.learning_rate(state)) == pytest.approx(0.5 / 5)


@pytest.mark.parametrize('method', ['cdpo', 'ipo', 'kto', 'orpo', 'simpo', 'reward'])
def test_every_method_of_preference_fits_together(method, scripts, small):
  mesh = sharding.abstract_mesh('fsdp:4,tensor:2')
  with jax.sharding.use_abstract_mesh(mesh):
    (knobs,), _ = launch.parse([scripts['preference'].experiment], ['preference.py', f'--method={method}', '--steps=3'])
    train.check(signature.call(scripts['preference'].experiment, knobs).open(), mesh)


def test_preference_says_how_to_make_what_it_starts_from(scripts, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(FileNotFoundError, match='make it with "python experiments/finetune_chat.py"'):
    scripts['preference'].experiment().open()


@pytest.mark.slow
def test_preference_prints_what_it_reached_and_generate_chats_with_it(scripts, small, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('lm.launch.program._cache_compilations', lambda: None)
  monkeypatch.setattr(scripts['preference'], 'QUESTIONS', 2)
  workdir = f'--workdir={tmp_path}/run'
  monkeypatch.setattr(sys, 'argv', ['preference.py', *TINY['preference'], '--method=kto', workdir])
  launch.run(scripts['preference'].experiment, scripts['preference'].report)
  out = capsys.readouterr().out
  assert re.search(r'held out: .*accuracy', out) and re.search(r'after: \d of 2 answers are exactly', out)
  monkeypatch.setattr(sys, 'argv', ['generate.py', workdir, '--chat', '--prompt=hi', '--max_tokens=4'])
  launch.tool(scripts['generate'].main)
  assert not capsys.readouterr().out.startswith('hi')


def test_a_distillation_is_evaluated_and_saved_as_its_flags_say(scripts):
  teacher = trained.BaseModel(transformer.llama(300, 16, 1, heads=2, max_length=16), tokenizers.Bytes(), None, None)
  for flags_given, expected in ({}, (125, 125)), ({'evaluate_every': 7, 'save_every': 9}, (7, 9)):
    pending = signature.call(scripts['distill'].experiment, length=16, width=16, **flags_given)
    run = pending.build(base=teacher, like=None)
    assert (run.evaluate_every, run.save_every) == expected


@pytest.mark.slow
def test_a_trained_run_opens_without_its_corpus(scripts, texts, tmp_path, monkeypatch, capsys):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr('lm.launch.program._cache_compilations', lambda: None)

  def pretrain(*argv):
    monkeypatch.setattr(sys, 'argv', ['pretrain.py', *TINY['pretrain'][1:], '--workdir=run', '--nodoctor', *argv])
    launch.run(scripts['pretrain'].experiment)
  pretrain('--text=texts/*.txt')
  texts.rename(tmp_path / 'moved')
  with pytest.raises(SystemExit):
    pretrain('--text=texts/*.txt', '--width=32')   # the run was recorded but never trained
  assert f"no file matches 'texts/*.txt' in {tmp_path};" in capsys.readouterr().err
  with jax.set_mesh(sharding.make_mesh()):
    loaded = trained.open_trained(tmp_path / 'run')
  assert loaded.step == 2 and loaded.tokenizer.vocab_size > 256


@pytest.mark.slow
def test_every_script_with_a_model_flag_accepts_a_workdir(scripts, texts, tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('lm.launch.program._cache_compilations', lambda: None)
  monkeypatch.setattr(sys, 'argv', ['pretrain.py', '--nodoctor', *TINY['pretrain'][1:], f'--text={texts}/*.txt',
                                    f'--workdir={tmp_path}/run'])
  launch.run(scripts['pretrain'].experiment)
  run, shown = tmp_path / 'run', {}
  for reference in ({'model': str(run)}, {'workdir': run}):
    capsys.readouterr()
    scripts['score'].score(**reference, text='some text')
    signature.call(scripts['generate'].main, reference, prompt='some', max_tokens=4)
    scripts['export_hf'].main(**reference, out=tmp_path / f'out-{len(shown)}')
    shown[len(shown)] = capsys.readouterr().out.replace(f'out-{len(shown)}', 'out')
  assert shown[0] == shown[1] and 'bits a byte' in shown[0]
  student = signature.call(scripts['distill'].experiment, teacher=str(run), student=str(run), length=16).open()
  assert student.model == trained.open_base(str(run)).model
  with pytest.raises(ValueError, match='is a decoder, and what is needed is an encoder-decoder'):
    signature.call(scripts['denoise'].experiment, model=str(run)).open()
  with pytest.raises(ValueError, match='is the workdir of a run, which needs no import'):
    scripts['import_hf'].main(model=str(run), out=tmp_path / 'imported')
