"""Prefix, masked, span-corruption and UL2 objectives follow their papers, and leak nothing in packed rows."""
import collections
import itertools
import math

import numpy as np
import pytest
from helpers.documents import documents, same
from hypothesis import given, settings
from hypothesis import strategies as st

from lm.data import tokenizers
from lm.data.batch import Batch, Special, special, template
from lm.data.rows.packed_documents import Stream
from lm.objectives import infill, masked, prefix, span_corruption, ul2
from lm.objectives.span_corruption import DECODER, ENCODER_DECODER

BEGIN, END, FIRST = 0, 1, 3000   # control tokens are from FIRST on
NAMES = tokenizers.sentinels(100)


def special_of(objective) -> Special:
  return Special(BEGIN, END, 2000, tuple(range(FIRST, FIRST + len(objective.control))))


def draws(objective, tokens, times=1, form=0):
  rng = np.random.default_rng(0)
  return [objective.forms[form].example(np.asarray(tokens, np.int32), rng, special_of(objective)) for _ in range(times)]


def within(count, total, share):
  """Returns whether a count lies within five standard deviations of a binomial."""
  return abs(count - total * share) <= 5 * math.sqrt(total * share * (1 - share))


@pytest.mark.parametrize('tokens, density, mean, expected', [
    (568, 0.15, 3, (512, 114)), (1137, 0.15, 3, (1024, 229)),   # T5's own, for sources of 512 and 1024
    (100, 0.15, 3, (91, 21)), (10, 0.15, 3, (10, 4)), (2, 0.15, 3, (3, 3)), (56, 0.15, 3, (52, 12)),
    (512, 0.5, 3, (342, 342)), (512, 0.15, 64, (437, 79)), (512, 0.5, 8, (289, 289))])
def test_lengths_are_those_of_t5(tokens, density, mean, expected):
  assert span_corruption.lengths(tokens, density, mean) == expected
  objective = span_corruption.span_corruption(density, mean, sentinels=NAMES)
  example, = draws(objective, np.arange(10, 10 + tokens))
  assert (len(example.source), len(example.tokens)) == expected


def test_a_source_of_512_is_made_of_568_tokens():
  assert span_corruption.raw_length(512) == 568
  assert span_corruption.raw_length(1024) == 1137


def test_all_ways_to_cut_the_noise_are_equally_likely():
  """8 tokens, 4 of them noise, in 2 spans: 3 ways to cut the noise times 3 to cut the other tokens."""
  rng = np.random.default_rng(0)
  counts = collections.Counter(span_corruption.noise_mask(8, 0.5, 2, rng).tobytes() for _ in range(4500))
  ways = itertools.product((1, 2, 3), repeat=2)
  allowed = {np.repeat([False, True, False, True], [a, b, 4 - a, 4 - b]).tobytes() for a, b in ways}
  assert counts.keys() == allowed and all(within(n, 4500, 1 / 9) for n in counts.values())


@settings(max_examples=200, deadline=None)
@given(tokens=st.integers(1, 200), density=st.floats(0.01, 0.99), mean=st.floats(1, 70), seed=st.integers(0, 99))
def test_noise_has_the_announced_counts(tokens, density, mean, seed):
  mask = span_corruption.noise_mask(tokens, density, mean, np.random.default_rng(seed))
  noise, spans = span_corruption.counts(tokens, density, mean)
  assert len(mask) == tokens and mask.sum() == noise and np.sum(np.diff(mask, prepend=False) & mask) == spans
  assert mask[-1] and (tokens == 1 or not mask[0])
  room = span_corruption.random_spans(density, mean)
  for (ratio, extra), size in ((room.source, tokens - noise + spans), (room.targets, noise + spans),
                               (room.both, tokens + 2 * spans)):
    assert size <= ratio * tokens + extra + 1e-6


def test_the_example_of_the_paper():
  text, words = 'Thank you for inviting me to your party last week', lambda text: text.split(' ')
  hidden = [word in ('for', 'inviting', 'last') for word in words(text)]
  vocabulary = ['<X>', '<Y>', *words(text)]
  ids, control = np.arange(2, 2 + len(hidden)).astype(np.int32), np.arange(2).astype(np.int32)
  source, targets = span_corruption.corrupt(ids, np.array(hidden), control)
  assert [vocabulary[i] for i in source] == words('Thank you <X> me to your party <Y> week')
  assert [vocabulary[i] for i in targets] == words('<X> for inviting <Y> last')


