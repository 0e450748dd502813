"""Augmentations change only what they may, at their rates, and batches stay pure functions of the step."""
import collections
import dataclasses
import functools
import inspect
import json

import jax
import numpy as np
import pytest

from lm import optim, sharding, train
from lm.data import dataset, tokenizers
from lm.data.batch import Special, special
from lm.data.rows import augment
from lm.data.rows.augment import Shuffle, SpanDeletion, SubwordSampling, TokenDropout, augmented
from lm.data.rows.packed_documents import Stream
from lm.data.text import clean, corpora
from lm.models import transformer
from lm.objectives.infill import infill
from lm.objectives.masked import masked
from lm.objectives.next_token import next_token
from lm.objectives.supervised import supervised
from lm.workdir import mismatch

BEGIN, END, HIDDEN = 0, 1, 2
TEXT = inspect.getsource(json.decoder) + inspect.getsource(json.encoder)


@pytest.fixture(scope='module', params=['bpe', 'unigram'])
def trained(request):
  return tokenizers.train_sentencepiece([TEXT[i:i + 3000] for i in range(0, len(TEXT), 3000)], 600, request.param)


@pytest.fixture(scope='module')
def bpe():
  return tokenizers.train_sentencepiece([TEXT[i:i + 3000] for i in range(0, len(TEXT), 3000)], 600)


@dataclasses.dataclass(frozen=True)
class Documents:
  tokens: np.ndarray
  offsets: np.ndarray


def rows(augmentations, objective=None, sizes=(40, 3, 25, 1, 90), tokenizer=None, length=16):
  """Returns a stream of documents of distinct tokens or, with a tokenizer, of parts of a text."""
  goal = objective or next_token()
  if tokenizer is not None:
    documents = [tokenizer.encode(TEXT[i:i + 700]) for i in range(0, 7000, 700)]
    store = Documents(np.concatenate(documents), np.cumsum([0, *map(len, documents)]))
    of = special(tokenizer, goal.control)
  else:
    store = Documents(np.arange(3, 3 + sum(sizes)), np.cumsum([0, *sizes]))
    of = Special(BEGIN, END, 3 + sum(sizes), (HIDDEN,) if goal.control else ())
  return Stream(augmented(goal, augmentations, tokenizer), of, length, 4, store=store)


def examples(batches):
  """Yields (input tokens, targets) of each example of an epoch."""
  for index in range(batches.rows_per_epoch):
    batch = batches.compose([(0, index)])
    for row in range(len(batch.tokens)):
      for segment in range(1, batch.segments[row].max() + 1):
        inside = batch.segments[row] == segment
        yield batch.tokens[row, inside], batch.targets[row, inside]


ALL = (Shuffle(0.5, size=4), SpanDeletion(0.2), TokenDropout(0.3, token=None))


def test_batches_stay_pure_and_new_in_each_epoch():
  batches, again = rows(ALL), rows(ALL)
  for step in (0, 2, 1, 0):
    jax.tree.map(np.testing.assert_array_equal, batches(step), again(step))
    some = jax.tree.map(lambda x: x[2:], batches(step))
    jax.tree.map(np.testing.assert_array_equal, batches(step, range(2, 4)), some)
  plain = [tuple(targets) for _, targets in examples(rows(()))]
  assert sorted(plain) != sorted(tuple(targets) for _, targets in examples(batches))
  one = rows(ALL, sizes=(15,))   # an epoch has one row
  assert len({one.compose([(epoch, 0)]).tokens.tobytes() for epoch in range(20)}) > 15


def test_token_dropout_leaves_targets_and_specials_and_has_its_rate():
  sizes = (2000, 1, 500)
  plain, dropped = rows((), sizes=sizes), rows((TokenDropout(0.3, token=None),), sizes=sizes)
  read = hit = 0
  for step in range(plain.steps_per_epoch):
    a, b = plain(step), dropped(step)
    for name in ('targets', 'weights', 'positions', 'segments'):
      np.testing.assert_array_equal(getattr(a, name), getattr(b, name))
    body = (a.segments > 0) & (a.tokens > END)
    np.testing.assert_array_equal(a.tokens[~body], b.tokens[~body])
    read, hit = read + body.sum(), hit + (a.tokens != b.tokens).sum()
  assert abs(hit / read - 0.3) < 5 * np.sqrt(0.3 * 0.7 / read)


