"""Building the run of an experiment reads no file and computes nothing on a device.

Only a model or a tokenizer's file that a flag names is opened, since the run has its shape and vocabulary.
"""
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
EXPERIMENTS = [path.stem for path in sorted((ROOT / 'experiments').glob('*.py'))
               if re.search(r'^def experiment\(', path.read_text(), re.MULTILINE)]
# Flags that name data that are not there, a tokenizer that is trained, adapters, or another objective.
FLAGS = [('pretrain', {'text': 'no/*.txt', 'jsonl': 'no.jsonl', 'parquet': 'no.parquet', 'tfds': 'no'}),
         ('pretrain', {'tokenizer_kind': 'unigram', 'lora_rank': 2, 'spike_guard': 6.}),
         ('infill', {'text': 'no/*.txt', 'minutes': None, 'steps': 5}),
         ('denoise', {'text': 'no/*.txt', 'objective': 'ul2'}), ('denoise', {'objective': 'masked'}),
         ('finetune_chat', {'jsonl': 'no/*.jsonl', 'tokenizer': 'bpe', 'lora_rank': 2}),
         ('preference', {'jsonl': 'no/*.jsonl', 'method': 'kto', 'label': 'good'}),
         ('preference', {'method': 'reward'}),
         ('distill', {'text': 'no/*.txt', 'stored_top_k': 4})]
CASES = [*((name, {}) for name in EXPERIMENTS), *FLAGS]

# In a process of its own, whose JAX has no platform to compute on, and whose hook on files stays to its end.
SCRIPT = """
import importlib, json, os, sys
from lm import load, signature, train
from lm.data import tokenizers
from lm.models import transformer

cases = json.loads(sys.argv[1])
modules = [importlib.import_module(name) for name, _ in cases]
model = transformer.llama(320, 16, 1, heads=2, max_length=512)
base = load.BaseModel(model, tokenizers.Bytes(), None, None)
FAKES = {'preference': 'open_base', 'distill': 'open_teacher'}   # the one place of each where a model is opened

def refuse(event, arguments=()):
  if event in ('open', 'os.listdir', 'os.scandir', 'os.mkdir', 'subprocess.Popen', 'socket.connect'):
    raise AssertionError(f'{event} {arguments}')

def stat(path, *_, **__):
  raise AssertionError(f'stat {path}')

sys.addaudithook(refuse)
os.stat = os.lstat = stat
for (name, flags), module in zip(cases, modules):
  if name in FAKES:
    setattr(module, FAKES[name], lambda *_: base)
  try:
    run = signature.call(module.experiment, flags)
  except (RuntimeError, AssertionError) as error:   # JAX raises either where there is no platform
    os.write(1, f'refused: {name}\\n'.encode())
    os.write(2, f'{name} {flags}: {error}\\n'.encode())
    continue
  assert isinstance(run, train.Run), name
  os.write(1, f'pure: {name}\\n'.encode())
"""
OPENS = 'def experiment(*, n: int = 1):\n  open(__file__)\n'
COMPUTES = 'def experiment(*, n: int = 1):\n  import jax.numpy as jnp\n  jnp.zeros(n) + 1\n'


@pytest.fixture(scope='module')
def built(tmp_path_factory) -> list[str]:
  folder = tmp_path_factory.mktemp('impure')
  (folder / 'opens.py').write_text(OPENS)
  (folder / 'computes.py').write_text(COMPUTES)
  paths = os.pathsep.join(map(str, (ROOT, ROOT / 'experiments', folder)))
  environment = {name: value for name, value in os.environ.items() if not name.startswith(('JAX', 'XLA'))}
  cases = json.dumps([*CASES, ('opens', {}), ('computes', {})])
  done = subprocess.run([sys.executable, '-B', '-c', SCRIPT, cases], capture_output=True, text=True, cwd=folder,
                        env={**environment, 'PYTHONPATH': paths, 'JAX_PLATFORMS': 'cuda'})
  return [*done.stdout.splitlines(), done.stderr]


def test_the_run_of_every_experiment_is_built_without_files_and_devices(built):
  *lines, errors = built
  assert [line for line in lines if line.startswith('pure')] == [f'pure: {name}' for name, _ in CASES], errors


def test_what_does_open_or_compute_is_refused_here(built):
  assert [line for line in built if line.startswith('refused')] == ['refused: opens', 'refused: computes']
