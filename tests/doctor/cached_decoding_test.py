"""Probes of decoding name a wrong cache, and a scorer that is not the sampler."""
import dataclasses

import jax
import jax.numpy as jnp
import pytest
from helpers.examined import Changed, examined, run_of

from lm.doctor import cached_decoding
from lm.doctor.findings import DoesNotApply, Verdict

pytestmark = pytest.mark.usefixtures('compiled_once')
RUN = run_of('next_token')


def of_model(change):
  return dataclasses.replace(RUN, model=Changed(RUN.model, change))


@pytest.mark.slow
def test_sound_decoding():
  for name in ('next_token', 't5'):
    with examined(run_of(name)) as subject:
      assert cached_decoding.cache_equals_forward(subject).verdict is Verdict.OK
      finding = cached_decoding.sampler_scorer_trainer_agree(subject)
      assert finding.verdict is Verdict.OK and 'scorer and trainer' in finding.text


def test_a_cache_that_is_off_by_one_is_a_fault():
  def late(model, params, batch, cache):
    shift = 0 if cache is None else 1
    return model.apply(params, batch._replace(positions=jnp.maximum(batch.positions - shift, 0)), cache=cache)
  with examined(of_model(late)) as subject:
    finding = cached_decoding.cache_equals_forward(subject)
    assert finding.verdict is Verdict.FAULT and 'the cache' in finding.text


@pytest.mark.slow
def test_dropout_in_scoring_is_a_fault():
  def dropped(model, params, batch, cache):
    outputs = model.apply(params, batch, cache=cache)
    if cache is not None:
      return outputs
    keep = jax.random.bernoulli(jax.random.key(0), 0.5, outputs.hidden.shape)
    return outputs._replace(hidden=jnp.where(keep, 2 * outputs.hidden, 0))
  with examined(of_model(dropped)) as subject:
    finding = cached_decoding.sampler_scorer_trainer_agree(subject)
    assert finding.verdict is Verdict.FAULT and 'scored otherwise' in finding.text


@pytest.mark.slow
def test_a_loss_of_another_text_is_a_fault():
  goal = RUN.objective

  def loss(apply, params, batch, key):
    return goal.loss(apply, params, batch._replace(targets=(batch.targets + 1) % 64), key)
  with examined(dataclasses.replace(RUN, objective=dataclasses.replace(goal, loss=loss))) as subject:
    finding = cached_decoding.sampler_scorer_trainer_agree(subject)
    assert finding.verdict is Verdict.FAULT and 'trained on otherwise' in finding.text


def test_an_encoder_writes_no_text():
  with examined(run_of('masked')) as subject, pytest.raises(DoesNotApply):
    cached_decoding.cache_equals_forward(subject)
