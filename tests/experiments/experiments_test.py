"""Every experiment trains at a small size, and lowers at its own size for many devices; every tool starts."""
import argparse
import functools
import importlib
import inspect
import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from absl import flags
from helpers.declared import bound
from helpers.slow import slow

from lm import launch, optim, sharding, signature, train
from lm import load as trained
from lm import scripts as lm_scripts
from lm.data import tokenizers
from lm.data.chat import shop_dialogues
from lm.data.text import corpora, puzzles
from lm.hf import pretrained
from lm.launch import program as launcher
from lm.models import transformer
from lm.workdir import track

ROOT = pathlib.Path(__file__).parents[2]
# By name: the experiments and the benchmarks, without what the benchmarks share, and the command line of another
# program.
SCRIPTS = {path.stem: path for folder in ('experiments', 'experiments/benchmarks')
           for path in sorted((ROOT / folder).glob('*.py')) if path.stem not in ('interleaved', 'harness')}
# Flags that make each experiment tiny.
TINY = {
    'pretrain': ['--text={folder}/*.txt', '--tokenizer_kind=bytes', '--vocab=320', '--length=16', '--layers=1',
                 '--width=16', '--heads=2', '--batch=8', '--steps=2', '--warmup=1', '--evaluate_every=1',
                 '--evaluate_batches=1'],
    'finetune_chat': ['--layers=1', '--width=16', '--heads=2', '--batch=8', '--steps=2', '--warmup=1'],
    'customer_service': ['--vocab=400', '--length=512', '--layers=1', '--width=16', '--heads=2', '--batch=8',
                         '--steps=2', '--warmup=1'],
    'summarise': ['--jsonl={folder}/summaries.jsonl', '--vocab=400', '--length=64', '--layers=1', '--width=16',
                  '--heads=2', '--batch=8', '--steps=2', '--warmup=1'],
    'preference': ['--length=64', '--batch=8', '--steps=2', '--warmup=1'],
    'distill': ['--teacher={folder}/teacher', '--text={folder}/*.txt', '--length=16', '--width=16', '--batch=8',
                '--steps=2'],
    'denoise': ['--steps=2', '--vocab=600', '--length=32', '--layers=1', '--width=16', '--heads=2', '--batch=8'],
    'learned_metric': ['--steps=2', '--patience=1', '--vocab=600', '--length=64', '--layers=1', '--width=16',
                       '--heads=2', '--batch=8'],
    'infill': ['--steps=2', '--vocab=600', '--length=16', '--layers=1', '--width=16', '--heads=2', '--batch=8'],
    'diffusion': ['--steps=2', '--vocab=600', '--length=16', '--layers=1', '--width=16', '--heads=2', '--batch=8'],
    'overfit': ['--steps=2', '--documents=8', '--vocab=600', '--length=16', '--layers=1', '--width=16', '--heads=2',
                '--batch=8', '--dropout=0.1', '--subword_sampling=0.1', '--token_dropout=0.1'],
    'mup': ['--steps=2', '--vocab=600', '--length=16', '--layers=1', '--width=32', '--batch=8'],
    'quickstart': ['--steps=2', '--vocab=600', '--length=16', '--layers=1', '--width=16', '--heads=2', '--batch=8'],
}
# What a tool is asked for beside --help: flags that it must understand.
TOOLS = {
    'generate': ['--prompt=def ', '--temperature=0.5', '--stop=a,b', '--draft=1'],
    'score': ['--text=something', '--source=some', '--best'],
    'serve': ['--port=0', '--rows=2', '--cors=https://example.org'],
    'import_hf': ['--model=a/b', '--out=/nowhere'],
    'doctor': ['--workdir=/nowhere', '--best', '--mesh=fsdp:1'],
    'copy_run': ['--workdir=/nowhere', '--out=gs://bucket/run', '--step=3'],
    'proof': ['--meshes=fsdp:8; fsdp:4,tensor:2', '--steps=3'],
    'mesh_costs': ['--steps=3'],
    'start_up': ['--restarts=2'],
    'export_hf': ['--workdir=/nowhere', '--out=/nowhere/else', '--dtype=bfloat16'],
    'tfds_builder': ['--text=*.txt', '--data_dir=/nowhere', r'--separator=\n\n'],
    'noise_scale': ['--batches=8', '--rows=4', '--best'],
    'training': [],
    'bleurt_scores': ['--number=8', '--batch=4'],
    'checkouts': ['--other=/nowhere', '--rounds=2'],
    'objective_costs': ['--only=distillation', '--shape=tiny'],
    'optimizer_costs': ['--only=soap', '--shape=tiny'],
    'chaos': ['--kills=3', '--places=1x8,2x4', '--move'],
    'schedules': ['--only=steps', '--milestones=3,4'],
    'compare': ['--arms=a: ; b: lr=1', '--equal=flops'],
    'optimizers': ['--seeds=2'],
    'sweep': ['--knobs=lr=1,2', '--method=random'],
    'scaling': ['--budgets=1,2'],
    'evaluate': ['--workdir=/nowhere', '--suite=suite.json'],
    'scoring': ['--families=gpt2,bert,t5'],
    'decoding': ['--new_tokens=4'],
    'importing': ['--rounds=1'],
    'checkpoint_stall': ['--width=64', '--saves=1'],
    'harness_requests': ['--rounds=1', '--width=64'],
    'temperatures': ['--temperatures=0.5,1', '--limit=8', '--best'],
    'classify': ['--classes=a= good,b= bad', '--jsonl=x.jsonl', '--label_key=class', '--limit=none'],
    'customer_tools': ['--address=http://localhost:1/v1', '--model=m', '--dialogues=2', '--key_variable=none'],
    'code_generation': ['--model=gpt2', '--problems=a.jsonl', '--limit=2', '--execute_code', '--k=1'],
    'contamination': ['--items=x.jsonl', '--jsonl=*.jsonl', '--item_keys=question,choices', '--most_documents=none'],
    'score_texts': ['--candidates=a.jsonl,b.jsonl', '--references=r.txt', '--metrics=bleu,rouge', '--stem',
                    '--bleurt=/nowhere', '--bert_score=/nowhere', '--use_idf'],
    'compare_outputs': ['--outputs=a.jsonl,new=b.jsonl', '--references=c.txt,d.txt', '--metrics=chrf', '--lowercase'],
    'judge': ['--outputs=a.jsonl,new=b.jsonl', '--address=http://localhost', '--model=judge', '--votes=votes.csv'],
    'human_eval': ['--outputs=a.jsonl,new=b.jsonl', '--mode=likert', '--criteria=fluency,relevance', '--raters=3'],
}