def test_token_dropout_gives_the_token_that_is_named_and_spares_those_of_the_objective(bpe):
  mask = bpe.control_id('<|mask|>')
  batches = rows((TokenDropout(0.5),), infill(1.), tokenizer=bpe, length=128)
  plain = rows((TokenDropout(1e-12),), infill(1.), tokenizer=bpe, length=128)   # draws as many random numbers
  a, b = plain(0), batches(0)
  np.testing.assert_array_equal(a.targets, b.targets)
  changed = a.tokens != b.tokens
  assert set(b.tokens[changed]) == {mask} and 0.4 < changed[a.segments > 0].mean() < 0.6
  assert not np.isin(a.tokens[changed], [*batches.special.control, bpe.bos_id]).any()


def test_span_deletion_takes_out_whole_spans_and_keeps_the_order():
  deletion, n, holes = SpanDeletion(0.2, mean_span=4.), 100, []
  for seed in range(300):
    remaining = deletion.text(np.arange(n), np.random.default_rng(seed), None)
    assert len(remaining) == 80 and (np.diff(remaining) > 0).all()
    gaps = np.diff(remaining, prepend=-1, append=n) - 1
    assert np.sum(gaps > 0) == 5
    holes.append(np.setdiff1d(np.arange(n), remaining))
  share = np.bincount(np.concatenate(holes), minlength=n) / 300
  assert np.abs(share[5:-5] - 0.2).max() < 0.12 and abs(share.mean() - 0.2) < 1e-9   # anywhere
  for short in range(4):
    assert len(deletion.text(np.arange(short), np.random.default_rng(0), None)) == short
  for tokens, targets in examples(rows((deletion,))):
    whole = np.append(tokens, targets[-1])
    np.testing.assert_array_equal(whole[1:], targets)   # targets are the next input tokens
    assert (np.diff(whole[(whole > END)]) > 0).all()
    assert BEGIN not in whole[1:] and END not in whole[:-1]


def test_a_shuffle_keeps_all_tokens_and_targets_are_the_next_of_what_is_read():
  plain, shuffled = (collections.Counter(int(t) for _, targets in examples(rows(a)) for t in targets)
                     for a in ((), (Shuffle(0.),)))
  assert plain == shuffled
  changed = 0
  for (a, last_a), (b, last_b) in zip(examples(rows(())), examples(rows((Shuffle(1., size=3),)))):
    a, b = np.append(a, last_a[-1]), np.append(b, last_b[-1])
    assert sorted(a) == sorted(b) and (b[1:] == last_b).all()
    for special_token in (BEGIN, END):
      np.testing.assert_array_equal(a == special_token, b == special_token)
    changed += int((a != b).any())
    assert np.sum(np.diff(b[b > END]) != 1) <= len(b) // 3 + 1   # parts stay whole
  assert changed > 5
  moved = [(Shuffle(0.4, size=3).text(np.arange(30), np.random.default_rng(i), None) != np.arange(30)).any()
           for i in range(500)]
  assert abs(np.mean(moved) - 0.4) < 5 * np.sqrt(0.24 / 500)


def test_a_shuffle_of_lines_keeps_each_line_whole(bpe):
  of, body = special(bpe, ()), bpe.encode(TEXT[:2000])
  shuffled = bpe.decode(Shuffle(1.).text(body, np.random.default_rng(0), of))
  text = bpe.decode(body)
  assert shuffled != text and sorted(shuffled) == sorted(text)
  ends = [i + 1 for i, token in enumerate(body) if bpe.decode([token]).endswith('\n')]
  parts = [bpe.decode(part) for part in np.split(body, ends)]
  assert len(parts) > 20 and all(part in shuffled for part in parts)


def test_sampled_subwords_spell_the_same_text(trained):
  of, body = special(trained, ()), trained.encode(TEXT[:1500])
  text, spellings = trained.decode(body), set()
  for seed in range(5):
    one = SubwordSampling(0.2, ratio=2.).text(body, np.random.default_rng(seed), of)
    np.testing.assert_array_equal(one, SubwordSampling(0.2, ratio=2.).text(body, np.random.default_rng(seed), of))
    assert trained.decode(one) == text and len(one) > len(body)
    spellings.add(one.tobytes())
  assert len(spellings) == 5
  length = lambda alpha: np.mean([len(trained.sample(text, alpha, i)) for i in range(5)])
  assert abs(length(0.1) - length(0.6)) > 50
  partial = np.append(trained.encode('é')[:1], body)   # this text begins with half a character
  np.testing.assert_array_equal(SubwordSampling().text(partial, np.random.default_rng(0), of), partial)
  control = np.append(body, trained.control_id('<|mask|>'))
  np.testing.assert_array_equal(SubwordSampling().text(control, np.random.default_rng(0), of), control)


