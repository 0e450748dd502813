"""Evaluators of the run and several validation sets are measured between steps, and any metric can be the best."""
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import TEXTS, TOKENIZER, go, logged, same, saved, steps_kept

from lm import optim
from lm.data import dataset
from lm.data.text.mixture import mixture
from lm.data.text.source import Source
from lm.evaluate import suites
from lm.models import transformer
from lm.train.interrupt import Interrupt
from lm.workdir import checkpoint
from lm.workdir.judge import Judge

pytestmark = pytest.mark.usefixtures('compiled_once')


def norms(run, data, mesh):
  """An evaluator that gives the norm of the embedding, and facts of the run, data and mesh it was opened with."""
  norm = jax.jit(lambda params: jnp.sqrt(jnp.sum(jnp.square(params['embedding']))))
  return lambda params, step: {'embedding': norm(params), 'step': step, 'rows': run.batch, 'devices': mesh.size,
                               'vocabulary': data.tokenizer.vocab_size}


def scripted(values):
  """Returns an evaluator that gives a fixed value for each step."""
  return lambda run, data, mesh: lambda params, step: {'value': values[step]}


@pytest.fixture(scope='module')
def plain(tmp_path_factory):
  """Returns the workdir of a run without an evaluator."""
  workdir = tmp_path_factory.mktemp('plain')
  go(workdir)
  return workdir


def test_an_evaluator_measures_at_each_evaluation_and_changes_nothing(tmp_path, plain):
  result = go(tmp_path, evaluators={'norms': norms})
  assert logged(tmp_path, 'norms/step') == {3: 3, 6: 6}
  assert [result.metrics[f'norms/{name}'] for name in ('rows', 'devices', 'vocabulary')] == [8, 2, TOKENIZER.vocab_size]
  step, state = saved(tmp_path)
  assert step == 6 and logged(tmp_path, 'norms/embedding')[6] == pytest.approx(
      np.sqrt(np.square(state.params['embedding']).sum()), rel=1e-5)
  assert same(state, saved(plain)[1]) and logged(tmp_path) == logged(plain)
  assert logged(tmp_path, 'validation/loss') == logged(plain, 'validation/loss')


VALUES = {1: 4., 2: 1., 3: 2., 4: 6., 5: 5., 6: 3.}


@pytest.mark.parametrize('better, best', [('lower', 2), ('higher', 4)])
def test_the_best_checkpoint_is_the_best_by_the_metric_that_the_run_names(tmp_path, better, best):
  changes = {'evaluators': {'probe': scripted(VALUES)}, 'best': 'probe/value', 'better': better}
  go(tmp_path, evaluate_every=1, save_every=1, keep=1, **changes)
  assert steps_kept(tmp_path) == [best, 6]
  with checkpoint.Checkpoints(tmp_path / 'checkpoints', create=False) as checkpoints:   # a reading instance
    assert checkpoints.best_step() == best and checkpoints.best_metric() == VALUES[best]


@pytest.mark.parametrize('better, values', [('lower', (4., 1., 2., 3.)), ('higher', (1., 4., 3., 2.))])
def test_patience_is_by_that_metric(tmp_path, better, values):
  evaluators = {'probe': scripted(dict(enumerate(values, 1)))}
  result = go(tmp_path, evaluators=evaluators, best='probe/value', better=better, evaluate_every=1, patience=2, steps=8)
  assert result.finished and result.step == 4 and steps_kept(tmp_path)[-1] == 4   # two evaluations after the best
  go(tmp_path / 'best', steps=2)
  assert same(jax.tree.map(np.asarray, result.params), saved(tmp_path / 'best')[1].params)


def test_checkpoints_by_another_metric_do_not_compare(tmp_path):
  changes = {'evaluate_every': 1, 'save_every': 1, 'keep': 9, 'evaluators': {'probe': scripted(VALUES)}}
  go(tmp_path, steps=2, **changes)
  go(tmp_path, best='probe/value', better='higher', steps=3, **changes)
  with checkpoint.Checkpoints(tmp_path / 'checkpoints', create=False) as checkpoints:
    assert checkpoints.best_step() == 3 and checkpoints.best_metric() == 2.
  judge = Judge(Judge.of({'facts': saved_facts(tmp_path)}).objective)
  with checkpoint.Checkpoints(tmp_path / 'checkpoints', create=False, judged_by=judge) as checkpoints:
    losses = logged(tmp_path, 'validation/loss')
    assert checkpoints.best_step() == min((1, 2), key=losses.get)


def saved_facts(workdir):
  with checkpoint.Checkpoints(workdir / 'checkpoints', create=False) as checkpoints:
    return checkpoints.facts()