load = importlib.import_module


@pytest.fixture(scope='module')
def scripts():
  """All of them imported in this process, and named as those whose runs are opened."""
  lm_scripts.trust(*SCRIPTS.values())
  return {name: load(name) for name in SCRIPTS}


def names(experiments: bool) -> list[str]:
  has = {name: re.search(r'^def experiment\(', path.read_text(), re.MULTILINE) for name, path in SCRIPTS.items()}
  return sorted(name for name, value in has.items() if bool(value) is experiments)


@pytest.fixture(scope='module')
def start(scripts, tmp_path_factory):
  """Returns a folder with a small run of finetune_chat, from which preference starts."""
  folder = tmp_path_factory.mktemp('start')
  (knobs,), _ = launch.parse([scripts['finetune_chat'].experiment], ['finetune_chat.py', *TINY['finetune_chat']])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(puzzles, 'dialogues', functools.partial(puzzles.dialogues, 300))
    launcher._train(scripts['finetune_chat'].experiment, knobs, None, workdir=folder / 'runs/finetune_chat',
                    doctor=False)
  return folder


@pytest.fixture
def small(start, monkeypatch):
  """Returns small values for what the experiments would otherwise read: few puzzles, and a run to start from."""
  for module, name in (puzzles, 'dialogues'), (puzzles, 'preferences'), (shop_dialogues, 'shop'):
    monkeypatch.setattr(module, name, functools.partial(getattr(module, name), 300))
  monkeypatch.chdir(start)


