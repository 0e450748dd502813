"""A program prints what it will read and, at its end, its results with the next command to type."""
import argparse
import inspect
import json
import re
import shlex
import sys

import finetune_chat
import generate
import pretrain
import pytest
import score

from lm import launch, signature
from lm.data import store
from lm.launch import outcome
from lm.workdir import figures

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.fixture
def program(tmp_path, monkeypatch, capsys):
  """Returns a function that runs a script in this process, and gives what it prints."""
  monkeypatch.setattr('lm.launch.program._cache_compilations', lambda: None)

  def go(*argv):
    name = argv[0].rpartition('/')[2]
    trains = name in ('pretrain.py', 'finetune_chat.py')
    monkeypatch.setattr(sys, 'argv', [*argv, *(['--nodoctor'] if trains else [])])
    if name == 'pretrain.py':
      launch.run(pretrain.experiment)
    elif name == 'finetune_chat.py':
      launch.run(finetune_chat.experiment, finetune_chat.report)
    else:
      launch.tool(generate.main)
    return capsys.readouterr().out
  return go


@pytest.fixture
def texts(tmp_path):
  lines = inspect.getsource(argparse).splitlines(keepends=True)
  for i in range(0, 600, 20):
    (tmp_path / f'{i}.txt').write_text(f'It\'s part {i} of a file.\n' + ''.join(lines[i:i + 20]))
  return f'--text={tmp_path}/*.txt', f'--workdir={tmp_path}/a run', '--validation=0.3'


TINY = '--tokenizer_kind=bytes', '--vocab=320', '--layers=1', '--width=16', '--heads=2', '--length=64', '--batch=8'


@pytest.mark.slow
def test_pretrain_writes_a_sample_and_the_next_command_runs(program, texts, tmp_path):
  out = program('pretrain.py', *texts, *TINY, '--steps=9', '--evaluate_batches=1')
  training = store.Store(tmp_path / 'a run/data/tokens', 'train')
  tokens = len(training.tokens)
  assert f'\none epoch is {tokens:,} tokens; this run reads ' in out
  read, epochs = re.search(r'reads ([\d,]+) tokens, (\S+) epochs\n', out).groups()
  assert float(epochs) == pytest.approx(9 * 8 * 64 / (tokens + len(training)), rel=0.02)
  assert int(read.replace(',', '')) == pytest.approx(float(epochs) * tokens, rel=0.01)
  prompt = re.search(r'the model continues "(It\'s part \d+ of a)", the first words of a held-out document:', out)[1]
  python, *argv = shlex.split(re.search(r'^next: (.*)$', out, re.MULTILINE)[1])
  assert python == 'python' and argv == ['experiments/generate.py', f'--workdir={tmp_path}/a run', f'--prompt={prompt}']
  assert f'\n{prompt}' in out.partition('document:')[2]
  assert program(*argv).startswith(prompt)


@pytest.mark.slow
def test_a_model_that_does_not_write_is_scored_next(program, texts, tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(figures, 'curve', lambda *paths: drawn.append(paths))
  out = program('pretrain.py', *texts, *TINY, '--steps=2', '--evaluate_batches=1', '--objective=masked')
  assert 'goes on from' not in out
  assert drawn == [(tmp_path / 'a run/metrics.jsonl', tmp_path / 'a run/curve.png')]
  assert '\nval: the first 1 of ' in out
  argv = shlex.split(re.search(r'^next: python (.*)$', out, re.MULTILINE)[1])
  (flags,), _ = launch.parse([score.score], argv)
  assert argv[0] == 'experiments/score.py' and flags.on_command_line == {'workdir', 'split'}


@pytest.mark.slow
def test_chat_ends_with_a_question_that_was_held_out(program, tmp_path, monkeypatch):
  monkeypatch.setattr(finetune_chat, 'QUESTIONS', 2)
  records = [{'prompt': f'What\'s {i} "and" {i}?', 'completion': f'{2 * i}'} for i in range(200)]
  (tmp_path / 'sums.jsonl').write_text('\n'.join(map(json.dumps, records)))
  out = program('finetune_chat.py', f'--jsonl={tmp_path}/sums.jsonl', f'--workdir={tmp_path}/run', '--validation=0.2',
                '--length=96', '--layers=1', '--width=16', '--heads=2', '--batch=8', '--steps=2')
  assert re.search(r'one epoch is [\d,]+ rows; this run reads 16 rows, ', out)
  argv = shlex.split(re.search(r'^next: python (.*)$', out, re.MULTILINE)[1])
  prompt = argv[-1].removeprefix('--prompt=')
  assert argv[:-1] == ['experiments/generate.py', f'--workdir={tmp_path}/run', '--chat']
  run = signature.call(finetune_chat.experiment, jsonl=f'{tmp_path}/sums.jsonl', validation=0.2)
  held_out = run.data.questions('validation', 99)
  assert prompt in [question[-1]['content'] for question, _ in held_out] and f'\n> {prompt}\n' in out


def test_a_script_that_lies_apart_is_named(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  program = outcome.command('score', tmp_path, tmp_path / 'my far.py', split='validation')
  assert shlex.split(program)[2:] == [f'--workdir={tmp_path}', '--split=validation', '--script=my far.py']
  path = shlex.split(program)[1]
  assert (tmp_path / path).resolve().name == 'score.py' and (tmp_path / path).exists()
