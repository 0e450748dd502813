"""A mixture holds its shares of tokens in every prefix, repeats sources, and validates on the held-out text of all
once.
"""
import dataclasses
import fractions
import itertools

import numpy as np
import pytest
from helpers.documents import SPECIAL, documents, pairs_in, pairs_of, stacked
from helpers.runs import RUN, go
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import dataset, store
from lm.data.batch import Form, Room
from lm.data.encoding import TextEncoder
from lm.data.rows.packed_documents import Stream
from lm.data.text import corpora
from lm.data.text.mixture import Mixed, SourceOrder, mixture
from lm.data.text.source import Mixing, Source, sample
from lm.data.tokenizers.folder import Bytes
from lm.objectives.next_token import next_token
from lm.objectives.objective import token_objective

BYTES = Bytes()


def lettered(name, sizes, split='train', **others) -> Source:
  """Returns a source of documents of one letter, of these sizes in bytes, each with its number in front."""
  return Source(name, {split: [f'{i}'.ljust(n, name) for i, n in enumerate(sizes)], **others}, f'print of {name}')


def mixed_rows(sizes, weights, length=8, rows=4, seed=0, objective=None, repeat=True) -> Mixed:
  """Returns rows of documents of these sizes, by source. Token ids of source i equal i modulo the number of sources."""
  parts = [documents(own) for own in sizes]
  for i, part in enumerate(parts):
    part.tokens[:] = part.tokens * np.uint16(len(sizes)) + np.uint16(i)
  mixing = Mixing(tuple(lettered(chr(97 + i), own) for i, own in enumerate(sizes)), tuple(weights), repeat)
  basis = (objective or next_token(), SPECIAL, length, rows, seed)
  return Mixed(*basis, mixing=mixing, streams=tuple(Stream(*basis, store=part) for part in parts))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=6), st.integers(1, 400))
@settings(max_examples=100, deadline=None)
def test_turns_are_exact_at_every_prefix_and_at_random(weights, rows):
  turns, given_rows = SourceOrder(weights), [0] * len(weights)
  for n in range(rows):
    which, rank = turns(n)
    assert rank == given_rows[which]
    given_rows[which] += 1
    assert all(abs(count - fractions.Fraction((n + 1) * weight, sum(weights))) < 1
               for count, weight in zip(given_rows, weights))
  assert SourceOrder(weights)(rows - 1) == (which, rank) and SourceOrder(weights).counts(rows) == given_rows


def test_one_in_a_thousand_is_one_in_a_thousand():
  mixing = mixture([(lettered('a', [5]), 0.001), (lettered('b', [5]), 0.999)]).mixing
  turns = SourceOrder(mixing.weights)
  assert mixing.weights == (1, 999)
  assert turns.counts(1000) == [1, 999] and turns.counts(10**9) == [10**6, 999 * 10**6]
  assert mixture([(lettered('a', [5]), 1 / 3), (lettered('b', [5]), 2 / 3)]).mixing.weights == (1, 2)


@given(sizes=st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=6), min_size=2, max_size=3), data=st.data(),
       length=st.integers(2, 12), seed=st.sampled_from([None, 0, 5]))
@settings(max_examples=60, deadline=None)
def test_shares_are_of_tokens_in_every_prefix(sizes, data, length, seed):
  weights = data.draw(st.lists(st.integers(1, 20), min_size=len(sizes), max_size=len(sizes)))
  batches = mixed_rows(sizes, weights, length, seed=seed)
  tokens = [0] * len(sizes)
  for n in range(60):
    batch = batches(0, range(n, n + 1))
    assert batch.weights.all(), 'every row is full, at the ends of epochs too'
    which = batches._source_order(n)[0]
    assert all(target % len(sizes) == which for target in batch.targets[0] if target > 1)
    tokens[which] += length
    assert all(abs(count - fractions.Fraction(sum(tokens) * weight, sum(weights))) < length
               for count, weight in zip(tokens, weights))


def test_a_source_that_ends_begins_anew_with_each_target_once_an_epoch():
  batches = mixed_rows([[5, 9, 14], [300, 40]], [1, 1], length=8)
  small = batches.streams[0]
  size = small._size
  together = size // np.gcd(size, 8) * small._rounds_per_window   # rows after which windows and epochs end together
  rows = [n for n in range(2 * int(together) + 2) if batches._source_order(n)[0] == 0][:int(together)]
  pairs = sum((pairs_in(batches(0, range(n, n + 1))) for n in rows), start=type(pairs_of(small.store))())
  epochs = len(rows) * 8 // size
  assert epochs > 2 and pairs == {pair: epochs * count for pair, count in pairs_of(small.store).items()}