@pytest.fixture
def texts(tmp_path):
  folder = tmp_path / 'texts'
  folder.mkdir()
  lines = inspect.getsource(argparse).splitlines(keepends=True)
  for i in range(0, len(lines), 20):
    (folder / f'{i}.txt').write_text(''.join(lines[i:i + 20]))
  pairs = [json.dumps({'prompt': line.strip(), 'completion': line.split()[0]}) for line in lines if line.strip()]
  (folder / 'summaries.jsonl').write_text('\n'.join(pairs))
  model = transformer.llama(264, 16, 1, heads=4, max_length=1024)   # a teacher of its own
  params = jax.jit(model.init)(jax.random.key(0))
  pretrained.write(folder / 'teacher', model, params, tokenizers.Bytes(('<|bos|>', '<|eos|>')))
  return folder


# Experiments most of whose parts another one lowers.
LIKE_ANOTHER = 'denoise', 'diffusion', 'distill', 'finetune_chat', 'infill', 'mup', 'overfit', 'preference'
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


@pytest.mark.parametrize('name', ['ul2', 'infill', *slow('prefix', 'masked', 'span_corruption')])
def test_pretrain_learns_other_objectives(name, scripts, texts, monkeypatch):
  flag = f'--objective={name}', '--label_smoothing=0.1', '--z_loss=1e-4', f'--text={texts}/*.txt'
  argv = ['pretrain.py', *TINY['pretrain'][1:], *flag]
  (knobs,), _ = launch.parse([scripts['pretrain'].experiment], argv)
  run = signature.call(scripts['pretrain'].experiment, knobs)
  assert set(run.objective.control) <= set(run.data.tokenizer.control_names)
  mesh = sharding.make_mesh('fsdp:1', jax.devices()[:1])
  with jax.set_mesh(mesh):
    train.check(run, mesh)


def test_pretrain_names_control_tokens(scripts):
  def make(*argv):
    (knobs,), _ = launch.parse([scripts['pretrain'].experiment], ['pretrain.py', *argv])
    return signature.call(scripts['pretrain'].experiment, knobs)
  assert make('--objective=masked', '--control=[MASK]').objective.control == ('[MASK]',)
  assert make('--objective=ul2', '--control=a,b,c').objective.control[-3:] == ('a', 'b', 'c')
  with pytest.raises(ValueError, match='--control=a names control tokens, and --objective=next_token has none'):
    make('--control=a')


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


def test_pretrain_regularises_by_flags(scripts):
  def make(*argv):
    (knobs,), _ = launch.parse([scripts['pretrain'].experiment], ['pretrain.py', *argv])
    return signature.call(scripts['pretrain'].experiment, knobs)
  run = make('--dropout=0.1', '--embedding_dropout=0', '--attention_dropout=0.2', '--stochastic_depth=0.6',
             '--shuffle=1', '--token_dropout=0.3', '--batch_warmup=200:4,500:8', '--length_warmup=300:64')
  block = run.model.layers[0]
  assert (run.model.dropout, block.dropout, block.attention.scores.dropout) == (0., 0.1, 0.2)
  np.testing.assert_allclose(run.model.layer_dropout.rates, np.arange(1, 7) / 10)
  assert [type(a).__name__ for a in run.augment] == ['Shuffle', 'TokenDropout'] and run.augment[1].rate == 0.3
  assert [run.schedule.shape(step) for step in (0, 200, 300, 500)] == [(32, 64), (64, 64), (8, 512), (16, 512)]
  assert make().augment == make().stages == () and make().model.layer_dropout is None
  for argv, message in ((('--layer_dropout=0.1', '--stochastic_depth=0.1'), 'give one of them'),
                        (('--batch_warmup=200',), r'--batch_warmup=200 is not of the form'),
                        (('--length_warmup=300:64,200:8',), 'end at steps 300, 200')):
    with pytest.raises(ValueError, match=message):
      make(*argv)


