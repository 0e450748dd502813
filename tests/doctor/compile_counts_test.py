"""Probes of compilation name what makes a step compile again."""
import dataclasses

import jax.numpy as jnp
import optax
import pytest
from helpers.examined import examined, run_of

from lm.data.rows.stages import Stage
from lm.doctor import compile_counts
from lm.doctor.findings import Verdict

pytestmark = pytest.mark.usefixtures('compiled_once')
RUN = run_of('next_token')


def test_a_state_that_changes_its_type_compiles_again():
  counts = optax.GradientTransformation(lambda params: jnp.int32(0),
                                        lambda grads, count, params=None: (grads, count + 1.))
  with examined(dataclasses.replace(RUN, optimizer=counts)) as subject:
    finding = compile_counts.state_keeps_its_types(subject)
    assert finding.verdict is Verdict.WARNING and 'opt_state is int32[]' in finding.text


def test_steps_of_a_run_compile_once_for_each_shape():
  with examined(dataclasses.replace(RUN, stages=(Stage(4, 16, 32),))) as subject:
    assert compile_counts.state_keeps_its_types(subject).verdict is Verdict.OK
    finding = compile_counts.step_compiles_once(subject)
    assert finding.verdict is Verdict.OK and '5 steps with batches of 2 shapes compiled 2 times' in finding.text
    assert not subject.state.step.is_deleted()


@pytest.mark.parametrize('change, words', [
    (lambda batch: batch._replace(weights=jnp.broadcast_to(jnp.asarray(1.), (8, 64))), 'weights is float32[8, 64] '),
    (lambda batch: batch._replace(tokens=batch.tokens[:4], targets=batch.targets[:4], weights=batch.weights[:4],
                                  positions=batch.positions[:4], segments=batch.segments[:4]), 'int32[4, 64]')])
def test_batches_that_change_their_types_compile_again(change, words):
  with examined(dataclasses.replace(RUN)) as subject:   # a run of its own has a step that is not compiled yet
    feed = lambda step, state: change(subject.feed(step, state)) if step == 1 else subject.feed(step, state)
    finding = compile_counts.step_compiles_once(dataclasses.replace(subject, feed=feed))
    assert finding.verdict is Verdict.WARNING and 'compiled 2 times' in finding.text
    assert 'step 2 did so' in finding.text and words in finding.text
