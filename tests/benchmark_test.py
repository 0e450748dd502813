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


def test_each_objective_of_the_table_is_made_examples_of_and_traced():
  import benchmark_objectives as module
  import jax

  from lm import train
  shape = module.benchmark.SHAPES['tiny']
  for row in module.rows(shape).values():
    batch = module.batches_of(row, shape)(0)
    stored = {name: batch.tokens.reshape(*batch.tokens.shape, *[1] * len(more)).repeat(more[-1], -1).astype(dtype)
              for name, (dtype, more) in row.columns.items()}
    run = train.Run(row.model, row.objective, None, None, steps=1, batch=shape.batch, constants=row.constants)
    params = {**jax.eval_shape(row.model.init, jax.random.key(0)), **train.abstract_constants(run)}
    given = batch._replace(columns={**(batch.columns or {}), **stored} or None)
    loss, weight, sums = jax.eval_shape(lambda *args, row=row: row.objective.loss(row.model.apply, *args, None), params,
                                        given)
    assert loss.shape == weight.shape == () and {'nll', 'tokens', 'correct'} <= sums.keys()
    assert 0 < module.seen(batch) <= 2 * batch.tokens.size


def test_dialogues_and_pairs_are_packed_for_objectives_that_need_them():
  import benchmark_objectives as module
  import numpy as np

  from lm.data.batches import Dialogue, Form, Pair
  from lm.objectives.next_token import example
  from lm.objectives.objective import token_objective
  shape = module.benchmark.SHAPES['tiny']
  one = lambda dialogue, rng, special: example(dialogue.tokens, rng, special)
  both = lambda pair, rng, special: one(pair.chosen, rng, special)
  for kind, make in ((Dialogue, one), (Pair, both)):
    objective = token_objective(Form(make), needs=kind)
    assert module.seen(module.batches_of(module.Row(objective, None), shape)(0)) > np.prod(shape[-2:]) / 4