def test_a_metric_that_does_not_exist_is_refused_with_those_that_do(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:   # before training, where the metrics are known by then
    patch.setattr('lm.train.start._restore', None)
    for best, named in (('validation/bits', 'validation/loss, .*validation/bits_per_byte, validation/accuracy'),
                        ('probe/value', 'begins with validation/'), ('loss', 'begins with validation/'),
                        ('validation/accuracy', "set `better` to 'higher'")):
      with pytest.raises(ValueError, match=f'(?s)best={best!r}.*{named}'):
        go(tmp_path, best=best)
    with pytest.raises(ValueError, match="called 'validation'"):
      go(tmp_path, evaluators={'validation': norms})
    with pytest.raises(ValueError, match="better='up'"):
      go(tmp_path, better='up')
  changes = {'evaluators': {'probe': scripted(VALUES)}, 'save_every': 9}
  for _ in range(2):   # the second run resumes at its evaluation
    with pytest.raises(ValueError, match="best='probe/volume'.* there are validation/loss, .*probe/value"):
      go(tmp_path, best='probe/volume', **changes)
    assert steps_kept(tmp_path) == [3]
  result = go(tmp_path, best='probe/value', **changes)
  assert (result.start, result.step) == (3, 6) and logged(tmp_path, 'probe/value') == {3: 2., 6: 3.}


def test_an_evaluation_that_a_signal_interrupts_is_repeated(tmp_path, monkeypatch):
  measured = []
  count = lambda run, data, mesh: lambda params, step: measured.append(step) or {'value': step}
  with monkeypatch.context() as patch:
    patch.setattr(Interrupt, 'should_stop', lambda self, step: step == 3)
    result = go(tmp_path, evaluators={'count': count})
  assert (result.step, result.finished, measured) == (3, False, [])
  assert go(tmp_path, evaluators={'count': count}).finished and measured == [3, 6]
  assert logged(tmp_path, 'count/value') == {3: 3., 6: 6.}


def test_an_evaluation_is_not_done_again_when_a_run_repeats_its_step(tmp_path, stopped):
  calls = tmp_path / 'calls'   # a file, because an evaluator that refers to another value is another one

  def count(run, data, mesh):
    def evaluate(params, step):
      with calls.open('a') as f:
        f.write(f'{step} ')
      return {'norm': float(jnp.sum(params['embedding'] ** 2))}
    return evaluate
  measured = lambda: [int(step) for step in calls.read_text().split()]
  changes = {'evaluators': {'count': count}, 'save_every': 9}
  workdir = stopped(5, dead=True, **changes)
  assert not steps_kept(workdir) and measured() == [3]
  first = [logged(workdir, name) for name in ('count/norm', 'validation/loss')]
  result = go(workdir, **changes)
  assert measured() == [3, 6] and (result.start, result.step) == (0, 6)
  last = [logged(workdir, name) for name in ('count/norm', 'validation/loss')]
  assert [{3: rows[3]} for rows in last] == first and [list(rows) for rows in last] == [[3, 6]] * 2
  assert go(workdir, **changes).metrics == result.metrics and measured() == [3, 6]   # the run is finished
  again = go(workdir, evaluate_batches=1, **changes)   # which measures something else
  assert measured() == [3, 6, 6] and again.metrics['validation/loss'] != result.metrics['validation/loss']
  assert again.metrics['count/norm'] == result.metrics['count/norm']
  go(workdir / 'other', optimizer=optim.adamw(lambda step: 0.01), **changes)
  (workdir / 'other' / 'ledger.jsonl').replace(workdir / 'ledger.jsonl')   # of other parameters at the same steps
  assert go(workdir, **changes).metrics == result.metrics and measured() == [3, 6, 6, 3, 6, 6]


def corpus(name, word, **further_splits):
  splits = {'train': 12, 'validation': 5, **further_splits}
  texts = {split: [f'{word} {split} {"ha" * (i % 5)} {i}' for i in range(count)] for split, count in splits.items()}
  return Source(name, texts, name)


def loss_of(params, documents):
  """Returns the loss of a bigram model in nats per token, in NumPy."""
  embedding, head = (np.asarray(params[name], np.float64) for name in ('embedding', 'head'))
  loss, count = 0., 0
  for text in documents:
    tokens = np.array([TOKENIZER.bos_id, *TOKENIZER.encode(text), TOKENIZER.eos_id])
    logits = embedding[tokens[:-1]] @ head.T
    log_probabilities = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss -= log_probabilities[np.arange(len(tokens) - 1), tokens[1:]].sum()
    count += len(tokens) - 1
  return loss / count


def test_each_source_of_a_mixture_and_each_further_split_is_logged_apart(tmp_path, capsys):
  cats, dogs = corpus('cats', 'miaow'), corpus('dogs', 'woof')
  mixed = dataset.Text(mixture([(cats, 1), (dogs, 2), (corpus('cats', 'purr'), 1)]), TOKENIZER, 16, ())
  result = go(tmp_path / 'mixture', data=mixed, evaluate_batches=None)
  output = capsys.readouterr().out
  assert result.data.validation_sets == ('cats', 'dogs', 'cats-2') and 'val/dogs: all' in output and '  dogs ' in output
  for name, part in (('cats', cats), ('dogs', dogs), ('cats-2', corpus('cats', 'purr'))):
    expected = loss_of(result.params, part.splits['validation'])
    assert logged(tmp_path / 'mixture', f'validation/{name}/loss')[6] == pytest.approx(expected, rel=1e-5)
    assert f'validation/{name}/bits_per_byte' in result.metrics
  news = dataset.Text(corpus('news', 'today', **{'validation-old': 4}), TOKENIZER, 16, ())
  result = go(tmp_path / 'splits', data=news, evaluate_batches=None, best='validation/old/bits_per_byte')
  expected = loss_of(result.params, news.source.splits['validation-old'])
  assert result.metrics['validation/old/loss'] == pytest.approx(expected, rel=1e-5)
  with checkpoint.Checkpoints(tmp_path / 'splits' / 'checkpoints', create=False) as checkpoints:
    assert checkpoints.best_metric() in logged(tmp_path / 'splits', 'validation/old/bits_per_byte').values()


def test_a_misspelt_metric_of_a_suite_is_refused_before_parameters_are_initialised(tmp_path, monkeypatch):
  file = tmp_path / 'suite.json'
  file.write_text(json.dumps({'likelihood': {'held': {'limit': 2}},
                              'generation': {'text': {'limit': 3, 'prompt_tokens': 1, 'max_tokens': 2,
                                                      'metrics': ['distinct']}}}))
  monkeypatch.setattr('lm.train.start._restore', None)
  changes = {'evaluators': {'suite': suites.Evaluator(file)},
             'model': transformer.llama(TOKENIZER.vocab_size, 8, 1, 2, max_length=16),
             'data': dataset.Text(corpus('news', 'today'), TOKENIZER, 16, ())}
  for best, nearest in (('suite/held/bits_per_bite', 'suite/held/bits_per_byte'),
                        ('suite/texts/distinct_2', 'suite/text/distinct_2')):
    with pytest.raises(ValueError, match=f'best={best!r}.* the nearest is {nearest} '):
      go(tmp_path / 'run', best=best, **changes)
  with pytest.raises(TypeError):   # a name that is declared comes as far as the parameters
    go(tmp_path / 'run', best='suite/held/bits_per_byte/high', **changes)


def test_a_suite_is_measured_once_a_step_also_where_a_run_dies_between_checkpoints(tmp_path):
  suite = tmp_path / 'texts.json'
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in TEXTS[:4]))
  suite.write_text(json.dumps({'likelihood': {'a': {'jsonl': str(tmp_path / 'a.jsonl')}}}))
  model = transformer.llama(TOKENIZER.vocab_size, 8, 1, 2, max_length=16)

  def dying(run, data, mesh):
    evaluate = suites.Evaluator(suite)(run, data, mesh)

    def metrics(params, step):
      if step == 6:
        raise SystemError('the machine is gone')
      return evaluate(params, step)
    return metrics
  changes = {'model': model, 'steps': 8, 'evaluate_every': 2, 'save_every': 9}
  with pytest.raises(SystemError):
    go(tmp_path / 'twice', evaluators={'texts': dying}, **changes)
  assert logged(tmp_path / 'twice', 'texts/a/bits_per_byte').keys() == {2, 4}
  for name in ('twice', 'once'):
    go(tmp_path / name, evaluators={'texts': suites.Evaluator(suite)}, **changes)
  logs = [(tmp_path / name / 'metrics.jsonl').read_text().splitlines() for name in ('twice', 'once')]
  rows = [[row for row in map(json.loads, lines) if 'texts/a/bits_per_byte' in row] for lines in logs]
  assert [row['step'] for row in rows[0]] == [2, 4, 6, 8]
  for first, second in zip(*rows, strict=True):
    assert {key: value for key, value in first.items() if key.startswith('texts/')} == {
        key: value for key, value in second.items() if key.startswith('texts/')}
  (tmp_path / 'a.jsonl').write_text(''.join(json.dumps({'text': text}) + '\n' for text in TEXTS[4:9]))
  again = go(tmp_path / 'once', evaluators={'texts': suites.Evaluator(suite)}, **changes)   # of other texts
  assert again.step == 8 and again.metrics['texts/a/bits_per_byte'] != rows[1][-1]['texts/a/bits_per_byte']
