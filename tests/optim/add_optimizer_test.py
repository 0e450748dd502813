"""The optimizer of docs/extend.md is one function, trained by the experiment there, with its flags."""
import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).parents[2]


@pytest.mark.slow
def test_an_optimizer_in_a_file_of_its_own_is_trained_by_flags(tmp_path):
  text, = re.findall(r'^```python\n(# sign.py.*?)^```', (ROOT / 'docs/extend.md').read_text(), re.DOTALL | re.MULTILINE)
  (tmp_path / 'sign.py').write_text(text)
  (tmp_path / 'books').mkdir()
  letters = ''.join(map(chr, np.random.default_rng(0).permutation(np.arange(48, 112))))   # a cycle of characters
  for i in range(40):
    (tmp_path / 'books' / f'{i}.txt').write_text(letters[i:] + letters * (5 + i))
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
  command = [sys.executable, 'sign.py', '--layers=1', '--width=64', '--steps=40', '--lr=1e-2', '--momentum=0.8',
             '--nodoctor']
  process = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
  assert process.returncode == 0, process.stderr
  rows = [json.loads(line) for line in (tmp_path / 'runs' / 'sign' / 'metrics.jsonl').read_text().splitlines()]
  losses = [row['loss'] for row in rows if 'loss' in row]
  assert len(losses) == 40 and losses[0] == pytest.approx(np.log(512), rel=0.15) and losses[-1] < 0.5 * losses[0]
  assert rows[1]['learning_rate'] == pytest.approx(1e-2 * 2 / 3)   # the second of two steps of warm-up