def test_batches_are_a_function_of_the_step_alone():
  batches, again = (mixed_rows([[5, 9, 14], [300, 40]], [3, 7]) for _ in range(2))
  whole = {step: batches(step) for step in (0, 1, 2, 9, 30)}
  for step in (30, 2, 9, 0, 1):
    parts = stacked(lambda rows, step=step: again(step, rows), [range(1), range(1, 4)])
    assert all(a is b or np.array_equal(a, b) for a, b in zip(whole[step], parts))
  other = mixed_rows([[5, 9, 14], [300, 40]], [3, 7], seed=1)
  assert any(not np.array_equal(whole[step].tokens, other(step).tokens) for step in whole)


def test_forms_take_turns_within_each_source():
  def form(ratio):
    return Form(next_token().forms[0].example, Room(ratio), True)

  objective = token_objective(form(1.), form(2.))
  batches = mixed_rows([[50, 30], [60]], [1, 2], objective=objective)
  counts = [[], []]
  for n in range(60):
    counts[batches._source_order(n)[0]].append(int((batches(0, range(n, n + 1)).segments > 0).sum()))
  assert all(own == [8, 4] * (len(own) // 2) + [8] * (len(own) % 2) for own in counts)


def held_out(name, sizes, others) -> Source:
  return lettered(name, sizes, validation=[f'{name} held out {i}' for i in range(others)])


@pytest.fixture
def novels_and_poems():
  return held_out('n', [4000, 3000], 1), held_out('p', [40] * 50, 3)


def opened(tmp_path, source, length=32):
  return dataset.Text(source, BYTES, length, rules=()).open(tmp_path, lambda line: None)


def test_large_documents_do_not_crowd_out_small_ones(tmp_path, novels_and_poems):
  """If documents were counted, the mixture would end with the second novel and four poems."""
  data = opened(tmp_path, mixture(list(zip(novels_and_poems, (0.3, 0.7)))))
  batches = data.batches('train', next_token(), 10)
  targets = np.concatenate([batches(step).targets.ravel() for step in range(10)])
  text = BYTES.decode(targets[targets > 1])
  assert text.count('n') / (text.count('n') + text.count('p')) == pytest.approx(0.3, abs=0.02)
  assert sum(f'{i}p' in text for i in range(50)) > 40, 'but for numbers that rows cut, every poem is read'
  poems = batches.summary(100)[1]
  assert poems == 'p: 50 documents, 2,000 tokens, 0.7 of what is read, 1.09 epochs in this run'
  validation = data.batches('validation', next_token(), 4, seed=None, repeat=False)
  assert sum(int(validation(step).weights.sum()) for step in range(validation.steps_per_epoch)) == sum(
      len(text) + 1 for source in novels_and_poems for text in source.splits['validation'])


def test_weights_are_part_of_the_data_but_not_of_the_store(tmp_path, novels_and_poems):
  even, other = (mixture(list(zip(novels_and_poems, weights))) for weights in ((1, 1), (1, 3)))
  first = opened(tmp_path, even)
  second = opened(tmp_path, other)   # the stored tokens are used
  assert even.fingerprint == other.fingerprint and first.fingerprint != second.fingerprint
  checked = []
  dataset.Text(other, BYTES, 32, rules=()).open(tmp_path, print, check=lambda data, _: checked.append(data))
  assert set(checked) == {second.fingerprint}, 'known before anything is tokenised'
  assert opened(tmp_path / 'even', mixture(list(zip(novels_and_poems, (2, 2))))).fingerprint == first.fingerprint


def test_without_repeating_training_stops_where_the_first_source_ends(tmp_path, novels_and_poems, capsys):
  once = mixture(list(zip(novels_and_poems, (0.3, 0.7))), repeat=False)
  rows, name = opened(tmp_path, once).batches('train', next_token(), 10).end()
  assert 90 <= rows < 100 and name == 'p'
  again = mixture(list(zip(novels_and_poems, (0.3, 0.7))))
  assert opened(tmp_path / 'again', again).batches('train', next_token(), 10).end() is None
  run = dataclasses.replace(RUN, data=dataset.Text(once, BYTES, 32, rules=()), batch=8, steps=20, evaluate_every=50,
                            save_every=50, model=dataclasses.replace(RUN.model, vocab=BYTES.vocab_size))
  result = go(tmp_path / 'run', run)
  assert result.finished and result.step == rows // 8
  assert f'training stops at step {rows // 8} of 20, where p ends' in capsys.readouterr().out
  assert go(tmp_path / 'run', run).start == rows // 8   # the run is finished
  with pytest.raises(ValueError, match='p has too little text for one step of 800 rows'):
    go(tmp_path / 'large', dataclasses.replace(run, batch=800))


def test_a_weight_of_zero_leaves_a_source_out_and_weights_are_checked(novels_and_poems):
  novels, poems = novels_and_poems
  assert mixture([(novels, 0), (poems, 0.2)]) is poems
  third = lettered('c', [3])
  assert mixture([(novels, 1), (poems, 0), (third, 1)]).mixing.sources == (novels, third)
  for weights in ((0, 0), (-1, 1), (float('nan'), 1), (float('inf'), 1)):
    with pytest.raises(ValueError, match='must be 0 or positive'):
      mixture(list(zip(novels_and_poems, weights)))
  assert mixture([(novels, 1e-13), (poems, 1)]).mixing.weights == (1, 10 ** 6)   # no period is longer than that
  assert mixture([(novels, 0.61803398875), (poems, 0.38196601125)]).mixing.weights == (309017, 190983)
  assert mixture([(novels, 0.3), (poems, 0.7)]).mixing.weights == (3, 7)


def test_mixtures_of_mixtures_keep_their_shares_and_their_common_splits(novels_and_poems):
  third = lettered('c', [3])
  nested = mixture([(mixture(list(zip(novels_and_poems, (1, 3)))), 1), (third, 1)])
  assert nested.mixing.weights == (1, 3, 4) and nested.mixing.sources == (*novels_and_poems, third)
  assert list(nested.splits) == ['train'] and len(nested.splits['train']) == 53
  assert nested.splits['train'][-1] == third.splits['train'][0]
  with pytest.raises(ValueError, match='is a mixture, whose weights are not kept'):
    len(sample(nested, 3).splits['train'])


def test_a_mixture_reports_the_notes_of_its_sources(tmp_path):
  for name, text in (('a', b'good'), ('b', b'bad \xff')):
    (tmp_path / f'{name}.txt').write_bytes(text)
  bad = corpora.text(str(tmp_path / '*.txt'), validation=0, encoding_errors='replace')
  mixed = mixture([(lettered('s', [3, 4]), 1), (bad, 1)])
  assert len(mixed.splits['train']) == 4 and mixed.counts == {'invalid UTF-8 repaired': 1}


def test_a_source_all_of_whose_documents_are_in_another_is_refused(tmp_path):
  same = lettered('s', [30, 40])
  data = opened(tmp_path, mixture([(same, 1), (Source('twin', dict(same.splits), 'other'), 1)]))
  with pytest.raises(ValueError, match='twin: no document of it is in train'):
    data.batches('train', next_token(), 2)


def test_a_build_that_is_killed_between_sources_goes_on(tmp_path, monkeypatch, novels_and_poems):
  mixed = mixture(list(zip(novels_and_poems, (1, 1))))
  whole = [[part.offsets.tolist() for part in stored.parts()] for stored in
           store.build(tmp_path / 'whole', mixed, TextEncoder(BYTES), ()).values()]
  append = store._Build._append
  for kill in itertools.count(1):
    calls = itertools.count(1)

    def dying(build, *args, calls=calls, kill=kill):
      if next(calls) == kill:
        raise KeyboardInterrupt
      append(build, *args)
    monkeypatch.setattr(store._Build, '_append', dying)
    try:
      store.build(tmp_path / f'{kill}', mixed, TextEncoder(BYTES), ())
      break
    except KeyboardInterrupt:
      monkeypatch.setattr(store._Build, '_append', append)
    stores = store.build(tmp_path / f'{kill}', mixed, TextEncoder(BYTES), ())
    assert [[part.offsets.tolist() for part in stored.parts()] for stored in stores.values()] == whole
  assert kill == 5
