"""Probes of arithmetic name a wrong kernel, and a wrong initial loss."""
import dataclasses
import functools

import jax
import numpy as np
import pytest
from helpers.every_run import decoder
from helpers.examined import Changed, examined, longer, run_of

from lm.doctor import arithmetic
from lm.doctor.findings import Verdict
from lm.models import attention, kernels, layers

pytestmark = pytest.mark.usefixtures('compiled_once')
RUN = run_of('next_token')
WINDOWED = dataclasses.replace(RUN, model=longer(decoder(
    attention.Attention(2, 1, 4, scores=kernels.AttentionScores(window=5, softcap=3.), sinks=True),
    layers.FeedForward(8))))


def test_sound_arithmetic():
  with examined(WINDOWED) as subject:
    for probe in (arithmetic.attention_kernel, arithmetic.loss_at_initialisation):
      assert probe(subject).verdict is Verdict.OK


def test_the_plain_formula_is_the_kernel_of_jax():
  rng = np.random.default_rng(0)
  q, k, v, dy = (rng.normal(size=(9, n, 4)).astype(np.float32) for n in (4, 2, 2, 4))
  ours = arithmetic.plain_attention(q, k, v, np.ones(9), np.arange(9), None, kernels.AttentionScores(window=3), None,
                                    dy)
  attend = functools.partial(jax.nn.dot_product_attention, is_causal=True, local_window_size=(2, 0))
  y, gradient = jax.vjp(attend, q, k, v)
  for a, b in zip(ours, (y, *gradient(dy))):
    np.testing.assert_allclose(a, b, atol=2e-6)


def test_a_window_that_is_off_by_one_is_a_fault(monkeypatch):
  sound = kernels.Visible.mask

  def wide(self, queries, keys, scores):
    return sound(self, queries, keys, dataclasses.replace(scores, window=scores.window + 1))
  monkeypatch.setattr(kernels.Visible, 'mask', wide)
  with examined(WINDOWED) as subject:
    finding = arithmetic.attention_kernel(subject)
    assert finding.verdict is Verdict.FAULT and 'with a window of 5' in finding.text


def test_a_kernel_with_a_wrong_gradient_alone_is_a_fault(monkeypatch):
  """The gradient of the scores lacks the mean that the softmax subtracts."""
  def without_mean(scores, residuals, dy):
    *others, y, log = residuals
    return kernels._backward(scores, (*others, 0 * y, log), dy)
  wrong = jax.custom_vjp(kernels._blockwise.fun, nondiff_argnums=(0,))
  wrong.defvjp(kernels._forward, without_mean)
  monkeypatch.setattr(kernels, '_blockwise', wrong)
  with examined(WINDOWED) as subject:
    finding = arithmetic.attention_kernel(subject)
    assert finding.verdict is Verdict.FAULT and 'the gradient of' in finding.text


@pytest.mark.parametrize('scale, verdict, words', [(300., Verdict.WARNING, 'too large'),
                                                   (None, Verdict.FAULT, 'lower than any guess')])
def test_an_initial_loss_that_is_no_guess(scale, verdict, words):
  def change(model, params, batch, cache):
    outputs = model.apply(params, batch, cache=cache)
    if scale is not None:
      return outputs._replace(hidden=outputs.hidden * scale)
    answers = 10 * jax.nn.one_hot(batch.targets, 64)   # the model sees what it has to predict
    return outputs._replace(hidden=answers, head=lambda hidden: hidden)
  with examined(dataclasses.replace(RUN, model=Changed(RUN.model, change))) as subject:
    finding = arithmetic.loss_at_initialisation(subject)
    assert finding.verdict is verdict and words in finding.text
