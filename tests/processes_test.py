"""Of processes of one machine that start at once, in a cluster or alone, one builds the data, and all read the same."""
import json
import os
import pathlib
import socket
import subprocess
import sys

import pytest
from helpers import as_shipped
from helpers.slow import slow

from lm.data import dataset

ROOT = pathlib.Path(__file__).parents[1]
OPEN = """
import hashlib, json, pathlib, sys
from lm.sharding import hosts as cluster
from lm.data import dataset
from lm.data.tokenizers import folder as tokenizer
from lm.data.text.source import Source
from lm.objectives.next_token import next_token

folder, *place = sys.argv[1:]
if place:
  cluster.join(place[0], 2, int(place[1]))
texts = [f'text number {i} of some, with words like w{i * 7} and more' for i in range(2000)]
source = Source('texts', {'train': texts, 'validation': ['held out']}, 'texts')
data = dataset.Text(source, lambda documents: tokenizer.train_sentencepiece(documents, 500), 32)
print('ready', file=sys.stderr, flush=True)   # of a cluster, only process 0 prints to stdout
sys.stdin.readline()
lines = []
opened = data.open(pathlib.Path(folder), lines.append)
batch = opened.batches('train', next_token(), 4)(0)
print(json.dumps({'lines': lines, 'tokenizer': opened.tokenizer.fingerprint, 'data': opened.fingerprint,
                  'tokens': hashlib.sha256(opened.stores['train'].tokens.tobytes()).hexdigest(),
                  'batch': batch.tokens.tolist()}), file=sys.stderr, flush=True)
"""
FLAGS = ['--vocab=400', '--length=16', '--layers=1', '--width=16', '--heads=2', '--batch=8', '--steps=2', '--warmup=1',
         '--evaluate_every=1', '--evaluate_batches=1', r'--separator=\n\n']


def start(arguments, folder):
  environment = os.environ | {'PYTHONPATH': str(ROOT), 'JAX_PLATFORMS': 'cpu', 'XLA_FLAGS': as_shipped.QUICK,
                              'XDG_CACHE_HOME': str(folder / 'cache')}
  return subprocess.Popen([sys.executable, *map(str, arguments)], env=environment, text=True, stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def address():
  with socket.socket() as free:
    free.bind(('localhost', 0))
    return f'localhost:{free.getsockname()[1]}'


def contents(folder):
  return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file()}


def results(processes):
  """Returns what each process printed, and its errors. No process outlives the test."""
  try:
    return [process.communicate(timeout=400) for process in processes]
  finally:
    for process in processes:
      process.kill()


@pytest.mark.parametrize('kind', ['cluster', *slow('plain')])
def test_one_process_builds_the_data_and_all_read_the_same(tmp_path, kind):
  script, coordinator, workdir = tmp_path / 'open.py', address(), tmp_path / 'run'
  script.write_text(OPEN)
  processes = [start([script, workdir, *([coordinator, i] if kind == 'cluster' else [])], tmp_path) for i in range(2)]
  for process in processes:   # both processes wait here; a cluster prints further lines
    while process.stderr.readline() not in ('ready\n', ''):
      pass
  for process in processes:
    process.stdin.write('\n')
    process.stdin.flush()
  ends = results(processes)
  assert [process.returncode for process in processes] == [0, 0], ends
  first, second = (json.loads(err[err.index('{"lines'):].splitlines()[0]) for _, err in ends)
  lines = [first.pop('lines'), second.pop('lines')]
  assert first == second
  trained = ['training the tokenizer' in each for each in lines]
  assert sum(trained) == 1 and sum(line.startswith('train:') for each in lines for line in each) == 1   # built once
  assert kind == 'plain' or trained[0]
  files = contents(workdir / 'data')
  assert not [name for name in files if name.endswith(('.new', '.partial')) or 'unfinished' in name]
  assert dataset.verify(workdir / 'data') == []

  alone, = results([start([script, tmp_path / 'alone'], tmp_path)])
  # The same files as one process writes.
  assert alone[1].count('ready') == 1 and contents(tmp_path / 'alone' / 'data') == files


@pytest.mark.slow
@pytest.mark.parametrize('kind', [pytest.param('cluster', marks=pytest.mark.long), 'plain'])
def test_programs_that_start_at_once_share_a_workdir_only_in_a_cluster(tmp_path, kind):
  """In a cluster both train. Alone, one of them trains, and the other is told to wait."""
  text, coordinator, workdir = tmp_path / 'a.txt', address(), tmp_path / 'run'
  text.write_text('\n\n'.join(f'this is text number {i} of some, with words like w{i * 7} and more' for i in range(60)))
  places = [[f'--coordinator_address={coordinator}', '--num_processes=2', f'--process_id={i}'] if kind == 'cluster' else
            [] for i in range(2)]
  processes = [start([ROOT / 'experiments/pretrain.py', f'--text={text}', f'--workdir={workdir}', *FLAGS, *place],
                     tmp_path) for place in places]
  ends = results(processes)
  codes = [process.returncode for process in processes]
  if kind == 'cluster':
    assert codes == [0, 0] and 'held out: loss' in ends[0][0] and 'training the tokenizer' in ends[0][0], ends
    assert '2 processes (flags)' in ends[0][0] and ends[1][0] == ''   # only process 0 prints
  else:
    assert sorted(codes) in ([0, 0], [0, 1]), ends   # the slower process may start after the other has ended
    assert 1 not in codes or 'another process is training in the workdir' in ends[codes.index(1)][1]
  assert sum('training the tokenizer' in out for out, _ in ends) == 1
  assert dataset.verify(workdir / 'data') == []