def test_a_distillation_is_evaluated_and_saved_as_its_flags_say(scripts):
  teacher = trained.BaseModel(transformer.llama(300, 16, 1, heads=2, max_length=16), tokenizers.Bytes(), None, None)
  for flags_given, expected in ({}, (125, 125)), ({'evaluate_every': 7, 'save_every': 9}, (7, 9)):
    pending = signature.call(scripts['distill'].experiment, length=16, width=16, **flags_given)
    run = pending.build(base=teacher, like=None)
    assert (run.evaluate_every, run.save_every) == expected


def test_pretrain_cuts_one_text_file_into_documents(scripts, tmp_path):
  (tmp_path / 'plays.txt').write_text('\n\n'.join(f'speech {i}' for i in range(200)))
  argv = ['pretrain.py', f'--text={tmp_path}/plays.txt', r'--separator=\n\n', '--validation=0.3']
  (knobs,), _ = launch.parse([scripts['pretrain'].experiment], argv)
  splits = signature.call(scripts['pretrain'].experiment, knobs).data.source.splits
  assert sum(map(len, splits.values())) == 200 and 40 < len(splits['validation']) < 80


@pytest.mark.parametrize('argv, message', [
    ([f'--{name}='], rf'flag --{name}=: expected .* \| none; it is empty, perhaps an unset shell variable')
    for name in ('text', 'jsonl', 'parquet', 'tfds', 'separator', 'model', 'init', 'tokenizer_file', 'stop_words')] + [
    ([f'--{name}={value}'], f'--{name}={value} is not positive')
    for name in ('vocab', 'length') for value in (0, -1)] + [
    (['--text= '], '--text=  is empty'), (['--objective=span_corruption', '--mean_span=0'], '--mean_span=0.0 is less'),
    (['--predict_ahead=1', '--ahead_weight=-1'], 'weight=-1.0: it must be at least 0'),
    (['--z_loss=inf'], 'a z-loss of inf'), (['--key='], '--key='),
    *[(['--schedule=steps', '--milestones=500', f'--drop={value}'], f'--drop={value} is not between 0 and 1')
      for value in (2., 0., 1.)],
    *[([f'--decompressed_limit={value}', '--jsonl=a'], f'--decompressed_limit={value} is not positive')
      for value in (0., -1.)],
    (['--mup_width=8', '--optimizer=muon'], 'this is llama with muon'), (['--mup_width=-8'], 'base_width=-8 is not'),
    (['--weights=1'], '--weights=1.0 is for a mixture'), (['--text=a', '--weights=1'], 'leave it out'),
    (['--text=a', '--tfds=b', '--weights=0,0'], '--weights=0.0,0.0 leaves all corpora out'),
    (['--text=a', '--norepeat'], '--repeat=false is for a mixture'),
    (['--text=a', '--tfds=b', '--weights=-1,1'], '--weights=-1.0,1.0 has a weight that is negative'),
    (['--text=a', '--tfds=b', '--weights=1'], 'has 1 numbers for 2 corpora'),
    (['--jsonl=a', '--separator=x'], '--separator=x cuts the files of --text, which is not given'),
    (['--text=a', '--validation=0'], '--validation=0.0 is not a share between 0 and 1')])
def test_pretrain_refuses_bad_values(scripts, argv, message):
  with pytest.raises((ValueError, flags.Error), match=message):
    (knobs,), _ = launch.parse([scripts['pretrain'].experiment], ['pretrain.py', *argv])
    signature.call(scripts['pretrain'].experiment, knobs)


