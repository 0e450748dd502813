"""With --verify, a program reports a changed byte in any file of the data by the name of that file."""
import re
import sys

import jax
import numpy as np
import pytest
from helpers.tokenizers import piece_model

from lm import launch, optim, train
from lm.data import dataset, tokenizers
from lm.data.text.source import Source
from lm.evaluate import annotate
from lm.models import transformer
from lm.objectives import objective
from lm.objectives.next_token import next_token
from lm.optim import schedules
from lm.workdir import integrity

SOURCE = Source('tiny', {'train': ['anna', 'bert carl ' * 9, 'dora'], 'validation': ['carl anna']}, 'fingerprint')
FILES = ['tokenizer/settings.json', 'tokenizer/tokenizer.model', 'tokenizer/separators.json', 'tokens/manifest.json',
         *(f'tokens/{split}/{name}' for split in SOURCE.splits for name in ('tokens.bin', 'offsets.npy', 'sizes.npy')),
         *(f'columns/{split}/{name}' for split in SOURCE.splits for name in ('columns.json', 'reference.npy'))]


def load(model):
  return jax.jit(lambda: model.init(jax.random.key(7)))()


def log_probabilities(apply, params, batch):
  outputs = apply(params, batch)
  return {'reference': objective.target_log_probabilities(outputs.hidden, outputs.head, batch.targets)}


def experiment(*, steps: int = 1) -> train.Run:
  """Returns a run on data with every kind of file: a tokenizer that is not lossless, and a stored column."""
  t = tokenizers.SentencePiece(piece_model(), '<s>', '</s>')
  model = transformer.llama(304, 16, 1, 1, max_length=16)
  data = annotate.Annotated(dataset.Text(SOURCE, t, 16, rules=()), train.Constants('reference', model, load),
                            {'reference': (np.float32, ())}, log_probabilities)
  return train.Run(model, next_token(), data, optim.sgd(schedules.warmup_constant(0.1, 10, 1)), steps=steps, batch=8)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return tmp_path_factory.mktemp('verify') / 'run'


@pytest.fixture
def program(workdir, monkeypatch, capsys):
  """Trains the experiment once, and returns a function that runs it with flags and gives (exit code, output, errors).
  """
  monkeypatch.setattr('lm.launch.program._cache_compilations', lambda: None)

  def go(*argv):
    monkeypatch.setattr(sys, 'argv', ['verify_test.py', f'--workdir={workdir}', '--nodoctor', *argv])
    capsys.readouterr()
    try:
      launch.run(experiment)
    except SystemExit as stop:
      return stop.code, *capsys.readouterr()
    return 0, *capsys.readouterr()

  if not workdir.exists():
    assert go()[0] == 0
  return go


@pytest.mark.slow
def test_unchanged_files_are_verified(program, workdir):
  code, out, err = program('--verify')
  assert code == 0 and 'not verified' not in out and not err
  assert sorted(FILES) == sorted(str(path.relative_to(workdir / 'data')) for path in (workdir / 'data').rglob('*')
                                 if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize('name', FILES)
def test_a_changed_byte_is_reported_by_the_name_of_its_file(program, workdir, name):
  path = workdir / 'data' / name
  data = path.read_bytes()
  try:
    for place in (len(data) // 2, len(data) - 1):
      path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1:])
      code, _, err = program('--verify')
      assert code == 1 and re.search(f'{path}.* is (damaged|not as it was written)', err) and err.count('\n') == 1, err
      assert sum(f'data/{other}' in err for other in FILES) == 1, err
  finally:
    path.write_bytes(data)


def test_all_changed_files_are_reported_at_once(program, workdir):
  paths = [workdir / 'data' / 'tokens' / split / 'tokens.bin' for split in SOURCE.splits]
  data = [path.read_bytes() for path in paths]
  try:
    for path, before in zip(paths, data):
      path.write_bytes(bytes([before[0] ^ 1]) + before[1:])
    code, _, err = program('--verify')
    assert code == 1 and 'are not as they were written' in err and all(str(path) in err for path in paths)
  finally:
    for path, before in zip(paths, data):
      path.write_bytes(before)


@pytest.mark.slow
def test_files_without_checksums_are_named_and_a_tokenizer_gets_them(program, workdir):
  path = workdir / 'data' / 'tokenizer' / 'settings.json'
  data = path.read_text()
  facts, _ = integrity.parse_json_with_checksum(data)
  old = {name: value for name, value in facts.items() if name not in ('fingerprint', 'checksums')}
  path.write_text(integrity.json_with_checksum(old))
  code, out, _ = program('--verify', '--steps=1')
  assert code == 0 and re.search(f'not verified, .*: {path.parent}', out)
  assert f'its tokenizer has the fingerprint {facts["fingerprint"]}' in out and path.read_text() == data
  code, out, _ = program('--verify')
  assert code == 0 and 'not verified' not in out and 'fingerprint' not in out


def test_a_tokenizer_without_fingerprint_is_compared_with_the_checkpoint(program, workdir):
  """One piece is changed. The folder has no fingerprint, and the checkpoint has one."""
  folder = workdir / 'data' / 'tokenizer'
  before = {name: (folder / name).read_bytes() for name in ('settings.json', 'tokenizer.model')}
  facts, _ = integrity.parse_json_with_checksum(before['settings.json'].decode())
  try:
    older = {name: value for name, value in facts.items() if name not in ('fingerprint', 'checksums')}
    (folder / 'settings.json').write_text(integrity.json_with_checksum(older))
    (folder / 'tokenizer.model').write_bytes(before['tokenizer.model'].replace(b'dora', b'bora'))
    code, _, err = program()
    assert code == 1 and 'tokenizer' in err and 'before' in err
    assert 'checksums' not in (folder / 'settings.json').read_text()   # no checksums of the refused files are stored
  finally:
    for name, data in before.items():
      (folder / name).write_bytes(data)
