"""Each kind of error is raised for real, and a program prints what its user needs: one line, or the traceback."""
import errno
import importlib
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.disks import files_of

from lm import launch
from lm.data import tokenizers
from lm.launch import failures
from lm.workdir import atomic, checkpoint, track


@pytest.fixture
def full_disk(tmp_path):
  """Returns a folder on a disk of 200 kB."""
  folder = tmp_path / 'small'
  folder.mkdir()
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=200k', 'tmpfs', folder], capture_output=True)
  if mounted.returncode:
    pytest.skip(f'only root can mount a small disk: {mounted.stderr.decode().strip()}')
  yield folder
  subprocess.run(['umount', '-l', folder], check=True)


@pytest.fixture
def fails(monkeypatch, capsys):
  """Returns a function that gives what a program prints when it fails, and asserts that its exit code is 1."""
  monkeypatch.setattr('lm.launch.program._cache_compilations', lambda: None)

  def run(function, *argv):
    def program():
      function()

    monkeypatch.setattr(sys, 'argv', ['script.py', *argv])
    with pytest.raises(SystemExit) as stop:
      launch.tool(program)
    assert stop.value.code == 1
    return capsys.readouterr().err
  return run


MEMORY = [lambda: jnp.zeros(1 << 45), jax.jit(lambda: jnp.zeros(1 << 45)), lambda: np.zeros(1 << 58)]


@pytest.mark.parametrize('exhaust', MEMORY, ids=['array', 'program', 'host'])
def test_memory_that_is_short_is_called_memory(fails, exhaust):
  line = fails(exhaust)
  assert line.count('\n') == 1 and 'enough memory; take a smaller model or batch' in line and ' allocat' in line
  assert 'Traceback' in fails(exhaust, '--debug')


def test_a_full_disk_is_called_a_full_disk_and_named(fails, full_disk):
  path = full_disk / 'facts.json'
  line = fails(lambda: atomic.write(path, 'x' * 300_000))
  assert line.count('\n') == 1 and f'error: the disk is full: {path} could not be written; free space' in line
  assert not list(full_disk.iterdir())   # no unfinished file remains
  atomic.write(path, 'x' * 1000)


def test_a_file_that_may_not_grow_is_named(fails, tmp_path):
  with files_of(2000):
    line = fails(lambda: atomic.write(tmp_path / 'facts.json', 'x' * 3000))
  assert line.count('\n') == 1 and f'allowed: {tmp_path / "facts.json"} could not be written' in line
  assert failures.explain(OSError(errno.EDQUOT, 'Disk quota exceeded', 'a/b')).startswith(
      'the quota of the disk is used up: a/b')


def test_a_full_disk_in_a_checkpoint_is_no_lack_of_memory(fails, full_disk):
  from lm.workdir import checkpoint

  def save():
    with checkpoint.Checkpoints(full_disk) as checkpoints:
      checkpoints.save(1, {'x': jax.random.normal(jax.random.key(0), (300, 300))}, {})

  line = fails(save)
  assert f'error: a checkpoint could not be written to {full_disk}' in line and 'disk is full' in line
  assert 'memory' not in line and 'Traceback' not in line


def test_bad_input_is_one_line(fails, tmp_path):
  for function in (lambda: tokenizers.load(tmp_path / 'absent'), lambda: tokenizers.Bytes().decode([1000]),
                   lambda: jax.eval_shape(lambda x: tokenizers.Bytes().decode([1000]), 1.),
                   lambda: (tmp_path / 'absent').read_text(), lambda: int('x'), lambda: __import__('absent')):
    assert fails(function).count('\n') == 1
  assert fails((tmp_path / 'absent').read_text).startswith(f'error: {tmp_path}/absent: no such file or directory  (')


# In the first case the traceback has no frames of JAX and ends in this file, like that of an error which we raise.
@pytest.mark.parametrize('bug', [
    lambda: jax.lax.scan(lambda c, x: (c, x), 0, (jnp.zeros(2), jnp.zeros(3))),
    lambda: jax.vmap(lambda x: x)(3.), lambda: jnp.concatenate([]),
    lambda: {}['key'], lambda: jax.jit(lambda x: x.reshape(2, 2))(jnp.zeros(3))])
def test_errors_of_a_library_keep_their_traceback(fails, bug):
  assert 'Traceback' in (text := fails(bug)) and pathlib.Path(__file__).name in text