@pytest.mark.parametrize('flag, users', [
    ('noise=0.2', ['objective=masked', 'objective=span_corruption']), ('mean_span=2', ['objective=span_corruption']),
    ('infill_rate=0.5', ['objective=infill']), ('ahead_weight=0.5', ['predict_ahead=1']),
    ('drop=0.2', ['schedule=steps']), ('ahead_modules=parallel', ['predict_ahead=1']),
    ('lora_alpha=4', ['lora_rank=2'])])
def test_pretrain_refuses_flags_that_have_no_effect(scripts, flag, users):
  def build(*argv):
    (knobs,), _ = launch.parse([scripts['pretrain'].experiment], ['pretrain.py', *argv])
    return signature.call(scripts['pretrain'].experiment, knobs)
  for others in ([], ['--objective=ul2']):
    with pytest.raises(ValueError, match=f'--{flag}.* has no effect without --{users[0].partition("=")[0]}'):
      build(f'--{flag}', *others)
  for user in users:
    build(f'--{flag}', f'--{user}', *(['--milestones=500'] if 'schedule' in user else []))


@pytest.mark.parametrize('flags_given, message', [
    ({'max_tokens': 0}, '--max_tokens=0 must be'), ({'stop': ('END', '')}, 'no --stop may be empty'),
    ({'draft': -1}, '--draft=-1 '), ({'lookup': 16}, '--lookup=16 must be'), ({'best_of': -1}, '--best_of=-1 '),
    ({'n': 0}, '--n=0'),
    ({'top_k': -2}, 'top_k=-2'), ({'beams': 2, 'n': 3}, '--beams=2 must be at least --n=3'),
    ({'beams': 2, 'temperature': 0.5}, '--temperature=0.5 has no effect with --beams'),
    ({'beams': 2, 'stop': ('a',)}, 'has no effect with --beams'),
    ({'beams': 2, 'lookup': 1}, '--beams and --lookup exclude each other'),
    ({'draft': 2, 'regex': 'a'}, '--draft and --regex exclude each other'),
    ({'best_of': 2, 'reward': pathlib.Path('a'), 'draft': 1}, '--best_of and --draft exclude each other'),
    ({'length_penalty': 2.}, '--length_penalty=2 .*for --beams, which is not given'),
    ({'chat': True, 'n': 2}, '--n=2 has no effect with --chat without --prompt'),
    ({'prompts': pathlib.Path('a')}, 'go together'), ({'rows': 3}, '--rows=3 is for --prompts'),
    ({'prompts': pathlib.Path('a'), 'out': pathlib.Path('a')}, '--out=a is the file of --prompts'),
    ({'prompts': pathlib.Path('a'), 'out': pathlib.Path('b'), 'prompt': 'x'}, '--prompt=x has no effect')])
def test_generate_refuses_bad_values_before_a_model_is_read(scripts, flags_given, message):
  with pytest.raises(ValueError, match=message):
    signature.call(scripts['generate'].main, flags_given, workdir=pathlib.Path('not there'))


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


@pytest.mark.parametrize('name', ['finetune_chat', 'preference', 'distill', 'score'])
def test_a_limit_that_lets_nothing_through_is_refused_before_anything_is_read(scripts, name):
  flags_given = {'jsonl': 'not there', 'decompressed_limit': -1.}
  with pytest.raises(ValueError, match='--decompressed_limit=-1.0 is not positive'):
    signature.call(getattr(scripts[name], 'score' if name == 'score' else 'experiment'), flags_given)


@pytest.mark.parametrize('name', ['pretrain', 'finetune_chat', 'preference'])
def test_no_validation_is_refused_and_few_steps_need_no_other_flag(scripts, name):
  with pytest.raises(ValueError, match='--validation=0.0 is not a share between 0 and 1; every run is validated'):
    signature.call(scripts[name].experiment, validation=0., **({'model': 'gpt2'} if name == 'preference' else {}))
  if name != 'preference':   # preference starts from a model
    assert signature.call(scripts[name].experiment, steps=3).steps == 3
