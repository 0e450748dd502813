"""Probes of gradients name a step whose gradient is wrong."""
import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.every_run import decoder
from helpers.examined import Changed, examined, run_of
from helpers.experts import KINDS

from lm import lora, sharding
from lm.doctor import gradients
from lm.doctor.findings import DoesNotApply, Verdict
from lm.doctor.subject import Pass
from lm.models import attention, moe

pytestmark = pytest.mark.usefixtures('compiled_once')
RUN = run_of('next_token')


def of_model(change):
  return dataclasses.replace(RUN, model=Changed(RUN.model, change))


def averaged(loss, params, batch, key, parts):
  """The gradient of the mean of the means of the parts, a classical mistake of accumulation."""
  def part_mean(params, i):
    part = jax.tree.map(lambda x: x[i::parts], batch)
    total, (weight, sums) = loss(params, part, key)
    return total / jnp.maximum(weight, 1), sums

  def mean(params):
    values, sums = zip(*(part_mean(params, i) for i in range(parts)))
    return sum(values) / parts, sums[0]
  (value, sums), grads = jax.value_and_grad(mean, has_aux=True)(params)
  return (value, (jnp.float32(1), sums)), grads


def test_a_sound_step():
  with examined(RUN) as subject:
    for probe in (gradients.padding_has_no_gradient, gradients.parameters_have_gradients):
      assert probe(subject).verdict is Verdict.OK
    for probe in (gradients.accumulation_in_use, gradients.sharded_equals_single):
      with pytest.raises(DoesNotApply):
        probe(subject)


def test_padding_that_is_trained_on_is_a_fault():
  def loss(apply, params, batch, key):
    return RUN.objective.loss(apply, params, batch._replace(weights=jnp.ones_like(batch.weights)), key)
  with examined(dataclasses.replace(RUN, objective=dataclasses.replace(RUN.objective, loss=loss))) as subject:
    finding = gradients.padding_has_no_gradient(subject)
    assert finding.verdict is Verdict.FAULT and 'padding is trained on' in finding.text


@pytest.mark.slow
def test_an_average_of_averages_is_a_fault():
  with examined(RUN) as subject:
    assert gradients.accumulation(subject).verdict is Verdict.OK
  with examined(dataclasses.replace(RUN, gradient=averaged, accumulate=2)) as subject:
    finding = gradients.accumulation_in_use(subject)
    assert finding.verdict is Verdict.FAULT and 'divided once' in finding.text


@pytest.mark.slow
def test_unused_and_fixed_parameters_are_named():
  class Unused(Changed):
    def init(self, key):
      return {**self.model.init(key), 'unused': jnp.ones(3)}

  def fixed_norm(model, params, batch, cache):
    return model.apply({**params, 'norm': jax.lax.stop_gradient(params['norm'])}, batch, cache=cache)
  with examined(dataclasses.replace(RUN, model=Unused(RUN.model, fixed_norm))) as subject:
    finding = gradients.parameters_have_gradients(subject)
    assert finding.verdict is Verdict.WARNING and 'norm/scale, unused' in finding.text


@pytest.mark.slow
def test_adapters_have_gradients_and_their_base_has_none():
  run = lora.start_from(lora.adapt(RUN, 2), jax.jit(lambda model: model.init(jax.random.key(0)), static_argnums=0))
  with examined(run) as subject:
    finding = gradients.parameters_have_gradients(subject)
    assert finding.verdict is Verdict.OK and 'these are not trained: base' in finding.text


@pytest.mark.parametrize('balance, size, verdict', [
    ((), 0., Verdict.OK), ((), 1., Verdict.FAULT), ((moe.SwitchBalance(),), 1., Verdict.FAULT),
    ((moe.BiasBalance(),), 1., Verdict.OK)], ids=str)
def test_a_correction_of_a_router_has_a_gradient_only_where_it_balances_experts(balance, size, verdict):
  model = decoder(attention.Attention(2, 2, 4), KINDS['deepseek'].clone(balance=balance))
  params = jax.eval_shape(model.init, jax.random.key(0))
  grads = jax.tree.map_with_path(lambda path, x: np.full(x.shape, size if 'correction' in str(path[-1]) else 1., 'f4'),
                                 params)
  subject = types.SimpleNamespace(run=types.SimpleNamespace(model=model, accumulate=1), base_model=model, params=params,
                                  constants={}, small=lambda parts: None, gradient_pass=lambda batch: Pass(grads, {}))
  finding = gradients.parameters_have_gradients(subject)
  assert finding.verdict is verdict and (verdict is Verdict.OK or 'router/correction' in finding.text)


@pytest.mark.slow
def test_devices_that_compute_something_else_are_a_fault():
  with examined(RUN, 'fsdp:2,tensor:2') as subject:
    assert gradients.sharded_equals_single(subject).verdict is Verdict.OK

  def by_devices(model, params, batch, cache):
    outputs = model.apply(params, batch, cache=cache)
    return outputs._replace(hidden=outputs.hidden * sharding.parts('B'))
  with examined(of_model(by_devices), 'fsdp:2') as subject:
    finding = gradients.sharded_equals_single(subject)
    assert finding.verdict is Verdict.FAULT and 'one device does' in finding.text
