"""Probes of what a token sees name the leak that a model has."""
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.examined import Changed, examined, run_of

from lm.data.batch import Form
from lm.doctor import visibility
from lm.doctor.findings import DoesNotApply, Verdict
from lm.objectives import prefix

pytestmark = pytest.mark.usefixtures('compiled_once')
RUN = run_of('next_token')


def with_batch(**changes):
  """Returns a run whose model reads a batch with other fields, each a function of the batch."""
  def change(model, params, batch, cache):
    return model.apply(params, batch._replace(**{name: f(batch) for name, f in changes.items()}), cache=cache)
  return dataclasses.replace(RUN, model=Changed(RUN.model, change))


def test_a_sound_decoder_has_no_leak():
  with examined(RUN) as subject:
    for probe in (visibility.documents_apart, visibility.no_future, visibility.past_is_seen):
      assert probe(subject).verdict is Verdict.OK


@pytest.mark.parametrize('changes, probe, words', [
    ({'segments': lambda batch: None}, visibility.documents_apart, 'borders of packed documents'),
    ({'bidirectional': lambda batch: jnp.ones_like(batch.tokens, bool)}, visibility.no_future, 'has to predict'),
])
def test_a_leak_is_a_fault(changes, probe, words):
  with examined(with_batch(**changes)) as subject:
    finding = probe(subject)
    assert finding.verdict is Verdict.FAULT and words in finding.text


def test_a_model_without_context_is_named():
  alone = lambda batch: batch.segments * 100 + batch.positions
  with examined(with_batch(segments=alone)) as subject:
    finding = visibility.past_is_seen(subject)
    assert finding.verdict is Verdict.WARNING and 'reads no context' in finding.text


def test_a_prefix_may_be_seen_and_its_targets_may_not():
  with examined(run_of('prefix')) as subject:
    assert visibility.no_future(subject).verdict is visibility.answers_hidden(subject).verdict is Verdict.OK

  def one_too_many(piece, rng, special):
    example = prefix.prefix().forms[0].example(piece, rng, special)
    return example._replace(bidirectional=np.concatenate([[True], example.bidirectional[:-1]]))
  objective = dataclasses.replace(RUN.objective, forms=(Form(one_too_many, ahead=True),))
  with examined(dataclasses.replace(RUN, objective=objective)) as subject:
    finding = visibility.answers_hidden(subject)
    assert finding.verdict is Verdict.FAULT and 'sees them before' in finding.text


@pytest.mark.slow
def test_a_source_is_seen_by_its_own_document():
  with examined(run_of('t5')) as subject:
    fields = {influence.change.field for influence in subject.influences}
    assert fields == {'tokens', 'source'}
    assert visibility.documents_apart(subject).verdict is Verdict.OK


def test_an_encoder_has_no_future():
  with examined(run_of('masked')) as subject, pytest.raises(DoesNotApply):
    visibility.no_future(subject)
