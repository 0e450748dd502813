"""Metrics of variety equal their plain definitions."""
import random

import numpy as np
import pytest

from lm.evaluate import texts
from lm.evaluate.texts import diversity


def sample(count=12, seed=0):
  rng = random.Random(seed)
  return [' '.join(rng.choices('abcdef', k=rng.randint(1, 12))) for _ in range(count)]


def test_distinct_counts_the_ngrams_of_all_texts():
  corpus = sample()
  for n, measure in zip((1, 2, 3), texts.Distinct()(corpus)):
    ngrams = [tuple(text.split()[i:i + n]) for text in corpus for i in range(len(text.split()) - n + 1)]
    assert measure.interval().value == pytest.approx(len(set(ngrams)) / len(ngrams), 1e-12)
    assert measure.rows[:, 0].sum() == pytest.approx(len(set(ngrams)), 1e-12)


def test_repetition_is_within_a_text_and_copies_are_between_texts():
  within, copies = texts.Repetition(2)(['a b a b a b', 'a b c', 'x', 'a  b c '])
  assert within.rows.tolist() == [[0.6, 1], [0, 1], [0, 0], [0, 1]]   # 5 pairs, 2 of them different
  assert within.interval().value == pytest.approx(0.2) and copies.scores().tolist() == [0, 1, 0, 1]


def test_self_bleu_is_the_bleu_of_each_text_against_all_others():
  sacrebleu = pytest.importorskip('sacrebleu.metrics')
  corpus = [*sample(), 'a b c d e f', 'a b c d e f', 'g', 'a']
  metric = sacrebleu.BLEU(effective_order=True, tokenize='none')
  expected = [metric.sentence_score(text, corpus[:i] + corpus[i + 1:]).score for i, text in enumerate(corpus)]
  measure, = texts.SelfBleu()(corpus)
  np.testing.assert_allclose(measure.scores(), expected, rtol=1e-12)
  assert texts.SelfBleu()(['a b', 'c d'])[0].interval().value == 0
  assert texts.SelfBleu()(['', 'c d'])[0].interval().value == 0


def test_self_bleu_of_many_texts_is_of_a_sample_that_the_signature_names():
  corpus = sample(30)
  measure, = texts.SelfBleu(limit=10, seed=3)(corpus)
  chosen = np.flatnonzero(measure.rows[:, 1])
  assert len(chosen) == 10 and 'texts:10|drawn_from:30|seed:3' in measure.signature
  whole, = texts.SelfBleu()([corpus[i] for i in chosen])
  np.testing.assert_array_equal(measure.scores()[chosen], whole.scores())
  assert measure.interval().value == pytest.approx(whole.interval().value, 1e-12)


def test_no_texts_are_refused():
  for metric in texts.Distinct(), texts.Repetition(), texts.SelfBleu():
    with pytest.raises(ValueError, match='there are none'):
      metric([])
  with pytest.raises(ValueError, match='there is one'):
    texts.SelfBleu()(['a'])


def test_ngrams_of_short_texts():
  assert diversity.ngrams(['a'], 2) == [] and diversity.ngrams(['a', 'b'], 2) == [('a', 'b')]
