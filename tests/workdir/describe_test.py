"""A run has a description, and two descriptions differ by named paths."""
import dataclasses
import functools
import json
import pathlib
import subprocess
import sys
from typing import Any

import flax.linen as nn
import jax  # noqa: F401  (of the expression below)
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from lm.workdir import mismatch
from lm.workdir.describe import describe, differences

ROOT = pathlib.Path(__file__).parents[2]


class Block(nn.Module):
  heads: int
  activation: Any = nn.relu
  dtype: Any = jnp.bfloat16


class Model(nn.Module):
  block: Block
  widths: tuple[int, ...] = (4, 8)


@dataclasses.dataclass(frozen=True)
class Run:
  model: Any
  optimizer: Any
  rule: Any = functools.partial(max, 3, key=abs)
  table: Any = None


def without_code(tree):
  if isinstance(tree, dict):
    return {name: without_code(item) for name, item in tree.items() if name != 'code'}
  return [without_code(item) for item in tree] if isinstance(tree, list) else tree


def test_differences_are_named_by_their_path():
  of = lambda heads, widths=(4, 8), **block: json.loads(json.dumps(describe(
      Run(Model(Block(heads, **block), widths), optax.adamw(1e-3), table=np.arange(3)))))
  stored = of(6)
  assert set(stored['code']) > {'describe_test.Run'} and 'describe_test.Block' in stored['model']['block']['code']
  assert without_code(stored['model']) == {'class': 'Model', 'widths': [4, 8], 'block': {
      'class': 'Block', 'heads': 6, 'activation': 'relu', 'dtype': 'bfloat16'}}
  assert stored['rule'] == {'partial': 'max', 'args': [3], 'key': 'abs'}
  assert stored['table'].startswith('int64[3] ')
  assert differences(stored, of(6, name='other')) == []
  assert differences(stored, of(8)) == ['model.block.heads: 6 before, 8 now']
  assert differences(stored, of(6, (4,), dtype=jnp.float32)) == [
      "model.block.dtype: 'bfloat16' before, 'float32' now",
      'model.widths.1: 8 before, absent now']
  assert differences({'a': 1, 'b': {}}, {'a': True, 'b': []}) == [
      'a: 1 before, True now', "b: {} before, '[]' now"]
  mismatch.check(stored, of(6))
  with pytest.raises(ValueError, match=r'\n  model.block.heads: 6 before, 8 now\n  model.widths.0: 4'):
    mismatch.check(stored, of(8, (5, 8)))


def test_a_description_ends_at_a_cycle():
  def pair(rate):
    def even(n):
      return n == 0 or odd(n - 1)

    def odd(n):
      return n != 0 and even(n - 1) * rate
    return even
  described = describe(pair(2), inside=True)
  name = described['function'].removesuffix('even')
  assert without_code(described) == {
      'function': f'{name}even', 'odd': {'function': f'{name}odd', 'even': f'{name}even', 'rate': 2}}
  lines = differences(without_code(described), without_code(describe(pair(3), inside=True)))
  assert lines == ['odd.rate: 2 before, 3 now']
  ring = [1]
  ring.append(ring)
  assert describe(ring) == [1, 'list']
  shared = (1, 2)
  assert describe([shared, {'again': shared}]) == [[1, 2], {'again': [1, 2]}]   # twice, but not inside of itself


def test_a_description_is_the_same_in_every_process_and_needs_no_orbax():
  expression = ('describe([optax.adamw(1e-3), optax.cosine_decay_schedule(1., 5), jax.nn.gelu, object(), '
                'functools.partial(jax.jit), np.float32, np.ones(2), jax.sharding.PartitionSpec("x"), {1: (2,)}])')
  program = ('import sys; from lm.workdir import checkpoint; from lm.workdir.describe import describe; '
             'assert "orbax" not in sys.modules; '
             f'import functools, jax, json, optax, numpy as np; print(json.dumps({expression}))')
  process = subprocess.run([sys.executable, '-c', program], cwd=ROOT, capture_output=True, text=True, timeout=60)
  assert process.returncode == 0, process.stderr
  assert json.loads(process.stdout) == eval(expression)
  assert '0x' not in process.stdout
  assert 'cosine_decay_schedule.<locals>.schedule' in process.stdout
