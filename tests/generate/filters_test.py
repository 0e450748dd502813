"""Bans, biases, penalties and filters of rows equal plain loops over tokens, and those of transformers."""
import math

import jax
import numpy as np
import pytest

from lm import generate
from lm.generate import Sampling, filters

V, ENDS = 30, (7, 9)
SAMPLINGS = [   # a row each
    Sampling(), Sampling(0, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.25),
    Sampling(0.7, top_k=4, repetition_penalty=0.8), Sampling(1.5, top_p=0.8, frequency_penalty=-1.5),
    Sampling(2., min_p=0.2, presence_penalty=-2., logit_bias=((0, 5.), (29, -100.), (3, 0.5))),
    Sampling(top_k=9, top_p=0.7, min_p=0.05, bad_words=((4,), (1, 2), (2, 10), (5, 1, 6), (9, 1, 11),
                                                  (1, 2, 3, 5, 1, 8))),
    Sampling(0.9, min_tokens=12, stop_ids=(1, 2)), Sampling(0, min_tokens=11, stop_ids=(3,), logit_bias=((7, 50.),)),
    Sampling(1., 6, 0.9, 0.01, 1.1, 1., 0.5, ((5, 2.),), ((5, 1, 2),), 20, (5,))]
TEXT, WRITTEN = [4, 1, 1, 2, 3, 5, 1, 2, 3, 5, 1, 2, 3, 5, 1], 11   # the first four are the prompt


def plain(logits, sampling, text, written):
  """Computes what `process` does, token by token, in the order that vLLM documents."""
  x, output = [float(value) for value in logits], text[len(text) - written:]
  for word in sampling.bad_words:
    if list(word[:-1]) == text[len(text) - len(word) + 1:]:
      x[word[-1]] = -math.inf
  if written < sampling.min_tokens:
    for token in {*ENDS, *sampling.stop_ids}:
      x[token] = -math.inf
  for token, value in sampling.logit_bias:
    x[token] += value
  for token in set(text):
    x[token] = x[token] / sampling.repetition_penalty if x[token] > 0 else x[token] * sampling.repetition_penalty
  for token in set(output):
    x[token] -= sampling.presence_penalty + sampling.frequency_penalty * output.count(token)
  if sampling.temperature == 0:
    return x
  x = [value / sampling.temperature for value in x]
  x = [value if math.exp(value - max(x)) >= sampling.min_p else -math.inf for value in x]
  if sampling.top_k:
    least = sorted(x)[-sampling.top_k]
    x = [value if value >= least else -math.inf for value in x]
  total, mass = sum(map(math.exp, x)), 0.
  for token in sorted(range(len(x)), key=lambda token: (-x[token], -token)):
    if mass / total >= sampling.top_p:
      x[token] = -math.inf
    else:
      mass += math.exp(x[token])
  return x


def processed(logits, samplings, text, written):
  rows = len(samplings)
  return np.asarray(jax.jit(generate.process)(
      logits, generate.settings(samplings, [0] * rows, np.arange(rows)),
      filters.new_history([np.int32(text)] * rows, V, written), np.int32([ENDS] * rows)))


def test_settings_of_rows_are_plain_loops_over_tokens():
  rng = np.random.default_rng(0)
  for _ in range(5):
    logits = rng.normal(0, 2, (len(SAMPLINGS), V)).astype('f4')
    rows = processed(logits, SAMPLINGS, TEXT, WRITTEN)
    for row, sampling in enumerate(SAMPLINGS):
      expected = plain(logits[row], sampling, TEXT, WRITTEN)
      np.testing.assert_allclose(rows[row], expected, rtol=1e-5, atol=1e-5, err_msg=str(sampling))


def repetitions(text, sampling):
  """Returns the penalty of each token that would continue a repetition, by the definition of DRY."""
  lengths = {}
  for place, token in enumerate(text):
    n = 0
    while n < place and text[place - 1 - n] == text[-1 - n] and text[-1 - n] not in sampling.dry_sequence_breakers:
      n += 1
    if token not in sampling.dry_sequence_breakers:
      lengths[token] = max(n, lengths.get(token, 0))
  return {token: min(1e4, sampling.dry_multiplier * sampling.dry_base ** (n - sampling.dry_allowed_length))
          for token, n in lengths.items() if n >= sampling.dry_allowed_length}


