"""The benchmarks measure our code, also where PyTorch is not installed."""
import os
import pathlib
import re
import subprocess
import sys

import interleaved
import jax
import numpy as np
import pytest
from absl import flags

from lm import launch, sharding

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / 'experiments' / 'benchmarks' / 'training.py'


@pytest.fixture(scope='module')
def benchmark():
  import training as module
  return module


def test_bad_flags_are_refused(benchmark):
  (values,), _ = launch.parse([benchmark.benchmark], ['training.py', '--what=training,pipeline', '--shape=large'])
  assert values['what'] == ['training', 'pipeline'] and values['shape'] == 'large'
  with pytest.raises(flags.Error, match=re.escape('training | startup')):
    launch.parse([benchmark.benchmark], ['training.py', '--what=flying'])
  with pytest.raises(ValueError, match='--rounds=0'):
    benchmark.benchmark(rounds=0)


def test_both_arms_of_decoding_write_the_same_text(tmp_path):
  torch = pytest.importorskip('torch')
  torch.manual_seed(0)
  transformers = pytest.importorskip('transformers')
  import decoding
  config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, initializer_range=0.5, bos_token_id=None,
                                   eos_token_id=None, pad_token_id=0)
  transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
  with jax.set_mesh(sharding.make_mesh()):   # each arm sets this mesh in its own process
    (ours, _), (theirs, _) = (arm(tmp_path, 3, 7) for arm in (decoding.ours, decoding.theirs))
    assert ours() == theirs() > 0


def test_both_arms_of_bleurt_give_the_same_scores(tmp_path, monkeypatch):
  torch = pytest.importorskip('torch')
  torch.manual_seed(0)
  pytest.importorskip('transformers')
  import bleurt_scores
  monkeypatch.setattr(bleurt_scores, 'CONFIG', {**bleurt_scores.CONFIG, 'hidden_size': 16, 'num_hidden_layers': 2,
                                                'num_attention_heads': 2, 'intermediate_size': 32})
  bleurt_scores.write_model(tmp_path)
  with jax.set_mesh(sharding.make_mesh()):
    (ours, _), (theirs, _) = bleurt_scores.ours(tmp_path, 7), bleurt_scores.theirs(tmp_path, 7, 3)
    assert ours() == pytest.approx(theirs(), abs=1e-6) != 0


def test_missing_packages_are_listed(capsys):
  assert interleaved.machine('jax', 'no-such-package') == {'no-such-package'}
  assert f'jax {jax.__version__}' in capsys.readouterr().out


@pytest.mark.long
@pytest.mark.slow
def test_ours_is_measured():
  flags = '--what=training,pipeline --arms=ours --shape=tiny --rounds=2 --steps=2'
  environment = {**os.environ, 'PYTHONPATH': str(ROOT), 'XLA_FLAGS': '', 'JAX_DISABLE_MOST_OPTIMIZATIONS': '0'}
  process = subprocess.run([sys.executable, SCRIPT, *flags.split()], env=environment, capture_output=True, text=True)
  assert process.returncode == 0, process.stderr
  rows = re.findall(r'^  ours +([\d,]+) +1.00 .* ([\d,]+)$', process.stdout, re.MULTILINE)
  # Weights by hand: 512 tokens and 32 positions of width 64, 2 layers, the last norm. The pipeline has none.
  weights = (512 + 32) * 64 + 2 * (12 * 64 * 64 + 13 * 64) + 2 * 64
  assert [int(number.replace(',', '')) for _, number in rows] == [weights, 0]
  assert all(int(rate.replace(',', '')) > 0 for rate, _ in rows)


@pytest.mark.slow
def test_each_objective_of_the_table_gives_examples_and_is_traced():
  import jax
  import objective_costs as module

  from lm import train
  shape = interleaved.SHAPES['tiny']
  for row in module.rows(shape).values():
    batch = module.batches_of(row, shape)(0)
    stored = {name: np.zeros((*batch.tokens.shape, *suffix), dtype) for name, (dtype, suffix) in row.columns.items()}
    run = train.Run(row.model, row.objective, None, None, steps=1, batch=shape.batch, constants=row.constants)
    params = {**jax.eval_shape(row.model.init, jax.random.key(0)), **train.abstract_constants(run)}
    annotated = batch._replace(columns={**(batch.columns or {}), **stored} or None)
    loss, weight, sums = jax.eval_shape(lambda *args, row=row: row.objective.loss(row.model.apply, *args, None), params,
                                        annotated)
    assert loss.shape == weight.shape == () and {'nll', 'tokens', 'correct'} <= sums.keys()
    assert 0 < module.count_tokens(batch) <= 2 * batch.tokens.size


@pytest.mark.long
@pytest.mark.slow
def test_a_checkout_writes_what_it_writes_itself(monkeypatch, capsys):
  import checkouts
  monkeypatch.setattr(checkouts, 'CASES', {'batch 2, top-k 3': (2, 3, 1.)})
  checkouts.main(other=ROOT, rounds=2)
  assert re.fullmatch(r'batch 2, top-k 3 +\d+ tokens/s there, +\d+ here: \S+x \(\S+-\S+\)\n', capsys.readouterr().out)


def test_a_folder_that_is_no_checkout_is_refused(tmp_path):
  import checkouts
  with pytest.raises(FileNotFoundError, match=f'--other={tmp_path} is no checkout; "git worktree add'):
    checkouts.main(other=tmp_path)
  with pytest.raises(ValueError, match='--rounds=0 measures nothing'):
    checkouts.main(other=ROOT, rounds=0)