@settings(max_examples=200, deadline=None)
@given(mask=st.lists(st.booleans(), min_size=1, max_size=40))
def test_source_and_targets_together_give_the_text_back(mask):
  ids, control = np.arange(len(mask)).astype(np.int32), np.arange(100, 140).astype(np.int32)
  source, targets = span_corruption.corrupt(ids, np.array(mask), control)
  np.testing.assert_array_equal(span_corruption.fill(source, targets, control), ids)
  assert source.dtype == targets.dtype == np.int32


def test_the_decoder_layout_is_the_pair_in_one_row():
  piece = [BEGIN, *range(10, 20), END]
  both = draws(span_corruption.span_corruption(), piece) + draws(span_corruption.span_corruption(layout=DECODER), piece)
  pair, single = both
  assert pair.source[-1] == pair.targets[-1] == END and pair.tokens[0] == BEGIN
  np.testing.assert_array_equal(pair.tokens[1:], pair.targets[:-1])
  assert pair.weights.all() and pair.bidirectional is None
  count = len(pair.source)   # bos comes first, in place of eos at the end
  np.testing.assert_array_equal(single.tokens, [BEGIN, *pair.source[:-1], *pair.targets[:-1]])
  np.testing.assert_array_equal(single.targets, [*pair.source[:-1], *pair.targets])
  np.testing.assert_array_equal(single.bidirectional, np.arange(len(single.tokens)) < count)
  np.testing.assert_array_equal(single.targets[single.weights > 0], pair.targets)


def test_masks_have_the_proportions_of_bert():
  piece = np.array([BEGIN, *range(100, 300), END])
  examples = draws(masked.masked(), piece, 500)
  kinds, where = collections.Counter(), np.zeros(len(piece))
  for example in examples:
    np.testing.assert_array_equal(example.targets, piece)
    assert set(example.weights) == {0., 1.} and example.weights.sum() == 30 and example.bidirectional.all()
    chosen = example.weights > 0
    np.testing.assert_array_equal(example.tokens[~chosen], piece[~chosen])
    now, was = example.tokens[chosen], piece[chosen]
    kinds.update(np.where(now == FIRST, 'mask', np.where(now == was, 'same', 'random')).tolist())
    where += chosen
  assert not where[0] and not where[-1] and all(within(n, 500, 0.15) for n in where[1:-1])
  total = 30 * 500
  assert kinds.total() == total and within(kinds['mask'], total, 0.8)
  assert within(kinds['random'], total, 0.1 * (1 - 1 / 2000)) and within(kinds['same'], total, 0.1 * (1 + 1 / 2000))
  other = np.concatenate([e.tokens[(e.weights > 0) & (e.tokens != piece) & (e.tokens != FIRST)] for e in examples])
  # Random tokens are uniform over the vocabulary.
  assert abs(other.mean() - 1000) < 5 * 2000 / math.sqrt(12 * len(other))


def test_short_pieces_mask_one_token_and_bos_none():
  assert draws(masked.masked(), [BEGIN, 7])[0].weights.tolist() == [0, 1]
  assert draws(masked.masked(), [BEGIN])[0].weights.tolist() == [0]


def test_prefixes_of_all_lengths_are_equally_likely():
  piece = np.arange(10, 21)
  counts = collections.Counter()
  for example in draws(prefix.prefix(), piece, 2000):
    size = int(example.bidirectional.sum())
    counts[size] += 1
    np.testing.assert_array_equal(example.bidirectional, np.arange(10) < size)
    # The tokens after the prefix, and only those.
    np.testing.assert_array_equal(example.targets[example.weights > 0], piece[size:])
  assert counts.keys() == set(range(1, 11)) and all(within(n, 2000, 0.1) for n in counts.values())


