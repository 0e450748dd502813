"""Without `jax.set_mesh`, as in a notebook, runs open, write and score on one device; training says what to call."""
import importlib
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from lm import evaluate, launch, sharding

SCRIPT = '''
from lm import optim
from lm.optim import schedules
from lm import train
from lm.data import dataset
from lm.data.text.source import Source
from lm.data.tokenizers.folder import Bytes
from lm.models import transformer
from lm.objectives.next_token import next_token

def experiment(*, steps: int = 2) -> train.Run:
  texts = [f'number {i} and number {2 * i}' for i in range(40)]
  data = dataset.Text(Source('numbers', {'train': texts, 'validation': texts[:9]}, 'a'), Bytes(), 16, ())
  model = transformer.llama(Bytes().vocab_size, 16, 1, 2, max_length=16)
  return train.Run(model, next_token(), data, optim.adam(schedules.warmup_constant(0.01, steps, 1)), steps, batch=8)
'''
NOTEBOOK = '''
import pathlib, sys
import jax
import numpy as np
from lm.train import validation
from lm import evaluate
from lm import generate
from lm.hf import pretrained
from lm.evaluate import rewards
from lm import scripts
from lm import train
from lm import load
from lm.models import reward

folder = pathlib.Path(sys.argv[1])
scripts.trust(folder / 'small_experiment.py')
run = load.open_trained(folder / 'run')
texts = [np.array(run.tokenizer.encode('number 7 and'))]
np.save(folder / 'scores.npy', evaluate.log_probabilities(run.model, run.params, texts)[0])
assert len(generate.tokens(run.model, run.params, run.tokenizer, texts, max_tokens=3)[0]) <= 3
step = validation.make_step(run.model.apply, run.run.objective, run.tokenizer)
batches = run.open_data().batches('validation', run.run.objective, 4, repeat=False)
assert validation.evaluate(step, run.params, batches, jax.sharding.get_mesh())['loss'] > 0
judge = reward.Reward(run.model)
assert np.isfinite(rewards.rewards(judge, judge.init(jax.random.key(0)), texts)).all()
pretrained.write(folder / 'hf', run.model, run.params, run.tokenizer)
pretrained.save(str(folder / 'hf'), folder / 'imported')
for name in ('hf', 'imported'):
  jax.tree.map(np.testing.assert_array_equal, pretrained.load(str(folder / name)).params, run.params)
base = load.open_base(str(folder / 'run'))
jax.tree.map(np.testing.assert_array_equal, base.start(base.model), run.params)
try:
  train.train(run.run, folder / 'other', jax.sharding.get_mesh())
except ValueError as error:
  print(error)
'''


@pytest.mark.slow
def test_a_run_is_opened_in_a_process_without_a_mesh(tmp_path, monkeypatch):
  (tmp_path / 'small_experiment.py').write_text(SCRIPT)
  (tmp_path / 'notebook.py').write_text(NOTEBOOK)
  monkeypatch.syspath_prepend(tmp_path)
  with jax.set_mesh(mesh := sharding.make_mesh('fsdp:2', jax.devices()[:2])):
    experiment = importlib.import_module('small_experiment').experiment
    run, result = launch.start(experiment, {'steps': 2}, tmp_path / 'run', mesh)
    texts = [np.array(result.data.tokenizer.encode('number 7 and'))]
    expected, = evaluate.log_probabilities(run.model, result.params, texts)
  environment = {**os.environ, 'PYTHONPATH': str(pathlib.Path(__file__).parents[2])}
  process = subprocess.run([sys.executable, tmp_path / 'notebook.py', tmp_path], env=environment, capture_output=True,
                           text=True, timeout=120)
  assert process.returncode == 0, process.stderr[-2000:]
  assert process.stdout == 'no mesh is set: call it in "with jax.set_mesh(sharding.make_mesh()) as mesh:"\n'
  np.testing.assert_allclose(np.load(tmp_path / 'scores.npy'), expected, atol=1e-5)
