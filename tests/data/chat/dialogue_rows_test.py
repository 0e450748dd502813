"""Dialogues are packed into rows, each once an epoch; those that are too long are left out, and counted."""
import re
import time

import numpy as np
import pytest
from helpers.dialogues import USER, opened
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lm.data.batch import Batch
from lm.data.chat import dialogues
from lm.objectives.supervised import supervised


def test_dialogues_without_answers_are_dropped_and_too_long_ones_left_out_with_a_warning(tmp_path):
  rows = [{'messages': [USER('a')]}, {'prompt': 'b', 'completion': 'c'}, {'prompt': 'd' * 90, 'completion': 'e'}]
  data, lines = opened(tmp_path, rows, allow_left_out=True)
  assert any('dropped: 1 no tokens' in line for line in lines) and len(data.records('train')) == 2
  batches = data.batches('train', supervised(), rows=2)
  assert batches.rows_per_epoch == 1 and lines[-1].startswith('warning: train: 1 of 2 records are left out')
  with pytest.raises(ValueError, match='none of 1 records fits a row of 64'):
    opened(tmp_path / 'b', rows[2:])[0].batches('train', supervised(), rows=2)


@pytest.mark.parametrize('long, outcome', [(9, 'told'), (10, 'warned'), (49, 'warned'), (50, 'refused')])
def test_the_share_of_records_that_are_too_long_is_reported_warned_of_or_refused(tmp_path, long, outcome):
  records = [{'prompt': f'{i:03}' + 'd' * (100 + i if i < long else 0), 'completion': 'e'} for i in range(100)]
  data, lines = opened(tmp_path, records)
  if outcome == 'refused':
    with pytest.raises(ValueError, match='train: 50 of 100 records .* give --allow_left_out') as error:
      data.batches('train', supervised(), rows=2)
    lines.append(str(error.value))
    data, lines_allowed = opened(tmp_path, records, allow_left_out=True)
    assert data.batches('train', supervised(), rows=2).left_out == 50 and 'warning' in lines_allowed[-1]
  else:
    assert data.batches('train', supervised(), rows=2).left_out == long
    assert lines[-1].startswith('warning: ') == (outcome == 'warned')
  if outcome != 'told':   # the advised lengths keep the share that the message says
    for share, length in zip((0.9, 0.99), re.findall(r'--length=(\d+)', lines[-1])):
      count = 100 - opened(tmp_path, records, length=int(length))[0].batches('train', supervised(), rows=2).left_out
      assert count >= 100 * share


@pytest.mark.parametrize('longest', [64, 110, 125, 160, 400])
@pytest.mark.parametrize('length', [16, 64])
def test_the_advised_length_is_at_most_the_models(tmp_path, length, longest):
  records = [{'prompt': f'{i:03}' + 'd' * i, 'completion': 'e'} for i in range(100)]
  fitting = lambda length: sum(opened(tmp_path, records)[0].records('train').positions <= length)
  with pytest.raises(ValueError) as error:   # also where no record fits at all
    data, lines = opened(tmp_path, records, length=length, longest=longest)
    data.batches('train', supervised(), rows=2)
    raise ValueError(*[line for line in lines if 'left out' in line])
  advised = [(int(length), int(percent)) for length, percent in
             re.findall(r'--length=(\d+)[^%]* keeps (\d+) %', str(error.value))]
  assert all(length < n <= longest and percent <= fitting(n) for n, percent in advised)
  assert bool(advised) != ('too short for this data' in str(error.value))
  if longest > length:   # otherwise no length helps
    assert advised[-1][1] == min(fitting(longest), 99)


records = st.lists(st.tuples(st.text('abc', max_size=20), st.text('abc', max_size=20)), min_size=1, max_size=25,
                   unique=True)


def open_rows(rows, tmp) -> dialogues.OpenDialogues:
  """Returns the opened data of these records."""
  return opened(tmp, [{'prompt': f'{i} {p}', 'completion': c} for i, (p, c) in enumerate(rows)], length=40)[0]


# Prompt and answer of n letters take n + 6 positions. There are full rows of one and of two records, and some too
# long by one.
EDGES = [('a' * 17, 'b' * n) for n in (17, 16, 18)] + [(a * 7, b * 7) for a in 'abc' for b in 'abc'] + [('', '')]


@given(rows=records, size=st.integers(1, 4), seed=st.sampled_from([None, 0, 7]))
@example(rows=EDGES, size=1, seed=None)
@example(rows=EDGES, size=4, seed=7)
@example(rows=EDGES[:1], size=2, seed=0)
@settings(max_examples=25, deadline=None)
def test_an_epoch_has_each_record_once_and_hosts_the_same_bytes(rows, size, seed, tmp_path_factory):
  data = open_rows(rows, tmp_path_factory.mktemp('made'))
  assume((data.records('train').positions <= 40).any())
  batches = data.batches('train', supervised(), 2 * size, seed, repeat=False)
  dialogues_read = []
  for step in range(batches.steps_per_epoch):
    batch = batches(step)
    again, halves = batches(step), [batches(step, range(size)), batches(step, range(size, 2 * size))]
    for a, b, *parts in zip(batch[:5], again[:5], halves[0][:5], halves[1][:5]):
      assert np.array_equal(a, b) and np.array_equal(a, np.concatenate(parts))
    dialogues_read += pieces(batch)
  fitting = [data.records('train')[i] for i in np.flatnonzero(data.records('train').positions <= 40)]
  assert sorted(dialogues_read) == sorted((x.tokens.tolist(), x.loss_mask[1:].tolist()) for x in fitting)


def pieces(batch: Batch) -> list[tuple[list[int], list[bool]]]:
  """Returns (tokens with the last target, mask of weights) of each segment of a batch."""
  parts = []
  for tokens, targets, weights, positions, segments in zip(*batch[:5]):
    for segment in range(1, segments.max() + 1):
      inside = segments == segment
      assert positions[inside].tolist() == list(range(inside.sum()))
      assert tokens[inside][1:].tolist() == targets[inside][:-1].tolist()
      parts.append(([*tokens[inside].tolist(), int(targets[inside][-1])], (weights[inside] == 1).tolist()))
    assert not weights[segments == 0].any()
  return parts


@pytest.mark.slow
def test_a_million_tokens_a_second_are_packed(tmp_path):
  data, _ = opened(tmp_path, [{'prompt': f'{i}' * 20, 'completion': 'abc ' * 50} for i in range(4000)], length=2048)
  batches = data.batches('train', supervised(), rows=16)
  batches(0)
  start = time.process_time()
  tokens = sum(int((batches(step).segments > 0).sum()) for step in range(20))
  assert tokens / (time.process_time() - start) > 1e6
