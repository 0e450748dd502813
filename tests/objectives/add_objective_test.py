"""A new objective is one file, that of docs/extend.md, which the experiment there trains by flags."""
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path):
  """Returns a folder with the files of docs/extend.md, and a text in which the character two places ahead is certain.
  """
  for name in ('skip.py', 'far.py'):
    page = (ROOT / 'docs/extend.md').read_text()
    text, = re.findall(rf'^```python\n(# {name}.*?)^```', page, re.DOTALL | re.MULTILINE)
    (tmp_path / name).write_text(text)
  (tmp_path / 'books').mkdir()
  letters = ''.join(map(chr, np.random.default_rng(0).permutation(np.arange(48, 112))))
  for i in range(40):
    (tmp_path / 'books' / f'{i}.txt').write_text(letters[i:] + letters * (5 + i))
  return tmp_path


def run(folder, *flags):
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
  command = [sys.executable, 'far.py', *flags]
  process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
  assert process.returncode == 0, process.stderr
  return process.stdout


@pytest.mark.slow
def test_an_objective_and_an_experiment_in_files_of_their_own_are_trained_by_flags(folder):
  run(folder, '--distance=2', '--layers=1', '--width=64', '--steps=40', '--lr=3e-2')
  rows = [json.loads(line) for line in (folder / 'runs' / 'far' / 'metrics.jsonl').read_text().splitlines()]
  losses = [row['loss'] for row in rows if 'loss' in row]
  assert len(losses) == 40 and losses[0] == pytest.approx(np.log(512), rel=0.15) and losses[-1] < 0.5 * losses[0]
  assert rows[-1]['validation/loss'] < 0.5 * losses[0] and rows[-1]['validation/accuracy'] > 0.3
  assert {'grad_norm', 'accuracy', 'learning_rate'} <= rows[0].keys()
  record = json.loads((folder / 'runs' / 'far' / 'run.json').read_text())[-1]
  assert record['knobs'] == {'distance': 2, 'layers': 1, 'width': 64, 'steps': 40, 'lr': 0.03}


@pytest.mark.slow
@pytest.mark.long
def test_its_run_is_opened_by_other_programs_if_they_name_its_script(folder):
  run(folder, '--layers=1', '--width=64', '--steps=2')
  score = ROOT / 'experiments' / 'score.py', '--workdir=runs/far', '--text=some text'
  command = [sys.executable, *score]
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
  process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
  assert process.returncode == 1 and process.stderr.count('\n') == 1
  assert f'name it: --script={folder}/far.py' in process.stderr
  process = subprocess.run([*command, '--script=far.py'], cwd=folder, env=environment, capture_output=True, text=True)
  assert process.returncode == 0 and 'bits a byte' in process.stdout, process.stderr


def test_help_tells_the_flags_of_an_experiment(folder):
  assert re.search(r'--distance +\(whole number; default 2\)', run(folder, '--help'))
