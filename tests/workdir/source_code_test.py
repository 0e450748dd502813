"""The code of a user's functions and classes is a part of their descriptions."""
import importlib
import json
import os
import subprocess
import sys

import jax
import optax
import pytest

from lm.models import transformer
from lm.workdir import source_code
from lm.workdir.describe import describe, differences

SCRIPT = '''
import dataclasses
import functools
import jax
import flax.linen as nn
from jax.nn import relu as act
import near
from near import helper

FACTOR = 3.
LARGE = list(range(1000))
TABLE = {'square': lambda x: x * x, 'size': 4}

def power(x):
  """Text."""
  return act(x) ** near.POWER * FACTOR   # a comment

first = lambda x: x + 1; second = lambda x: x + 2

@jax.jit
def compiled(x):
  return TABLE['square'](x) + helper(x) + len(LARGE)

def outer(rate):
  def inner(x):
    return rate * x
  return inner

held = outer(0.5)

class Base(nn.Module):
  @nn.compact
  def __call__(self, x):
    return power(x)

class Block(Base):
  size: int = 4

def even(n):
  return n == 0 or odd(n - 1)

def odd(n):
  return n != 0 and even(n - 1)

part = functools.partial(power, 3)

@dataclasses.dataclass(frozen=True)
class Rule:
  rate: float = 1.
  def __call__(self, x):
    return x * self.rate
'''
NEAR = '''
POWER = 2
def helper(x):
  return x
'''
NAMES = ('power', 'first', 'compiled', 'held', 'Block', 'even', 'part', 'Rule')


@pytest.fixture
def load(tmp_path, monkeypatch):
  """Imports the script, after one edit of it or of its neighbour; gives the descriptions of what it defines."""
  monkeypatch.syspath_prepend(tmp_path)

  def load(before='', after=''):
    for name, text in (('script', SCRIPT), ('near', NEAR)):
      assert not before or SCRIPT.count(before) + NEAR.count(before) == 1
      (tmp_path / f'{name}.py').write_text(text.replace(before, after) if before else text)
      monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    monkeypatch.setattr(sys, 'dont_write_bytecode', True)
    module = importlib.import_module('script')
    descriptions = {name: describe(getattr(module, name)) for name in NAMES}
    return json.loads(json.dumps({**descriptions, 'Block': describe(module.Block()), 'Rule': describe(module.Rule())}))
  return load


@pytest.mark.parametrize('before, after, changed', [
    ('** near.POWER', '* near.POWER', {'power', 'Block', 'part'}),
    ('POWER = 2', 'POWER = 3', {'power', 'Block', 'part'}),
    ('FACTOR = 3.', 'FACTOR = 4.', {'power', 'Block', 'part'}),
    ('relu as act', 'gelu as act', {'power', 'Block', 'part'}),
    ('first = lambda x: x + 1', 'first = lambda x: x + 3', {'first'}),
    ('lambda x: x * x', 'lambda x: x * x * x', {'compiled'}),
    ("'size': 4", "'size': 5", {'compiled'}),
    ('range(1000)', 'range(999, -1, -1)', {'compiled'}),
    ('def helper(x):\n  return x', 'def helper(x):\n  return -x', {'compiled'}),
    ('outer(0.5)', 'outer(0.6)', {'held'}),
    ('return rate * x', 'return rate + x', {'held'}),
    ('return n != 0', 'return n > 0', {'even'}),
    ('return x * self.rate', 'return x + self.rate', {'Rule'}),
    ('class Block(Base)', 'class Block(Base, nn.Module)', {'Block'}),
    ('# a comment', '# another', set()), ('"""Text."""', '"""Other text."""', set()),
    ('** near.POWER * FACTOR', ' ** ( near.POWER ) * FACTOR', set())])
def test_an_edit_changes_the_description_of_what_reads_it(load, before, after, changed):
  was, now = load(), load(before, after)
  assert {name for name in NAMES if differences(was[name], now[name])} == changed
  lines = [line for name in changed for line in differences(was[name], now[name])]
  assert all('.code.' in f'.{line}' for line in lines)


def test_the_edited_name_is_reported(load):
  assert differences(load()['power'], load('POWER = 2', 'POWER = 3')['power']) == ['code.near.POWER: 2 before, 3 now']


def test_a_script_is_described_alike_whether_it_is_run_or_imported(load, tmp_path):
  expected = load()
  with (tmp_path / 'script.py').open('a') as file:
    file.write('import json\nfrom lm.workdir.describe import describe\n'
               'print(json.dumps({"power": describe(power), "Block": describe(Block())}))\n')
  environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
  process = subprocess.run([sys.executable, tmp_path / 'script.py'], capture_output=True, text=True, env=environment)
  assert process.returncode == 0, process.stderr
  assert json.loads(process.stdout) == {name: expected[name] for name in ('power', 'Block')}


def test_installed_packages_have_no_code_in_descriptions():
  for value in (jax.nn.gelu, optax.adamw, json.JSONDecoder, len, transformer.Transformer, transformer.llama, json):
    assert not source_code.is_users(value)
  assert 'code' not in json.dumps(describe(transformer.llama(9, 8, 1, 2)))


def test_code_without_a_file_is_known_by_its_bytecode():
  def bytecode_of(text):
    space = {'__name__': 'nowhere'}
    exec(text, space)
    return describe(space['f'])
  assert bytecode_of('def f(x): return x') == bytecode_of('def f(x): return x') != bytecode_of('def f(x): return -x')
