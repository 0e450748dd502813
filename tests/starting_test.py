"""A run starts from the result of another one, and adapters belong to the parameters below them."""
import pathlib
import shutil

import jax
import numpy as np
import pytest
from helpers.script_runs import loss_of, same
from helpers.slow import slow

from lm import load, train
from lm.workdir import checkpoint

pytestmark = pytest.mark.usefixtures('compiled_once')


@pytest.mark.slow
def test_init_refuses_another_tokenizer_before_anything_is_written_unless_a_flag_allows_it(program, tmp_path):
  expected = program('run').params
  with pytest.raises(ValueError, match='for another tokenizer .*--init_ignore_tokenizer'):
    program('other', tmp_path / 'run', names=3)
  assert not (tmp_path / 'other' / 'data').exists()
  result = program('meant', tmp_path / 'run', ignore=True, names=3, lr=1e-30)
  assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-20), expected, result.params))
  program('same', tmp_path / 'run')
  with pytest.raises(ValueError, match=r'run does not fit the model of this run:\n.*8.* there, .*32.* in this run'):
    program('wider', tmp_path / 'run', width=32)


@pytest.mark.parametrize('knobs', [{'average': 0.9}, *slow({'free': 'true'}, {'patience': 1, 'lr': 0.5, 'steps': 6})],
                         ids=['average', 'schedule_free', 'patience'])
def test_init_and_every_reader_give_the_result_of_a_run(program, tmp_path, knobs):
  result = program('run', **knobs)
  with checkpoint.Checkpoints(tmp_path / 'run' / 'checkpoints', create=False) as checkpoints:
    model = load.open_run(tmp_path / 'run').model
    abstract = jax.eval_shape(model.init, jax.random.key(0))
    newest = checkpoints.restore_params(train.with_shardings(abstract, program.mesh))
    assert checkpoints.best_step() != max(checkpoints.steps()) or 'patience' not in knobs
  assert not same(newest.state, result.params)
  opened, base = load.open_trained(tmp_path / 'run'), load.open_base(str(tmp_path / 'run'))
  assert same(opened.params, result.params) and same(base.start(base.model), result.params)
  started = program('next', tmp_path / 'run', lr=1e-30, steps=2)   # the rate is so small that the parameters stay
  assert jax.tree.all(jax.tree.map(lambda a, b: np.allclose(a, b, atol=1e-20), started.params, result.params))


@pytest.mark.slow
def test_adapters_are_refused_on_a_base_that_trained_on(program, tmp_path, monkeypatch):
  program('base')
  monkeypatch.chdir(tmp_path)
  result = program('adapters', pathlib.Path('base'), lora_rank=2)
  (tmp_path / 'elsewhere').mkdir()
  monkeypatch.chdir(tmp_path / 'elsewhere')
  opened = load.open_trained(tmp_path / 'adapters')   # a relative --init opens from anywhere
  assert loss_of(program, opened) == pytest.approx(result.metrics['validation/loss'], rel=1e-5)
  assert same(load.open_base(str(tmp_path / 'adapters')).start(opened.model), opened.params)
  program('base', steps=5)
  for again in (lambda: load.open_trained(tmp_path / 'adapters'),
                lambda: program('adapters', tmp_path / 'base', lora_rank=2, steps=6)):
    with pytest.raises(ValueError, match='base.load.step: 4 before, 5 now'):
      again()


@pytest.mark.slow
def test_adapters_are_refused_on_a_base_that_was_trained_anew(program, tmp_path):
  program('base')
  program('adapters', tmp_path / 'base', lora_rank=2)
  shutil.rmtree(tmp_path / 'base')
  program('base', lr=0.02)
  with pytest.raises(ValueError, match='base.load.parameters: .* before, .* now'):
    load.open_trained(tmp_path / 'adapters')
