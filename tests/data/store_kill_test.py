"""A store whose build is killed at any write, and then continued, has the bytes of an uninterrupted build."""
import functools
import itertools
import json
import os

import numpy as np
import pytest
from helpers.stores import BYTES, SOURCE, Counted, Wide, build, contents, quiet, small_groups  # noqa: F401

from lm.data import store
from lm.data.text.source import Source

SHORT = [f'short {i}' for i in range(6)]             # `Wide` gives no tokens for these
LONG = [f'a longer document {i}' for i in range(6)]


class Killed(BaseException):
  pass


def die_at(n, calls, function, *args):
  if next(calls) == n:
    raise Killed
  return function(*args)


def is_killed(n, monkeypatch, build):
  """Builds a store up to its write number n, and returns whether there was such a write."""
  calls = itertools.count()
  with monkeypatch.context() as patch:
    for name in ('fsync', 'replace'):
      patch.setattr(os, name, functools.partial(die_at, n, calls, getattr(os, name)))
    try:
      build()
    except Killed:
      return True
  return False


def kill_at_any_write(tmp_path, monkeypatch, build):
  """Builds a store killed at write n and then continued, for each n; returns the number of writes."""
  monkeypatch.setattr(os, 'fsync', lambda file: None)   # the process dies, the machine does not
  build(tmp_path / 'whole')
  n = 0
  while is_killed(n, monkeypatch, functools.partial(build, folder := tmp_path / str(n))):
    assert not (folder / 'manifest.json').exists()
    with pytest.raises(FileNotFoundError, match='no finished store'):
      store.Store(folder, 'train')
    build(folder)
    assert contents(folder) == contents(tmp_path / 'whole'), n
    n += 1
  return n


def test_a_build_killed_at_any_write_ends_in_the_same_bytes(tmp_path, monkeypatch):
  assert kill_at_any_write(tmp_path, monkeypatch, functools.partial(build, source=SOURCE, tokenizer=BYTES)) > 20


def test_columns_survive_a_kill(tmp_path, monkeypatch):
  encoder = Counted()
  assert kill_at_any_write(tmp_path, monkeypatch, lambda folder: store.build(
      folder, SOURCE, encoder, progress=quiet)) > 20
  for split in SOURCE.splits:
    stored = store.Store(tmp_path / 'whole', split)
    lengths = [len(stored[i]) for i in range(len(stored))]
    assert stored.columns['length'].tolist() == lengths
    assert stored.columns['place'].tolist() == [place for length in lengths for place in range(length)]
  for name in ('place.bin', 'length.bin'):
    path = tmp_path / 'whole/train' / name
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(ValueError, match=f'{name} has {len(data) - 1} bytes, and {len(data)} were written: delete'):
      store.Store(tmp_path / 'whole', 'train')
    path.write_bytes(data[:-1] + b'\xff')
    with pytest.raises(ValueError, match=f'train/{name} is not as it was written'):
      store.verify(tmp_path / 'whole')
    path.write_bytes(data)


@pytest.mark.parametrize('seed', range(3))
def test_duplicates_are_dropped_across_a_kill(tmp_path, monkeypatch, seed):
  """The documents are empty ones, others, and repetitions of both, in any order and across splits."""
  rng = np.random.default_rng(seed)
  draw = lambda count: rng.choice([*SHORT, *LONG], count).tolist()
  # The second group of train repeats documents around one without tokens in the first group.
  train = [SHORT[0], LONG[0], SHORT[1], LONG[1], LONG[2], LONG[2], LONG[1], SHORT[0], *draw(9)]
  source = Source('toy', {'train': train, 'validation': [SHORT[2], LONG[3], *draw(5)]}, str(seed))
  assert kill_at_any_write(tmp_path, monkeypatch, functools.partial(build, source=source, tokenizer=Wide())) > 20
  counts = json.loads((tmp_path / 'whole/manifest.json').read_text())['splits']
  assert sum(split['documents'] for split in counts.values()) <= len(LONG)   # each once in all splits
  assert all(counts['train']['dropped'][reason] >= 2 for reason in ('no tokens', 'duplicate'))
