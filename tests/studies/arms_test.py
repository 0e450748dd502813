"""Comparisons and ladders of a small experiment: their results, how they resume, and what they refuse."""
import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import scaling
from helpers.figures import points, saved_figures
from helpers.slow import slow

from lm import sharding
from lm.data.rows import stages
from lm.studies import comparison, costs, runs, sweep, variants

pytestmark = pytest.mark.usefixtures('compiled_once')


def compared(script, study, text, **options):
  settings = {'seeds': 3, **options}
  return comparison.compare(arms_text=text, workdir=study, experiment=script, mesh='fsdp:8', **settings)


def test_a_comparison_finds_the_better_arm_and_resumes(script, tmp_path, capsys, monkeypatch):
  text, study, trained, went = 'slow: lr=1e-3; fast: lr=0.1', tmp_path / 'study', [], runs.go

  def go(study, arm, seed, mesh):
    trained.append((arm.name, seed))
    if len(trained) == 4:
      raise KeyboardInterrupt
    return went(study, arm, seed, mesh)

  monkeypatch.setattr(runs, 'go', go)
  with pytest.raises(KeyboardInterrupt):
    compared(script, study, text)
  first, figures = capsys.readouterr().out, saved_figures(monkeypatch)
  results = compared(script, study, text)
  out = capsys.readouterr().out
  assert trained == [('slow', 0), ('fast', 0), ('slow', 1), ('fast', 1), ('fast', 1), ('slow', 2), ('fast', 2)]
  assert 'equal steps: 6 each; slow 6 steps, fast 6 steps' in first
  assert re.search(r'\| fast \|.*\dx \[.*\| better \|', out) and 'read with half a row before it' in out
  slow, fast = ([result['values']['bits/byte'] for result in results[name]] for name in ('slow', 'fast'))
  assert max(fast) < min(slow) and len(set(slow)) == 3   # seeds differ
  assert compared(script, study, text) == results and len(trained) == 7
  assert len(list(study.glob('data-*'))) == 1
  curves = figures[0].axes[0]
  assert [text.get_text() for text in curves.get_legend().get_texts()] == ['slow', 'fast']
  assert [line[-1][1] for line in points(curves)] == pytest.approx([np.mean(slow), np.mean(fast)])
  assert (study / 'compare.md').read_text().strip() in out
  with pytest.raises(ValueError, match=r"started with other settings.*\n +arms.fast.lr: 0.1 before, 0.2 now"):
    compared(script, study, 'slow: lr=1e-3; fast: lr=0.2')


@pytest.mark.slow
def test_the_same_arm_twice_is_the_same(script, tmp_path, capsys):
  results = compared(script, tmp_path / 'study', 'one: ; two: ', seeds=2)
  assert results['one'] == results['two']
  assert '0.0000 [0.0000, 0.0000] | 1.00x [1.00, 1.00] | not distinguishable |' in capsys.readouterr().out


@pytest.mark.parametrize('equal,budget,steps', [
    ('steps', 4, (4, 4)), ('tokens', None, (6, 3)), *slow(('flops', 16, (16, 2)))])
def test_arms_get_equal_compute(script, tmp_path, equal, budget, steps):
  function = variants.experiment(script)
  arms = variants.arms(function, 'small: ; large: batch=16' + ' width=32' * (equal == 'flops'))
  mesh = sharding.make_mesh('fsdp:8')
  with jax.set_mesh(mesh):   # 6 FLOPs for each weight of the head and each token; 4 x as wide, twice the batch
    a_step = 6 * 8 * arms[0].make().model.vocab * 8 * 16
    equalised, _ = costs.equal(arms, equal, a_step * budget if equal == 'flops' else budget, mesh)
  assert tuple(arm.knobs['steps'] for arm in equalised) == steps


@pytest.mark.slow
def test_an_adaptation_that_diverges_is_left_out(script, tmp_path, capsys):
  results = compared(script, tmp_path / 'study', 'a: ; b: lr=0.1', seeds=2, adapt=3, adapt_lr=1e38)
  assert all(set(result['values']) == {'bits/byte'} for arm_results in results.values() for result in arm_results)
  out = capsys.readouterr().out
  assert '| b | ' in out and 'b has no infilling accuracy, for 2 of its seeds; seed 0: adapted from --adapt_lr' in out