@pytest.mark.parametrize('split, size', [(lambda n, rng: 4, 4), (lambda n, rng: n // 2, 5), (lambda n, rng: 0, 1)])
def test_a_split_function_sets_the_length_of_the_prefix(split, size):
  example, = draws(prefix.prefix(split), range(10, 21))
  assert example.bidirectional.sum() == size and example.weights.sum() == 11 - size


def test_the_denoisers_of_ul2():
  objective, tokens = ul2.ul2(sentinels=NAMES), np.arange(10, 394)
  expected = [(0, .15, 3), (0, .15, 8), (1, .25, None), (2, .5, 3), (2, .5, 8), (2, .15, 64), (2, .5, 64)]
  for form, (mode, density, mean) in enumerate(expected):
    examples = draws(objective, tokens, 200, form)
    assert {int(example.tokens[1]) for example in examples} == {FIRST + 100 + mode}   # bos, mode, source
    targets = np.concatenate([example.targets[example.weights > 0] for example in examples])
    noise, spans = np.sum(targets < FIRST) - 200, np.sum(targets >= FIRST)
    if mean is None:   # one span that ends the text, of uniform length
      assert spans == 200 and abs(noise / 200 / 384 - density) < 5 * 0.5 / math.sqrt(12 * 200)
      assert all(example.targets[-2] == tokens[-1] for example in examples)
      assert 0.45 < max(example.weights.sum() - 2 for example in examples) / 384 <= 0.5
    else:
      assert abs(noise / 200 / 384 - density) < 0.01 and abs(noise / spans - mean) < 0.12 * mean


@pytest.mark.parametrize('layout, source', [(DECODER, None), (ENCODER_DECODER, 64)])
def test_rows_take_turns_in_the_denoisers(layout, source):
  objective = ul2.ul2(layout=layout, sentinels=NAMES)
  batch = Stream(objective, special_of(objective), 64, 14, None, source_length=source, store=documents([4000]))(0)
  modes = batch.tokens[:, 1] if source is None else batch.source[:, 0]
  assert (modes - FIRST - 100).tolist() == [0, 0, 1, 2, 2, 2, 2] * 2


def bodies(batch: Batch, objective) -> list[list[int]]:
  """Returns the tokens of which each segment was made, without bos and eos."""
  control, texts = np.arange(FIRST, FIRST + 1000), []
  for row in range(len(batch.tokens)):
    for segment in range(1, batch.segments[row].max() + 1):
      inside = batch.segments[row] == segment
      targets = batch.targets[row, inside]
      if objective.control == ('<|mask|>',):
        text = targets
      else:
        predicted = targets[batch.weights[row, inside] > 0]
        source = (batch.tokens[row, inside & batch.bidirectional[row]] if batch.source is None
                  else batch.source[row, batch.source_segments[row] == segment])
        source = source[source < FIRST + 100]   # without the token of the mode
        assert predicted[-1] == END and (source[0] == BEGIN if batch.source is None else source[-1] == END)
        text = span_corruption.fill(source, predicted, control)
      texts.append([int(token) for token in text if token not in (BEGIN, END)])
  return texts


OBJECTIVES = {'masked': (masked.masked(), None),
              'spans, decoder': (span_corruption.span_corruption(layout=DECODER, sentinels=NAMES), None),
              'spans': (span_corruption.span_corruption(sentinels=NAMES), 1.),
              'ul2, decoder': (ul2.ul2(sentinels=NAMES), None),
              'ul2': (ul2.ul2(layout=ENCODER_DECODER, sentinels=NAMES), 1.2)}


@pytest.mark.parametrize('name', OBJECTIVES)
@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=9), length=st.integers(7, 40), rows=st.integers(1, 7),
       seed=st.sampled_from([None, 0, 5]))
def test_every_token_of_an_epoch_is_read_once(name, sizes, length, rows, seed):
  objective, ratio = OBJECTIVES[name]
  store = documents(sizes)
  make = lambda repeat=False: Stream(objective, special_of(objective), length, rows, seed, repeat, store=store,
                                     source_length=ratio and math.ceil(length * ratio))
  batches = make()
  counts = collections.Counter()
  for step in range(batches.steps_per_epoch):
    batch = batches(step)
    parts = bodies(batch, objective)
    assert not any(b - a != 1 for part in parts for a, b in itertools.pairwise(part))   # consecutive, of one document
    counts.update(itertools.chain(*parts))
    assert same(make()(step), batch)
    assert same(Batch(*(x if x is None else x[1:] for x in batch)), batches(step, range(1, rows)))
  assert counts == collections.Counter(store.tokens.tolist())
  assert not batches(batches.steps_per_epoch).segments.any()


def test_rows_are_nearly_full():
  store = documents([400] * 40)
  for objective, least in ((OBJECTIVES['masked'][0], 1), (OBJECTIVES['spans, decoder'][0], 0.97),
                           (OBJECTIVES['ul2, decoder'][0], 0.96), (infill.infill(), 0.97)):
    special = special_of(objective)._replace(vocab=2 + 400 * 40)
    batches = Stream(objective, special, 256, 4, None, store=store)
    assert np.mean([(batches(step).segments > 0).mean() for step in range(batches.steps_per_epoch - 2)]) >= least


def test_too_few_sentinels_are_refused_before_anything_runs():
  for objective, length in ((span_corruption.span_corruption(layout=DECODER, sentinels=NAMES[:3]), 128),
                            (ul2.ul2(), 512)):
    with pytest.raises(ValueError, match=r'as many as a row takes, have \d+ spans, but there are only \d+ sentinels'):
      template(objective, special_of(objective), length)
  template(ul2.ul2(sentinels=tokenizers.sentinels(64)), special_of(ul2.ul2(sentinels=tokenizers.sentinels(64))), 512)


@pytest.mark.parametrize('objective, missing', [
    (masked.masked(mask='[MASK]'), r'\[MASK\]'),
    (span_corruption.span_corruption(sentinels=('<extra_id_0>',)), '<extra_id_0>'),
    (ul2.ul2(modes=('[NLU]', '[S2S]', '[NLG]')), r'\[NLU\], \[S2S\], \[NLG\]'),
    (infill.infill(names=('a', 'b', 'c')), 'a, b')])
def test_control_tokens_that_the_tokenizer_lacks_are_refused(objective, missing):
  with pytest.raises(ValueError, match=f'control tokens that the tokenizer lacks: {missing}'):
    special(tokenizers.Bytes(), objective.control)


def test_our_tokenizers_have_the_control_tokens_of_all_objectives():
  for objective in (masked.masked(), span_corruption.span_corruption(), ul2.ul2(), infill.infill()):
    assert len(set(special(tokenizers.Bytes(), objective.control).control)) == len(objective.control)


def test_rows_that_are_too_short_are_refused():
  objective = span_corruption.span_corruption(layout=DECODER)
  with pytest.raises(ValueError, match='rows of 3 positions have no room'):
    Stream(objective, special_of(objective), 3, 1, store=documents([9]))
  with pytest.raises(ValueError, match='an example of 8 tokens, as many as a row takes, has no target'):
    template(prefix.prefix(lambda n, rng: 9), special_of(prefix.prefix()), 8)
  with pytest.raises(ValueError, match='give the data a source_length'):
    template(span_corruption.span_corruption(), special_of(span_corruption.span_corruption()), 128)


@pytest.mark.parametrize('make', [
    lambda: masked.masked(0.), lambda: masked.masked(shares=(0.8, 0.3)), lambda: span_corruption.span_corruption(1.),
    lambda: span_corruption.span_corruption(mean=0.5), lambda: infill.infill(1.5), lambda: infill.infill(spm=-1)])
def test_numbers_that_are_no_shares_are_refused(make):
  with pytest.raises(ValueError, match='must be|are shares'):
    make()


def test_a_prompt_is_marked_as_examples_are():
  """The source of a prompt ends with the first sentinel of the targets, which the source does not attend to."""
  objective = span_corruption.span_corruption(layout=DECODER, sentinels=NAMES[:8])
  example, = draws(objective, range(10, 40))
  cut = int(example.bidirectional.sum()) + 1
  batch = Batch(example.tokens[None, :cut], segments=np.ones((1, cut), np.int32))
  np.testing.assert_array_equal(objective.prompt(batch).bidirectional[0], example.bidirectional[:cut])
  assert prefix.prefix().prompt(batch).bidirectional.all()
  assert infill.infill().prompt(batch) is batch and masked.masked().prompt is None


@pytest.mark.parametrize('mean', [2, 3, 8, 64])
def test_counts_are_rounded_as_t5_rounds_them(mean):
  """Half to even, as Python's own `round`; at least one, and some text between spans."""
  for density in (0.15, 0.25, 0.5):
    for tokens in range(2, 700):
      noise = min(max(round(tokens * density), 1), tokens - 1)
      spans = min(max(round(noise / mean), 1), noise, tokens - noise)
      assert span_corruption.counts(tokens, density, mean) == (noise, spans)
  halves = {2: (20, 5, 2), 8: (80, 20, 2), 64: (640, 160, 2)}   # 2.5 spans are two
  for mean_length, (tokens, noise, spans) in halves.items():
    assert span_corruption.counts(tokens, 0.25, mean_length) == (noise, spans)