def test_continued_repetitions_are_penalised_as_dry_is_defined():
  rng, samplings = np.random.default_rng(0), [
      Sampling(0, dry_multiplier=0.8), Sampling(0), Sampling(0, dry_multiplier=2., dry_base=1.2, dry_allowed_length=1),
      Sampling(0, dry_multiplier=0.5, dry_sequence_breakers=(2,)),
      Sampling(0, dry_multiplier=1., dry_base=1., dry_allowed_length=4, dry_sequence_breakers=(29, 1))]
  sizes = set()
  for text in ([3], [5] * 20, [1, 2] * 9, *(rng.integers(0, 3, 40) for _ in range(12)), TEXT):
    text, logits = [int(token) for token in text], rng.normal(0, 2, (len(samplings), V)).astype('f4')
    rows = processed(logits, samplings, text, 0)
    for row, sampling in enumerate(samplings):
      penalties = repetitions(text, sampling) if sampling.dry_multiplier else {}
      sizes |= {(row, len(penalties))}
      expected = logits[row] - np.float32([penalties.get(token, 0.) for token in range(V)])
      np.testing.assert_allclose(rows[row], expected, rtol=1e-5, atol=1e-5, err_msg=f'{text} {sampling}')
  assert {row for row, count in sizes if count} == {0, 2, 3, 4}
  forever = processed(np.zeros((2, V), 'f4'), [Sampling(0, dry_multiplier=1.), Sampling(0)], [4] * 3000, 0)
  assert forever[0, 4] == -1e4 and not np.delete(forever[0], 4).any() and not forever[1].any()


def test_a_history_grows_as_a_text_does():
  whole, grown = filters.new_history([np.int32(TEXT)], V, WRITTEN), filters.new_history([np.int32(TEXT[:4])], V)
  add = jax.jit(filters.TokenHistory.add)
  for token in TEXT[4:]:
    grown = add(grown, np.int32([token]), np.array([True]))
  grown = add(grown, np.int32([0]), np.array([False]))._replace(recent_BL=grown.recent_BL)   # of a row that has ended
  jax.tree.map(np.testing.assert_array_equal, grown, whole)


def test_the_most_probable_part_is_that_of_a_sort():
  rng = np.random.default_rng(0)
  logits = np.concatenate([rng.normal(0, 3, (4, 1000)), rng.integers(-3, 3, (4, 1000))]).astype('f4')
  logits[3, ::2] = -np.inf
  for mass in 0.05, 0.5, 0.9, 0.999:
    stays = np.isfinite(jax.jit(filters.keep_top_p)(logits, mass))
    for row, values in enumerate(logits.astype('f8')):
      order = np.argsort(values, kind='stable')
      ascending = np.exp(values[order])
      expected = np.zeros(1000, bool)
      expected[order] = np.cumsum(ascending) / ascending.sum() > 1 - mass
      assert np.sum(stays[row] != expected & np.isfinite(values)) <= (row >= 4)   # a tie at the border, by rounding
  assert filters.keep_top_p(logits, 1).tolist() == logits.tolist()


@pytest.mark.slow
def test_settings_are_those_of_transformers():
  torch, processors = pytest.importorskip('torch'), pytest.importorskip('transformers.generation.logits_process')
  text, rng = torch.tensor([TEXT]), np.random.default_rng(0)
  cases = [
      (Sampling(repetition_penalty=1.3), processors.RepetitionPenaltyLogitsProcessor(1.3)),
      (Sampling(bad_words=SAMPLINGS[5].bad_words),
       processors.NoBadWordsLogitsProcessor([list(word) for word in SAMPLINGS[5].bad_words], eos_token_id=list(ENDS))),
      (Sampling(min_tokens=12), processors.MinNewTokensLengthLogitsProcessor(4, 12, list(ENDS))),
      (Sampling(logit_bias=((3, 2.), (5, -9.))),
       processors.SequenceBiasLogitsProcessor([[[3], 2.], [[5], -9.]])),
      (Sampling(0.7), processors.TemperatureLogitsWarper(0.7)), (Sampling(top_k=5), processors.TopKLogitsWarper(5)),
      (Sampling(top_p=0.8), processors.TopPLogitsWarper(0.8)), (Sampling(min_p=0.1), processors.MinPLogitsWarper(0.1)),
      *((Sampling(typical_p=mass), processors.TypicalLogitsWarper(mass)) for mass in (0.2, 0.5, 0.9)),
      *((Sampling(eta_cutoff=cutoff), processors.EtaLogitsWarper(cutoff)) for cutoff in (0.01, 0.1, 0.6))]
  for sampling, processor in cases:
    logits = rng.normal(0, 2, (1, V)).astype('f4')
    np.testing.assert_allclose(processed(logits, [sampling], TEXT, WRITTEN), processor(text, torch.tensor(logits)),
                               rtol=1e-6, err_msg=str(sampling))


@pytest.mark.parametrize(('name', 'value', 'allowed'), [
    ('presence_penalty', 2.5, 'between -2 and 2'), ('frequency_penalty', -3, 'between -2 and 2'),
    ('min_tokens', -1, '0'), ('logit_bias', ((1, 101.),), 'from -100 to 100'), ('bad_words', ((),), '1 to 8 ids'),
    ('stop_ids', tuple(range(17)), 'at most 16')])
def test_a_bad_value_is_named(name, value, allowed):
  with pytest.raises(ValueError, match=f'{name}=.*{allowed}'):
    Sampling(**{name: value})
