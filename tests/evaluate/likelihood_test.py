"""Likelihood of documents: each metric is what its definition says, computed here token by token."""
import math

import numpy as np
import pytest

from lm.evaluate import likelihood
from lm.evaluate.score import Predicted


def predicted(log_p, top=None, correct=None):
  log_p = np.asarray(log_p, np.float32)
  return Predicted(log_p, log_p if top is None else np.asarray(top, np.float32),
                   np.ones(len(log_p), bool) if correct is None else np.asarray(correct, bool))


def values(rows):
  return {measure.name: measure.interval().value for measure in likelihood.measures(rows)}


def test_a_uniform_model_over_257_tokens_has_the_published_bits_per_byte():
  """lm-evaluation-harness gives byte perplexity 257 and 8.005624549193879 bits per byte."""
  texts = ['ab cd', 'e', 'f g  h']
  rows = np.stack([likelihood.row(text, predicted([-math.log(257)] * len(text)), len(text)) for text in texts])
  metrics = values(rows)
  assert metrics['perplexity'] == pytest.approx(257, rel=1e-6)
  assert metrics['bits_per_byte'] == pytest.approx(8.005624549193879, rel=1e-7)
  assert metrics['word_perplexity'] == pytest.approx(257 ** (12 / 6), rel=1e-5)   # 2 + 1 + 3 words
  assert metrics['accuracy'] == 1


def test_metrics_are_those_of_sums_over_documents():
  rng = np.random.default_rng(0)
  tops = [np.log(rng.uniform(0.05, 1., n)) for n in (7, 30, 1, 12)]
  hits = [rng.random(len(top)) < 0.6 for top in tops]
  losses = [np.where(hit, top, top - 1) for top, hit in zip(tops, hits)]
  rows = np.stack([likelihood.row('a b', predicted(*document), 2 * len(document[0]))
                   for document in zip(losses, tops, hits)])
  metrics, loss = values(rows), -np.concatenate(losses)
  assert metrics['cross_entropy'] == pytest.approx(loss.mean(), rel=1e-6)
  assert metrics['perplexity'] == pytest.approx(np.exp(loss.mean()), rel=1e-6)
  assert metrics['bits_per_byte'] == pytest.approx(loss.mean() / 2 / math.log(2), rel=1e-6)
  assert metrics['accuracy'] == pytest.approx(np.concatenate(hits).mean())
  # The definition of Guo et al., a bin at a time.
  top, hit, error = np.exp(np.concatenate(tops)), np.concatenate(hits), 0
  for low in np.arange(15) / 15:
    inside = (top >= low) & (top < low + 1 / 15)
    if inside.any():
      error += inside.mean() * abs(hit[inside].mean() - top[inside].mean())
  assert metrics['calibration_error'] == pytest.approx(error, rel=1e-5)
  points = likelihood.reliability(rows)
  assert all(x == pytest.approx(top[(top * 15).astype(int) == int(x * 15)].mean(), rel=1e-5) for x, _ in points)


def test_a_calibrated_model_has_no_error_and_a_boastful_one_has_its_boast():
  top = np.log(np.full(1000, 0.7))
  calibrated = likelihood.row('a', predicted(top, top, np.arange(1000) < 700), 1)[None]
  boastful = likelihood.row('a', predicted(top, top, np.arange(1000) < 400), 1)[None]
  assert values(calibrated)['calibration_error'] == pytest.approx(0, abs=1e-6)
  assert values(boastful)['calibration_error'] == pytest.approx(0.3, abs=1e-6)


def test_the_loss_by_position_is_that_of_the_tokens_there():
  losses = [np.arange(9.), np.array([10., 20.])]
  rows = np.stack([likelihood.row('a', predicted(-values), 1) for values in losses])
  points = {name: measure.interval().value for name, measure in likelihood.by_position(rows)}
  assert points == {'0': 5., '1': 10.5, '2-3': 2.5, '4-7': 5.5, '8-15': 8.}


def test_a_text_that_is_one_word_may_have_a_perplexity_beyond_any_float():
  """Chinese has no white space: a word is a document, of a probability that no float holds."""
  rows = np.stack([likelihood.row('字' * n, predicted([-9.] * n), 3 * n) for n in (10, 70, 90, 300)])
  word_perplexity, = (m for m in likelihood.measures(rows) if m.name == 'word_perplexity')
  value, low, high = word_perplexity.interval()
  assert value == high == np.inf and math.exp(9 * 10) <= low < np.inf


def test_a_document_without_a_scored_token_adds_nothing():
  """Without bos, the first token is read and not scored."""
  rows = np.stack([likelihood.row('a', predicted([]), 0, 1), likelihood.row('b c d', predicted([-2., -1.]), 2, 1)])
  assert not rows[0].any()
  for measure in likelihood.measures(rows):   # a draw of the first document alone has no value
    assert measure.interval()[0] == measure.interval()[1] == measure.interval()[2]
  assert [name for name, _ in likelihood.by_position(rows)] == ['1', '2-3']
