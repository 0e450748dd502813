"""The benchmark measures ours, where there is no PyTorch too."""
import os
import pathlib
import re
import subprocess
import sys

import pytest
from absl import flags

from lm import launch

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / 'experiments' / 'benchmark.py'


@pytest.fixture(scope='module')
def benchmark():
  import benchmark as module
  return module


def test_flags(benchmark):
  (values,), _ = launch.parse([benchmark.benchmark], ['benchmark.py', '--what=training,pipeline', '--shape=large'])
  assert values['what'] == ['training', 'pipeline'] and values['shape'] == 'large'
  with pytest.raises(flags.Error, match=re.escape('training | decoding')):
    launch.parse([benchmark.benchmark], ['benchmark.py', '--what=flying'])
  with pytest.raises(ValueError, match='--rounds=0'):
    benchmark.benchmark(rounds=0)


@pytest.mark.slow
def test_ours_is_measured():
  flags = '--what=training,pipeline --arms=ours --shape=tiny --rounds=2 --steps=2'
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': ''}
  done = subprocess.run([sys.executable, SCRIPT, *flags.split()], env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  rows = re.findall(r'^  ours +([\d,]+) +1.00 .* ([\d,]+)$', done.stdout, re.MULTILINE)
  # Weights by hand: 512 tokens and 32 positions of width 64, 2 layers, the last norm. The pipeline has none.
  weights = (512 + 32) * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64
  assert [int(number.replace(',', '')) for _, number in rows] == [weights, 0]
  assert all(int(rate.replace(',', '')) > 0 for rate, _ in rows)
