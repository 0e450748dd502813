"""Probes of labels name what a wrong objective trains on."""
import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.examined import examined, run_of
from helpers.slow import slow

from lm.data.batch import Example, Form
from lm.doctor import labels, visibility
from lm.doctor.findings import DoesNotApply, Verdict

pytestmark = pytest.mark.usefixtures('compiled_once')
RUN = run_of('next_token')


def shifted(places, in_place=True):
  """Returns a run whose labels are so many places ahead."""
  def example(tokens, rng, special):
    return Example(tokens[:len(tokens) - places], tokens[places:], np.ones(len(tokens) - places, np.float32))
  return dataclasses.replace(RUN, objective=dataclasses.replace(
      RUN.objective, forms=(Form(example, ahead=places > 0, in_place=in_place),)))


def with_loss(change, run=RUN):
  """Returns a run whose loss is given another batch."""
  def loss(apply, params, batch, key):
    return run.objective.loss(apply, params, change(batch), key)
  return dataclasses.replace(run, objective=dataclasses.replace(run.objective, loss=loss))


@pytest.mark.parametrize('name', slow('prefix', 'supervised') + ['next_token'])
def test_labels_of_sound_objectives(name):
  with examined(run_of(name)) as subject:
    assert labels.labels_shifted_once(subject).verdict is Verdict.OK
    assert labels.targets_alone_are_trained(subject).verdict is Verdict.OK


def test_a_decoder_that_is_trained_by_diffusion_is_sound():
  with examined(run_of('diffusion', model=RUN.model)) as subject:
    finding = labels.labels_shifted_once(subject)
    assert finding.verdict is Verdict.OK and 'in the input of their own position' in finding.text
    for probe in (visibility.no_future, visibility.answers_hidden):
      with pytest.raises(DoesNotApply, match='see all tokens|labels are not the tokens after'):
        probe(subject)


@pytest.mark.parametrize('run, verdict, words', [
    (shifted(2), Verdict.FAULT, 'shifted 2 times'),
    (shifted(2, in_place=False), Verdict.WARNING, 'further ahead'),
    (shifted(0), Verdict.FAULT, 'the token that it reads'),
    (with_loss(lambda batch: batch._replace(targets=jnp.roll(batch.targets, -1, axis=1))), Verdict.FAULT,
     'shifted twice'),
    (with_loss(lambda batch: batch._replace(targets=jnp.zeros_like(batch.targets))), Verdict.FAULT, 'batch.targets'),
])
def test_misplaced_labels_are_named(run, verdict, words):
  with examined(run) as subject:
    finding = labels.labels_shifted_once(subject)
    assert finding.verdict is verdict and words in finding.text


def test_trained_padding_and_prompts_are_named():
  everything = with_loss(lambda batch: batch._replace(weights=jnp.ones_like(batch.weights)))
  with examined(everything) as subject:
    finding = labels.targets_alone_are_trained(subject)
    assert finding.verdict is Verdict.FAULT and 'segments are 0' in finding.text
  prompts = with_loss(lambda batch: batch._replace(weights=(batch.segments > 0).astype(jnp.float32)),
                      run_of('supervised'))
  with examined(prompts) as subject:
    finding = labels.targets_alone_are_trained(subject)
    assert finding.verdict is Verdict.FAULT and 'prompts' in finding.text
