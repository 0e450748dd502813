"""A sweep searches knobs on a grid, at random or by halving, resumes, and refuses what cannot be searched."""
import signal

import pytest

from lm import launch
from lm.studies import runs, search, sweep, variants

pytestmark = pytest.mark.usefixtures('compiled_once')


def swept(script, study, **options):
  return sweep.sweep(experiment=script, workdir=study, mesh='fsdp:8', **options)


@pytest.mark.slow
def test_a_grid_is_searched_once_and_the_best_comes_first(script, tmp_path, capsys):
  settings = {'knobs': 'lr=1e-3,0.1; batch=8,16', 'common': 'steps=4'}
  trials = swept(script, tmp_path / 'study', **settings)
  assert len(trials) == 4 and [t.value for t in trials] == sorted(t.value for t in trials)
  assert trials[0].knobs['lr'] == '0.1'
  assert {(t.knobs['lr'], t.knobs['batch']) for t in trials} == {(a, b) for a in ('1e-3', '0.1') for b in ('8', '16')}
  assert 'the best: --lr=0.1' in capsys.readouterr().out and (tmp_path / 'study' / 'sweep.png').exists()
  assert swept(script, tmp_path / 'study', **settings) == trials and '--- trial' not in capsys.readouterr().out
  with pytest.raises(ValueError, match='started with other settings'):
    swept(script, tmp_path / 'study', knobs='lr=1e-3,0.2; batch=8,16', common='steps=4')


@pytest.mark.slow
def test_halving_stops_worse_trials_early_and_a_stopped_sweep_resumes(script, tmp_path, monkeypatch):
  settings = {'knobs': 'lr=1e-4:0.3:log; optimizer=adam,sgd', 'method': 'halving', 'trials': 7, 'common': 'steps=8'}
  went, started = runs.go, []

  def go(study, arm, seed, mesh, watch):
    started.append(arm)
    if len(started) == 3:
      raise KeyboardInterrupt
    return went(study, arm, seed, mesh, watch)

  monkeypatch.setattr(runs, 'go', go)
  with pytest.raises(KeyboardInterrupt):
    swept(script, tmp_path / 'study', **settings)
  trials = swept(script, tmp_path / 'study', **settings)
  assert (started[2].name, started[2].knobs) == (started[3].name, started[3].knobs)
  assert len(trials) == 7 == len(started) - 1
  assert len({arm.knobs['lr'] for arm in started}) == 7   # trials of before the stop are not drawn again
  pruned = [t.pruned for t in trials]
  assert any(pruned) and not all(pruned) and pruned == sorted(pruned)
  assert len(list((tmp_path / 'study').glob('trial-*'))) == 7


@pytest.mark.slow
def test_trials_that_diverge_or_are_refused_have_no_result(script, tmp_path, capsys):
  trials = swept(script, tmp_path / 'study', knobs='lr=0.1,1e38; batch=8', common='steps=4 optimizer=sgd')
  assert trials[1].value == float('inf') and '| 1e38 | 8 | inf | no result |' in capsys.readouterr().out
  trials = swept(script, tmp_path / 'other', knobs='vocab=400,3; lr=0.1,-1')
  assert [trial.value == float('inf') for trial in trials] == [False, True, True, True]
  out = capsys.readouterr().out
  assert 'learning rate -1.0 is not positive' in out and 'the model only 3' in out


@pytest.mark.parametrize('knobs,message', [
    ('lrr=1,2', 'unknown flag --lrr; the nearest is --lr'), ('lr', "knob 'lr': write"), ('', 'no knobs to search'),
    ('lr=1;lr=2', 'each once'), ('lr=1:2:exp', 'write'), ('lr=2:1', 'a range goes up'),
    ('lr=0:1:log', 'begins above 0'), ('optimizer=adam:sgd', 'optimizer is no number'),
    ('batch=8,x', 'expected whole number'),
    ('lr=1e-3:1e-1', 'a grid needs the values of lr')])
def test_knobs_that_cannot_be_searched_are_refused(script, tmp_path, knobs, message):
  with pytest.raises(ValueError, match=message):
    swept(script, tmp_path / 'study', knobs=knobs)
  assert not list((tmp_path / 'study').glob('trial-*'))


def test_whole_ranges_give_whole_numbers():
  space = search.space('width=2:9; lr=1e-3:1:log', lambda name, value: int(value) if name == 'width' else float(value))
  assert space == {'width': search.Range(2, 9), 'lr': search.Range(1e-3, 1., True)}
  assert type(space['width'].low) is int


def test_a_trial_that_ends_in_nan_has_no_result(script, tmp_path, monkeypatch):
  metrics = {'validation/bits_per_byte': float('nan')}
  monkeypatch.setattr(runs.launch, 'start', lambda function, knobs, *_, **options: (
      function(**knobs), runs.train.Result(8, 0, None, None, None, metrics, True, None)))
  assert [t.value for t in swept(script, tmp_path / 'study', knobs='lr=0.1', common='steps=8')] == [float('inf')]


def test_a_sweep_over_texts_that_are_held_out_is_refused_as_a_comparison_is(script, tmp_path):
  for knobs in ('corpus=a,b', 'lr=0.1,0.2; corpus=a,b'):
    with pytest.raises(ValueError, match='--corpus=b and --corpus=a cannot be compared: they are validated on differ'):
      swept(script, tmp_path / 'study', knobs=knobs)
  assert not (tmp_path / 'study').exists()


def test_a_sweep_that_is_stopped_at_an_evaluation_is_not_a_trial_left_early(script, tmp_path, monkeypatch):
  monkeypatch.setattr(runs.train, 'train', lambda *_: runs.train.Result(
      2, 0, None, None, None, {'validation/bits_per_byte': 1.}, False, None, signal.SIGTERM))
  with pytest.raises(KeyboardInterrupt):
    swept(script, tmp_path / 'study', knobs='lr=0.1', common='steps=8')


def test_knobs_mean_what_they_mean_as_flags(tmp_path):
  """Backslashes too: text was once cut at every 'nn'."""
  def experiment(*, separator: str = '', pattern: str = ''):
    del separator, pattern
  for written in (r'\n\n', r'\t', 'a\\\\b', r'C:\new', '#', "it's"):
    (flags,), _ = launch.parse([experiment], ['x', f'--separator={written}'])
    quoted = f'"{written}"' if "'" in written else f"'{written}'"
    for text in (f'separator={quoted}', *([f'separator={written}'] if "'" not in written else [])):
      assert variants.knobs(experiment, text) == flags, written
    assert variants.knobs(experiment, sweep.written({'separator': written})) == flags, written
  (one,) = variants.arms(experiment, r'cut: separator=\n\n pattern="a b"')
  assert one.knobs == {'separator': r'\n\n', 'pattern': 'a b'}
  with pytest.raises(ValueError, match='quotation'):
    variants.knobs(experiment, 'separator="a')