@pytest.mark.slow
def test_arms_of_other_objectives_are_adapted_before_they_are_scored(script, tmp_path, capsys):
  results = compared(script, tmp_path / 'study', 'next: ; prefix: objective=prefix', seeds=2, adapt=3)
  assert set(results['next'][0]['values']) == {'bits/byte', 'adapted bits/byte', 'infilling accuracy'}
  assert set(results['prefix'][0]['values']) == {'adapted bits/byte', 'infilling accuracy'}
  out = capsys.readouterr().out
  assert '| prefix | ' in out and 'adapted bits/byte' in out and 'infilling accuracy' in out


@pytest.mark.parametrize('text,message', [
    ('a: ; b: lrr=1', r'unknown flag --lrr; the nearest is --lr'),
    ('a: ; b: lr=fast', r'expected number'),
    ('a: ; a: lr=1', "arm 'a: lr=1': write 'name: knob=value"), ('a: ; lr=1', "arm 'lr=1'"),
    (' ; ', 'there are no arms'), ('a: ', '--arms names a alone'),
    ('a: ; b: corpus=b', 'b and a cannot be compared: they are validated on different text'),
    ('a: ; b: encoder=true', 'b has no common yardstick'),
    ('a: ; b: objective=prefix', 'adapted to it for some steps')])
def test_arms_that_cannot_be_compared_are_refused_before_anything_runs(script, tmp_path, text, message):
  with pytest.raises(ValueError, match=message):
    compared(script, tmp_path / 'study', text)
  assert not (tmp_path / 'study').exists()


def swept(script, study, **options):
  return sweep.sweep(experiment=script, workdir=study, mesh='fsdp:8', **options)


@pytest.mark.slow
@pytest.mark.long
def test_a_ladder_predicts_its_next_rung(script, tmp_path, capsys):
  scaling.ladder(sizes='width=8; width=16; width=24', budgets=(4, 16), next_size='width=32', next_budget=16,
                 common='lr=0.03', experiment=script, workdir=tmp_path / 'study', mesh='fsdp:8')
  out = capsys.readouterr().out
  predicted, outcome = out.index('predicted for width=32-16'), out.index('--- run 7 of 7')
  assert predicted < outcome < out.index('outcome: ')
  report = (tmp_path / 'study' / 'scaling.md').read_text()
  losses = [json.loads(p.read_text())['nll'] for p in (tmp_path / 'study').glob('*/seed-0/final.json')]
  assert len(losses) == 7 and all(f'{loss:.4f}' in report for loss in losses) and 'L = ' in report
  with pytest.raises(ValueError, match='2 sizes at 1 budgets do not determine a law'):
    scaling.ladder(sizes='width=4; width=8', budgets=(4,), experiment=script, workdir=tmp_path / 'other')


def test_arms_are_runs_of_their_own(script, tmp_path):
  arm = variants.arms(variants.experiment(script), "one: tags='a b',c", 'lr=0.5')[0]
  assert arm.knobs['tags'] == ('a b', 'c') and arm.knobs['lr'] == 0.5
  assert (arm.make(3, steps=4).seed, arm.make(3, steps=4).steps, arm.make().seed, arm.make().steps) == (3, 4, 0, 6)
  with pytest.raises(FileNotFoundError, match='there is no script'):
    variants.experiment(tmp_path / 'none.py')
  (tmp_path / 'empty.py').write_text('')
  with pytest.raises(ValueError, match="defines no function 'experiment'"):
    variants.experiment(tmp_path / 'empty.py')


@pytest.mark.slow
def test_a_refused_study_leaves_no_settings_behind(script, tmp_path):
  study, text = tmp_path / 'study', 'a: ; b: lr=0.1'
  with pytest.raises(ValueError, match='--equal=seconds needs a --budget above 0'):
    compared(script, study, text, equal='seconds')
  with pytest.raises(ValueError, match='b gets 1 steps, and a warm-up of 1 steps does not fit'):
    compared(script, study, 'a: ; b: batch=48', equal='tokens')
  assert set(compared(script, study, text, seeds=2)) == {'a', 'b'}   # other settings than the refused ones
  with pytest.raises(ValueError, match='a grid needs the values of lr'):
    swept(script, tmp_path / 'sweep', knobs='lr=0.01:0.1')
  assert len(swept(script, tmp_path / 'sweep', knobs='lr=0.01:0.1', method='random', trials=1)) == 1