def test_not_a_number_found_by_jax_keeps_its_traceback(fails):
  with jax.debug_nans(True):
    assert 'Traceback' in fails(lambda: jnp.log(jnp.float32(-1)))


def test_the_program_exits_if_the_explanation_of_an_error_fails(fails, monkeypatch):
  monkeypatch.setattr(failures, 'explain', lambda error: 1 / 0)
  fails(lambda: int('x'))


def test_unfinished_files_of_processes_that_are_gone_are_removed(tmp_path):
  with subprocess.Popen([sys.executable, '-c', '']) as process:
    process.wait()
  pid = process.pid
  names = [f'a.json.{pid}.new', 'a.json.1.new', f'b.json.{pid}.new', f'xa.json.{pid}.new']
  for name in names:
    (tmp_path / name).touch()
  atomic.write(tmp_path / 'a.json', '{}')
  assert {path.name for path in tmp_path.iterdir()} == {'a.json', *names[1:]}


def test_a_message_names_the_flags_of_the_program_with_their_dashes():
  text = 'heads=3 does not divide width=64: top_k=4 of block.heads=3, --lr=1.0, steps=none. See seed=16, rate=0.9.'
  values = {'heads': 3, 'width': None, 'top_k': 0, 'lr': 1., 'steps': None, 'seed': 1, 'rate': 0.9}
  assert failures.with_dashes(text, values) == (
      '--heads=3 does not divide --width=64: top_k=4 of block.heads=3, --lr=1.0, --steps=none. See seed=16, '
      '--rate=0.9.')
  assert failures.with_dashes(text, {}) == text


@pytest.mark.parametrize('argv, message', [
    (['--heads=3', '--width=64'], 'error: --heads=3 does not divide --width=64'),
    (['--width=64'], 'error: --heads=6 does not divide --width=64'),   # the experiment chose one of them
    (['--dropout=0.1', '--patience=-1'], 'error: --patience=-1 evaluations')])
def test_a_script_names_its_flags_in_the_errors_of_functions(argv, message, tmp_path, monkeypatch, capsys):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / 'experiments')
  monkeypatch.setattr('lm.launch.program._cache_compilations', lambda: None)
  monkeypatch.setattr(sys, 'argv', ['pretrain.py', f'--workdir={tmp_path}/run', *argv])
  with pytest.raises(SystemExit):
    launch.run(importlib.import_module('pretrain').experiment)
  assert message in capsys.readouterr().err


@pytest.mark.slow
def test_a_best_metric_that_is_not_logged_is_refused_with_the_nearest_and_one_that_is_decides(tmp_path, monkeypatch,
                                                                                              capsys):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / 'experiments')
  monkeypatch.setattr('lm.launch.program._cache_compilations', lambda: None)
  (tmp_path / 'text.txt').write_text('\n'.join(f'line {i} of some text' for i in range(200)))
  argv = ['pretrain.py', f'--workdir={tmp_path}/run', f'--text={tmp_path}/text.txt', '--tokenizer_kind=bytes',
          '--vocab=320', '--length=16', '--layers=1', '--width=16', '--heads=2', '--batch=8', '--steps=4', '--warmup=0',
          '--evaluate_every=1', '--evaluate_batches=1', '--save_every=1', '--lr=0.1', '--nodoctor']
  experiment = importlib.import_module('pretrain').experiment

  def start(*flags):
    monkeypatch.setattr(sys, 'argv', [*argv, *flags])
    launch.run(experiment)
  for flag, message in (('--best=validation/bits_per_bite', 'the nearest is validation/bits_per_byte or'),
                        ('--best=accuracy', 'its name begins with validation/'),
                        ('--best=validation/accuracy', 'would keep the least accurate checkpoint')):
    with pytest.raises(SystemExit):
      start(flag)
    error = capsys.readouterr().err
    assert error.startswith(f"error: --best='{flag.removeprefix('--best=')}'") and message in error
  # The worst evaluation, which is not the last.
  start('--best=validation/bits_per_byte', '--better=higher', '--keep=1')
  values = {row['step']: row['validation/bits_per_byte'] for row in track.read_metrics(tmp_path / 'run/metrics.jsonl')
            if 'validation/bits_per_byte' in row}
  with checkpoint.Checkpoints(tmp_path / 'run/checkpoints', create=False) as checkpoints:
    assert checkpoints.best_step() == max(values, key=values.get) == 1
    assert set(checkpoints.steps()) == {1, 4}
