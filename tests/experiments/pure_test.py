"""Building the run of an experiment reads no file and computes nothing on a device.

A run that takes a model from a folder is pending: making it opens nothing, and neither does building it of what was
opened. Here the models are real ones, which are opened between the two.
"""
import json
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from lm import signature
from lm.data import tokenizers
from lm.hf import pretrained
from lm.models import encoder, encoder_decoder, transformer

ROOT = pathlib.Path(__file__).parents[2]
EXPERIMENTS = [path.stem for path in sorted((ROOT / 'experiments').glob('*.py'))
               if re.search(r'^def experiment\(', path.read_text(), re.MULTILINE)]
DECODER, T5, BERT, TOKENIZER = 'models/decoder', 'models/t5', 'models/bert', 'models/decoder/tokenizer.json'
NAMING = {'model', 'init', 'teacher', 'student', 'tokenizer_file'}   # flags that name what is opened
# Models and a tokenizer's file; data that are not there, a tokenizer that is trained, adapters, other objectives.
FLAGS = [('pretrain', {'model': DECODER}), ('pretrain', {'init': DECODER}),
         ('pretrain', {'init': DECODER, 'heads': 3}),
         ('pretrain', {'tokenizer_file': TOKENIZER}), ('pretrain', {'init': DECODER, 'tokenizer_file': TOKENIZER}),
         ('pretrain', {'model': DECODER, 'predict_ahead': 1, 'lora_rank': 2, 'precision': 'bfloat16'}),
         ('pretrain', {'text': 'no/*.txt', 'jsonl': 'no.jsonl', 'parquet': 'no.parquet', 'tfds': 'no'}),
         ('pretrain', {'tokenizer_kind': 'unigram', 'lora_rank': 2, 'spike_guard': 6.}),
         ('infill', {'text': 'no/*.txt', 'minutes': None, 'steps': 5}), ('infill', {'tokenizer_file': TOKENIZER}),
         ('denoise', {'text': 'no/*.txt', 'objective': 'ul2'}), ('denoise', {'objective': 'masked'}),
         ('denoise', {'model': T5}), ('denoise', {'objective': 'masked', 'model': BERT}),
         ('finetune_chat', {'model': DECODER}), ('finetune_chat', {'model': DECODER, 'lora_rank': 2}),
         ('customer_service', {'model': DECODER}), ('summarise', {'model': DECODER}),
         ('finetune_chat', {'jsonl': 'no/*.jsonl', 'tokenizer': 'bpe', 'lora_rank': 2}),
         *(('preference', {'model': DECODER, 'method': method}) for method in ('dpo', 'kto', 'orpo', 'reward')),
         ('preference', {'model': DECODER, 'jsonl': 'no/*.jsonl', 'method': 'kto', 'label': 'good'}),
         ('learned_metric', {'init': BERT}), ('distill', {'teacher': DECODER, 'student': DECODER}),
         ('distill', {'teacher': DECODER, 'text': 'no/*.txt', 'stored_top_k': 4})]
CASES = [*((name, {}) for name in EXPERIMENTS), *FLAGS]

# It runs in its own process, because JAX has no platform there, and the hook on files cannot be removed.
SCRIPT = """
import importlib, json, os, sys
import jax
from jax.extend import backend
from lm import signature, train

cases = json.loads(sys.argv[1])
modules = [importlib.import_module(name) for name, _ in cases]
guarded, stat, lstat = False, os.stat, os.lstat

def refuse(event, arguments=()):
  if guarded and event in ('open', 'os.listdir', 'os.scandir', 'os.mkdir', 'subprocess.Popen', 'socket.connect'):
    raise AssertionError(f'{event} {arguments}')

def guard(function):
  def call(path, *arguments, **options):
    if guarded:
      raise AssertionError(f'stat {path}')
    return function(path, *arguments, **options)
  return call

def forbid(files_and_devices):
  global guarded
  guarded = False
  backend.clear_backends()
  jax.config.update('jax_platforms', 'cuda' if files_and_devices else 'cpu')
  guarded = files_and_devices

def build(module, flags):
  forbid(True)
  run = signature.call(module.experiment, flags)
  if isinstance(run, train.Run):
    return
  inputs = {name: value for name, value in run.inputs.items() if value is not None}
  if any(value.name.startswith('runs/') for value in inputs.values()):   # the default, which is not there
    return
  forbid(False)
  opened = {name: value.open() for name, value in inputs.items()}
  forbid(True)
  assert isinstance(run.build(**{**run.inputs, **opened}), train.Run)

sys.addaudithook(refuse)
os.stat, os.lstat = guard(stat), guard(lstat)
for (name, flags), module in zip(cases, modules):
  try:
    build(module, flags)
  except (RuntimeError, AssertionError) as error:   # JAX raises either where there is no platform
    os.write(1, f'refused: {name}\\n'.encode())
    os.write(2, f'{name} {flags}: {error}\\n'.encode())
  else:
    os.write(1, f'pure: {name}\\n'.encode())
  guarded = False
"""
IMPURE = {
    'opens': 'def experiment(*, n: int = 1):\n  open(__file__)\n',
    'computes': 'def experiment(*, n: int = 1):\n  import jax.numpy as jnp\n  jnp.zeros(n) + 1\n',
    'opens_late': 'from lm import named, train\ndef experiment(*, n: int = 1):\n  return train.after_opening('
                  f'lambda base: open(__file__), base=named.decoder("model", "{DECODER}"))\n'}


@pytest.fixture(scope='module')
def built(tmp_path_factory) -> list[str]:
  folder = tmp_path_factory.mktemp('impure')
  control = (*tokenizers.CONTROL, '<|mask|>', *(f'<extra_id_{i}>' for i in range(100)))
  for path, model in ((DECODER, transformer.llama(440, 16, 1, heads=2, max_length=512)),
                      (T5, encoder_decoder.t5(440, 16, 1, 2, 8, 64, gated=True, tied=False)),
                      (BERT, encoder.bert(440, 16, 1, 2, 256))):
    pretrained.write(folder / path, model, jax.jit(model.init)(jax.random.key(0)),
                     tokenizers.Bytes(tuple(dict.fromkeys(control))))
  for name, text in IMPURE.items():
    (folder / f'{name}.py').write_text(text)
  paths = os.pathsep.join(map(str, (ROOT, ROOT / 'experiments', folder)))
  environment = {name: value for name, value in os.environ.items() if not name.startswith(('JAX', 'XLA'))}
  cases = json.dumps([*CASES, *((name, {}) for name in IMPURE)])
  process = subprocess.run([sys.executable, '-B', '-c', SCRIPT, cases], capture_output=True, text=True, cwd=folder,
                           env={**environment, 'PYTHONPATH': paths, 'JAX_PLATFORMS': 'cuda'})
  return [*process.stdout.splitlines(), process.stderr]


def test_the_run_of_every_experiment_is_built_without_files_and_devices(built):
  *lines, errors = built
  assert [line for line in lines if line.startswith('pure')] == [f'pure: {name}' for name, _ in CASES], errors


def test_opening_a_file_or_computing_fails_this_test(built):
  assert [line for line in built if line.startswith('refused')] == [f'refused: {name}' for name in IMPURE]


def test_every_flag_that_names_a_model_or_a_tokenizer_is_among_the_cases(monkeypatch):
  monkeypatch.syspath_prepend(ROOT / 'experiments')
  covered = {(name, flag) for name, flags in FLAGS for flag in flags}
  for name in EXPERIMENTS:
    for flag in signature.flags(__import__(name).experiment):
      assert flag.name not in NAMING or (name, flag.name) in covered
