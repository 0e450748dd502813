"""Fill-in-the-middle permutes documents or pieces at its rate, and the permutation can be undone."""
import collections
import math

import numpy as np
import pytest
from helpers.documents import documents, same
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import tokenizers
from lm.data.batch import Special, special
from lm.data.rows.packed_documents import Stream
from lm.objectives import infill, next_token

BEGIN, END = 0, 1
PRE, SUF, MID = IDS = (3000, 3001, 3002)
SPECIAL = Special(BEGIN, END, 2000, IDS)
TEXT = 'def naïve(text):\n  return [c for c in text if c not in "äöü€"]  # 你好, 世界\n'


def examples(objective, piece, times, special_tokens=SPECIAL):
  rng = np.random.default_rng(0)
  return [objective.forms[0].example(np.asarray(piece, np.int32), rng, special_tokens) for _ in range(times)]


def whole(example):
  """Returns the tokens and the last target of an example, after checking that targets are the next tokens."""
  np.testing.assert_array_equal(example.tokens[1:], example.targets[:-1])
  assert example.weights.all() and example.bidirectional is None
  return np.append(example.tokens, example.targets[-1])


def within(count, total, share):
  return abs(count - total * share) <= 5 * math.sqrt(total * share * (1 - share))


@pytest.mark.parametrize('spm, expected', [
    (False, [PRE, 10, 11, SUF, 14, MID, 12, 13]), (True, [PRE, SUF, 14, MID, 10, 11, 12, 13])])
def test_arrangements_of_the_paper(spm, expected):
  parts = np.split(np.arange(10, 15), (2, 4))
  row = infill.arrange(tuple(parts), IDS, spm)
  assert row.tolist() == expected and row.dtype == np.int32
  assert infill.restore(row, IDS).tolist() == list(range(10, 15))


@pytest.mark.parametrize('ending', [[END], [999]], ids=['end', 'ahead'])
def test_a_permuted_piece_can_be_restored(ending):
  counts = collections.Counter()
  for example in examples(infill.infill(0.75, 0.3), [BEGIN, *range(10, 30), *ending], 2000):
    row = whole(example)
    if PRE not in row:
      np.testing.assert_array_equal(row, [BEGIN, *range(10, 30), *ending])   # as next-token prediction has it
      counts['plain'] += 1
      continue
    assert row[0] == BEGIN and row[-1] == END and len(row) == 20 + 5
    np.testing.assert_array_equal(infill.restore(row[1:-1], IDS), range(10, 30))
    counts['spm' if row[2] == SUF else 'psm'] += 1
    counts['both'] += row[2] == SUF and row[-2] != 29   # not a PSM without a prefix
  assert within(counts['plain'], 2000, 0.25)
  # PSM with an empty prefix looks like SPM: about 1 cut of 21 in both draws.
  share = 0.3 + 0.7 * (1 - (20 / 21) ** 2)
  assert within(counts['spm'], counts['spm'] + counts['psm'], share)


def test_cuts_are_uniform():
  rng, counts = np.random.default_rng(0), collections.Counter()
  for _ in range(5000):
    parts = infill.at_tokens(np.arange(3), rng, SPECIAL)
    np.testing.assert_array_equal(np.concatenate(parts), np.arange(3))
    counts[tuple(map(len, parts))] += 1
  assert len(counts) == 10   # two of 4 places: 4 pairs of equal places, 6 pairs in either order
  assert all(within(n, 5000, 1 / 16 if size[1] == 0 else 1 / 8) for size, n in counts.items())


def test_without_permutation_it_is_next_token_prediction():
  ours, theirs = infill.infill(0.), next_token.next_token()
  assert ours.forms[0].room == theirs.forms[0].room
  store = documents([9, 0, 33])
  assert same(*(Stream(o, SPECIAL, 8, 4, store=store)(1) for o in (ours, theirs)))


def test_the_document_level_permutes_whole_documents_alone():
  objective = infill.infill(1., level=infill.document_level)
  for piece, permuted in (([BEGIN, 7, 8, 9, END], True), ([BEGIN, 7, 8, 9], False), ([7, 8, 9, END], False)):
    assert all((PRE in example.tokens) == permuted for example in examples(objective, piece, 20))


def test_a_fourth_token_ends_the_middle():
  objective = infill.infill(1., names=('p', 's', 'm', 'e'))
  example, = examples(objective, [BEGIN, 7, 8, END], 1, Special(BEGIN, END, 2000, (*IDS, 3003)))
  assert example.targets[-1] == 3003


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=9), length=st.integers(5, 40), rows=st.integers(1, 7),
       seed=st.sampled_from([None, 0, 5]))
def test_every_token_of_an_epoch_is_in_one_example(sizes, length, rows, seed):
  store = documents(sizes)
  make = lambda: Stream(infill.infill(1.), SPECIAL, length, rows, seed, False, store=store)
  batches, counts = make(), collections.Counter()
  for step in range(batches.steps_per_epoch):
    batch = batches(step)
    assert same(make()(step), batch)
    for tokens, segments in zip(batch.tokens, batch.segments):
      for segment in range(1, segments.max() + 1):
        counts.update(tokens[segments == segment].tolist())
  assert {t: n for t, n in counts.items() if 1 < t < PRE} == dict.fromkeys(store.tokens.tolist(), 1)


@pytest.fixture(scope='module', params=['bytes', 'pieces'])
def tokens(request):
  if request.param == 'bytes':
    return tokenizers.Bytes()
  return tokenizers.train_sentencepiece([TEXT * 20], 360, control=infill.NAMES)


def test_cuts_between_characters_keep_the_text(tokens):
  objective = infill.infill(1., split=infill.at_characters)
  special_tokens, ids = special(tokens, objective.control), tokens.encode(TEXT * 2)
  inside = 0
  for example in examples(objective, [special_tokens.bos, *ids, special_tokens.eos], 200, special_tokens):
    row = whole(example)
    assert len(row) <= len(ids) + 5 + infill.SLACK
    assert tokens.decode(infill.restore(row[1:-1], special_tokens.control)) == TEXT * 2
    parts = np.split(row[1:-1], np.flatnonzero(np.isin(row[1:-1], special_tokens.control)))[1:]
    assert not any('\ufffd' in tokens.decode(part) for part in parts)   # bytes of a character stay together
    inside += not np.array_equal(infill.restore(row[1:-1], special_tokens.control), ids)
  assert (inside > 50) == isinstance(tokens, tokenizers.SentencePiece)   # a byte cannot be cut


def test_a_piece_that_begins_inside_a_character_is_cut_between_tokens():
  tokens = tokenizers.Bytes()
  special_tokens, ids = special(tokens, infill.NAMES), tokens.encode('ü' * 9)[1:]
  for _ in range(9):
    parts = infill.at_characters(ids, np.random.default_rng(0), special_tokens)
    np.testing.assert_array_equal(np.concatenate(parts), ids)


def test_a_prompt_is_the_beginning_of_an_example(tokens):
  special_tokens = special(tokens, infill.NAMES)
  for spm in (False, True):
    prompt = infill.prompt(tokens, 'def naïve(te', '):\n', spm=spm)
    parts = [tokens.encode(text) for text in ('def naïve(te', 'xt', '):\n')]
    row = infill.arrange(tuple(parts), special_tokens.control, spm)
    np.testing.assert_array_equal(row[:len(prompt)], prompt)
    np.testing.assert_array_equal(row[len(prompt):], tokens.encode('xt'))
