"""Flags reach the runs of experiments, and values that they do not take are refused by name."""
import pathlib

import jax
import numpy as np
import pytest
from absl import flags
from helpers.experiment_scripts import TINY
from helpers.slow import slow

from lm import launch, serve, sharding, signature, train
from lm.data import tokenizers
from lm.hf import pretrained
from lm.models import transformer


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


def test_rounded_weights_are_refused_before_any_are_read(scripts, tmp_path, monkeypatch):
  model = transformer.gpt2(258, 16, 1, 2, 16)
  params = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), jax.eval_shape(model.init, jax.random.key(0)))
  pretrained.write(tmp_path / 'model', model, params, tokenizers.Bytes())
  monkeypatch.setattr(pretrained, '_params', None)   # which would read them
  monkeypatch.setattr(serve, 'listen', lambda *_: None)
  for program, flags_given in ((scripts['generate'].main, {}), (scripts['serve'].main, {}),
                               (scripts['score'].score, {'text': 'a'})):
    with pytest.raises(ValueError, match='weights of int4 are for one device, and the model is on 8'):
      signature.call(program, flags_given, model=str(tmp_path / 'model'), weights='int4')


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