@pytest.mark.parametrize('objective', [next_token(), infill(0.5), masked()], ids=['next', 'infill', 'masked'])
def test_longer_texts_fit_their_rows_and_a_row_with_room_reads_every_character(trained, objective):
  sampled = rows((SubwordSampling(0.3, ratio=1.3),), objective, tokenizer=trained, length=64)
  for step in range(sampled.steps_per_epoch):
    sampled(step)   # an example that does not fit its row raises
  assert sampled.rows_per_epoch > 1.2 * rows((), objective, tokenizer=trained, length=64).rows_per_epoch
  if objective.control:
    return
  roomy = rows((SubwordSampling(0.3, ratio=4.),), tokenizer=trained, length=256)
  count = collections.Counter(trained.decode(targets) for _, targets in examples(roomy))
  assert sum(len(text) * n for text, n in count.items()) == 7000


@pytest.mark.parametrize('make, message', [
    (lambda: TokenDropout(1.), r'rate=1\.0 is not in \[0, 1\)'), (lambda: SpanDeletion(-0.1), r'rate=-0\.1'),
    (lambda: SpanDeletion(0.1, 0.5), r'mean_span=0\.5'), (lambda: Shuffle(1.5), r'rate=1\.5'),
    (lambda: Shuffle(1., 0), 'size=0'), (lambda: SubwordSampling(0.), r'alpha=0\.0'),
    (lambda: SubwordSampling(0.1, 0.9), r'ratio=0\.9'),
    (lambda: augmented(supervised(), (Shuffle(1.),)), 'this objective learns from dialogues'),
    (lambda: augmented(next_token(), (SubwordSampling(),), tokenizers.Bytes()), 'kind Bytes writes a text in one way'),
    (lambda: augmented(next_token(), (TokenDropout(0.1, '<|nothing|>'),), tokenizers.Bytes()), r'no control token')])
def test_bad_settings_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()


@pytest.mark.slow
def test_training_alone_is_augmented_and_a_resumed_run_keeps_its_augmentations(tmp_path, monkeypatch):
  (tmp_path / 'text').mkdir()
  for i in range(40):
    (tmp_path / f'text/{i}.txt').write_text(f'{i}\n' + TEXT[i * 100:i * 100 + 100])
  calls = []
  original = dataset.OpenText.batches
  monkeypatch.setattr(dataset.OpenText, 'batches', lambda self, split, objective, *args, **options: (
      calls.append((split, objective)), original(self, split, objective, *args, **options))[1])
  data = dataset.Text(corpora.text(f'{tmp_path}/text/*.txt', 0.2), tokenizers.Bytes(), 16, clean.DEFAULT)
  run = train.Run(transformer.llama(320, 8, 1, 2, max_length=16, hidden=8), next_token(), data,
                  optim.sgd(lambda step: 0.1), steps=1, batch=2, augment=(TokenDropout(0.5),))
  mesh = sharding.make_mesh('fsdp:1', jax.devices()[:1])
  go = functools.partial(train.train, workdir=tmp_path / 'run', mesh=mesh)
  with jax.set_mesh(mesh):
    go(run)
    assert [split for split, _ in calls] == ['train', 'validation']
    assert calls[0][1].forms != run.objective.forms and calls[1][1] is run.objective
    with pytest.raises(mismatch.Mismatch, match=r'augment\.0\.rate: 0\.5 before, 0\.4 now'):
      go(dataclasses.replace(run, steps=2, augment=(TokenDropout(0.4),)))
    with pytest.raises(ValueError, match='of kind Bytes writes a text in one way'):
      go(dataclasses.replace(run, augment=(augment.SubwordSampling(),)), workdir=tmp_path / 'other')


@pytest.mark.parametrize('rate', [0.1, 0.15, 0.5])
def test_the_share_that_is_deleted_is_rounded_to_the_nearest(rate):
  for n in range(4, 120):
    remaining = SpanDeletion(rate).text(np.arange(n), np.random.default_rng(n), None)
    assert abs(n - len(remaining) - rate * n) <= 0.5 + 1e-9 or len(remaining) == 3