@pytest.mark.slow
def test_unusable_data_is_refused_before_settings_are_stored(script, tmp_path):
  studies = {'compare.json': lambda common: compared(script, tmp_path, 'a: ; b: ', common=common),
             'sweep.json': lambda common: swept(script, tmp_path, knobs='lr=0.1,0.2', common=common),
             'scaling.json': lambda common: scaling.ladder(
                 sizes='width=8; width=16; width=24', budgets=(4, 16), next_size='width=32', next_budget=16,
                 common=common, experiment=script, workdir=tmp_path, mesh='fsdp:8')}
  for settings, study in studies.items():
    with pytest.raises(ValueError, match='the model only 3'):
      study('vocab=3')
    assert not list(tmp_path.glob('*/seed-*')) and not (tmp_path / settings).exists()


@pytest.mark.slow
def test_an_arm_that_diverges_has_no_result_and_the_others_do(script, tmp_path, capsys, monkeypatch):
  text, options = 'wild: lr=1e38 optimizer=sgd; good: ; better: lr=0.1', {'seeds': 2}
  results = compared(script, tmp_path, text, **options)
  out = capsys.readouterr().out
  assert all(result['values'] == {} and 'result' in result['left_out'] for result in results['wild'])
  assert 'wild has no result, for 2 of its seeds; seed 0: step ' in (tmp_path / 'compare.md').read_text()
  assert '| arm | bits/byte | difference to good |' in out and '| wild |' not in out
  assert (tmp_path / 'compare.png').exists()
  monkeypatch.setattr(runs, 'go', None)   # nothing is trained again
  assert compared(script, tmp_path, text, **options) == results


@pytest.mark.parametrize('unit', ['tokens', pytest.param('flops', marks=[pytest.mark.slow, pytest.mark.long])])
def test_stages_cost_what_they_read(script, unit):
  class Staged(variants.Arm):
    def make(self, seed=0, **knobs):
      run = super().make(seed, **knobs)
      return dataclasses.replace(run, stages=stages.stages([(4, 8)], [], run.batch, run.data.length))
  plain, late = variants.arms(variants.experiment(script), 'plain: ; late: batch=16 steps=8')
  late = Staged(late.name, late.function, late.knobs)
  mesh = sharding.make_mesh('fsdp:8')
  with jax.set_mesh(mesh):
    spent = costs.spending(late.make(), unit, mesh)
    assert spent(6) == 2 * spent(4) == 4 * spent(2) == 8 * spent(1)
    equalised, amount = costs.equal([plain.with_steps(12), late], unit, None, mesh)
    assert [arm.knobs['steps'] for arm in equalised] == [12, 8] and amount == spent(8)
    with pytest.raises(ValueError, match='late begins with smaller ones'):
      costs.equal([plain, late], 'seconds', 1., mesh)


@pytest.mark.slow
def test_a_score_of_nan_is_no_result(script, tmp_path, monkeypatch):
  score = runs.score
  monkeypatch.setattr(runs, 'score', lambda run, *arguments: {
      **score(run, *arguments), **({'bits_per_byte': float('nan')} if run.seed else {})})
  results = compared(script, tmp_path, 'a: ; b: lr=0.1', seeds=2)
  for arm_results in results.values():
    assert 'bits/byte' in arm_results[0]['values'] and arm_results[1]['left_out'] == {
        'result': 'its bits/byte is nan; lower the learning rate'}


def test_a_table_shows_a_speed_up_only_if_there_is_one():
  def lines(curve):
    results = {name: [{'values': {'bits/byte': value + seed}, 'curve': curve, 'left_out': {}} for seed in range(2)]
               for name, value in (('a', 3.), ('b', 2.5))}
    return comparison.table(['a', 'b'], results, 'bits/byte')
  once, twice = lines([(1., 3.)]), lines([(0.5, 4.), (1., 3.)])
  assert 'speed-up' not in once[0] and '|  |' not in once[-1] and once[-1].count('|') == once[0].count('|') == 5
  assert 'speed-up' in twice[0] and '1.00x' in twice[-1] and twice[-1].count('|') == twice[0].count('|') == 6
