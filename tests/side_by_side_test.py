"""Seeds in one program give what each gives by itself."""
import dataclasses
import types

import jax
import numpy as np
import pytest
from arms_test import compared
from train_test import RUN, go, logged, on, saved

from lm import comparison, optim, schedules, side_by_side, train
from lm.models import transformer

pytestmark = pytest.mark.usefixtures('compiled_once')

SEEDS = (0, 7)


@pytest.mark.parametrize('mesh', ['1x1', pytest.param('2x1', marks=pytest.mark.slow)])
def test_seeds_side_by_side_are_the_runs_in_turn(tmp_path, mesh):
  together = [tmp_path / f'together-{seed}' for seed in SEEDS]
  with jax.set_mesh(on(mesh)):
    results = side_by_side.go(RUN, SEEDS, together, on(mesh))
  for seed, workdir, result in zip(SEEDS, together, results):
    alone = go(tmp_path / f'alone-{seed}', mesh=mesh, seed=seed)
    assert result.metrics == pytest.approx(alone.metrics, rel=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), result.params, alone.params)
    for name in ('loss', 'grad_norm', 'validation/loss'):
      assert logged(workdir, name) == pytest.approx(logged(tmp_path / f'alone-{seed}', name), rel=1e-4)
    # Its checkpoint is of an ordinary run, which goes on, or is finished.
    assert saved(workdir, mesh=mesh, seed=seed)[0] == 6 and go(workdir, mesh=mesh, seed=seed).finished
    assert go(workdir, mesh=mesh, seed=seed, steps=8).start == 6
  assert logged(together[0]) != logged(together[1])


@dataclasses.dataclass(frozen=True)
class Data:
  length: int = 12
  source_length, kind, columns = None, np.ndarray, types.MappingProxyType({})


@pytest.mark.slow
def test_a_transformer_and_muon_under_vmap_take_the_steps_of_each_seed():
  """Its own derivative rules (products, attention, the loss) and layouts, batched over seeds."""
  model = transformer.llama(300, 16, 2, heads=2, max_length=12, dropout=0.1)
  run = dataclasses.replace(RUN, model=model, data=Data(), batch=4,
                            optimizer=optim.muon(schedules.warmup_constant(0.02, 10, 1)))
  with jax.set_mesh(on('1x1')):
    assert side_by_side.faster(run, SEEDS) > 0
    keys = side_by_side.keys_of(SEEDS)
    batch, places = side_by_side.budget.empty_batch(run), np.arange(12, dtype=np.int32)[None]
    batches = [batch._replace(tokens=batch.tokens + places + 3 * i) for i in range(2)]
    stacked = jax.tree.map(lambda *x: np.stack(x), *batches)
    together, step = side_by_side.make_step(run), train.make_step(run)
    states = side_by_side.init(run, keys)
    singles = [jax.jit(lambda key: train.init(run, key))(key) for key in keys]
    for _ in range(2):
      states, metrics = together(states, stacked, keys)
      found = [step(state, batch, {}, key) for state, batch, key in zip(singles, batches, keys)]
      singles = [state for state, _ in found]
      np.testing.assert_allclose(metrics['loss'], [one['loss'] for _, one in found], rtol=1e-5)
    for i, state in enumerate(singles):
      own = jax.tree.map(lambda x, i=i: x[i], states.params)
      jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), own, state.params)


@pytest.mark.slow
def test_a_comparison_of_seeds_in_one_program_says_so_and_finds_the_same(script, tmp_path, capsys):
  text = 'slow: lr=1e-3; fast: lr=0.1'
  alone = compared(script, tmp_path / 'alone', text, seeds_together='never')
  assert 'side by side' not in capsys.readouterr().out
  together = compared(script, tmp_path / 'together', text, seeds_together='always')
  out = capsys.readouterr().out
  assert out.count('they are trained side by side') == 2 and '--- slow, seeds 0, 1, 2 side by side' in out
  for name in alone:
    values = [[r['values']['bits/byte'] for r in results[name]] for results in (alone, together)]
    np.testing.assert_allclose(*values, rtol=1e-4)
    assert [r['curve'][-1][0] for r in together[name]] == [1.0] * 3
  assert comparison.judge(*([r['values']['bits/byte'] for r in together[n]] for n in ('fast', 'slow'))).word == 'better'


def test_what_cannot_be_trained_so_is_not():
  assert side_by_side.fits(RUN)
  assert not side_by_side.fits(dataclasses.replace(RUN, patience=1))
  assert not side_by_side.fits(dataclasses.replace(RUN, start=lambda model: None))


def test_a_loss_that_is_not_finite_is_told(tmp_path):
  run = dataclasses.replace(RUN, optimizer=optim.sgd(schedules.warmup_constant(1e38, 10, 1)))
  with pytest.raises(train.NotFinite, match='the loss of run 1 is'), jax.set_mesh(on('1x1')):
    side_by_side.go(run, SEEDS, [tmp_path / 'a', tmp_path / 'b'], on('1x1'))
