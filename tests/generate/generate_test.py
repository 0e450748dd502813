"""Sampling filters, decoding, stop strings and streaming of text."""
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decoders import GREEDY, PROMPTS, Bytes, make, rows_of, text_of, tokens_of

from lm import generate, sharding
from lm.data.batch import Batch
from lm.generate import engine as engine_module
from lm.generate import filters
from lm.models import transformer

LOGITS = np.float32([2, 1, 0.5, 0, -1, -3])
SIX_EQUAL = np.zeros(6, np.float32)
MIXED = generate.Sampling(0.8, top_k=60, top_p=0.95, min_p=0.001, repetition_penalty=1.2)


class Words(Bytes):
  """A tokenizer like SentencePiece: a token may begin with a space, which decoding drops at the start of a text."""
  words = ['<s>', '</s>', '_de', 'f', '_x', '_', '=', '_return', 'E', 'D', 'EN']
  vocab_size, bos_id, eos_id = 11, 0, 1

  def encode_batch(self, texts):
    return [np.int32([self.words.index(word) for word in text.split()]) for text in texts]

  def decode(self, ids):
    return ''.join(self.words[i] for i in ids if i > 1).replace('_', ' ').removeprefix(' ')


@functools.cache
def tiny(mesh=None):
  return make(kv_heads=2, tied=False, mesh=mesh)


def places_of(logits):
  """Returns the token ids that keep a finite logit."""
  return np.flatnonzero(np.isfinite(logits[0])).tolist()


# Sampling. The numbers are those of transformers 5.23.


def test_penalty_and_temperature_match_published_numbers():
  row = generate.settings([generate.Sampling(repetition_penalty=1.2)], [0], np.arange(1))
  np.testing.assert_allclose(generate.process(LOGITS[None], row, filters.new_history([np.int32([0, 3, 4])], 6))[0],
                             [1.666667, 1, 0.5, 0, -1.2, -3], rtol=1e-6)
  np.testing.assert_allclose(generate.process(LOGITS[None], generate.Sampling(temperature=0.7))[0],
                             [2.857143, 1.428571, 0.714286, 0, -1.428571, -4.285714], rtol=1e-6)


@pytest.mark.parametrize(('logits', 'sampling', 'expected'), [
    (LOGITS, {'top_k': 3}, [0, 1, 2]), (SIX_EQUAL, {'top_k': 3}, [0, 1, 2, 3, 4, 5]), (LOGITS, {'top_k': 99}, range(6)),
    (LOGITS, {'top_p': 0.9}, [0, 1, 2, 3]), (LOGITS, {'top_p': 0.6}, [0, 1]), (SIX_EQUAL, {'top_p': 0.5}, [3, 4, 5]),
    (LOGITS, {'top_p': 1e-9}, [0]), (LOGITS, {'min_p': 0.1}, [0, 1, 2, 3]), (LOGITS, {'min_p': 0.3}, [0, 1]),
    (LOGITS, {'min_p': 1.}, [0]), (LOGITS, {'top_k': -1}, range(6)),
    # The probabilities are .56, .21, .13, .08, .03 and 0, their entropy is 1.23, and the information of the second is
    # 1.58, of the first 0.58. Cutoffs of 0.3 and 0.6 are 0.16 and 0.23 at this entropy.
    (LOGITS, {'typical_p': 0.2}, [1]), (LOGITS, {'typical_p': 0.5}, [0, 1]), (LOGITS, {'eta_cutoff': 0.3}, [0, 1]),
    (LOGITS, {'eta_cutoff': 0.6}, [0]), (LOGITS, {'eta_cutoff': 0.01}, [0, 1, 2, 3, 4]),
    # The order matters: two of these tokens have .73 of the mass after top_k, but .77 of it at the lower temperature.
    (LOGITS, {'top_k': 3, 'top_p': 0.8}, [0, 1]), (LOGITS, {'temperature': 2., 'top_p': 0.6}, [0, 1, 2]),
])
def test_filters_keep_the_published_tokens(logits, sampling, expected):
  rows = np.stack([logits, logits[::-1]])
  assert places_of(generate.process(rows, generate.Sampling(**sampling))) == list(expected)


def test_filters_do_not_depend_on_the_order_of_tokens():
  order = np.random.default_rng(0).permutation(6)
  assert sorted(order[places_of(generate.keep_top_p(LOGITS[None, order], 0.9))]) == [0, 1, 2, 3]


@pytest.mark.parametrize(('name', 'value', 'allowed'), [
    ('temperature', -1, '0'), ('temperature', float('nan'), '0'), ('top_k', 1.5, 'whole'), ('top_k', -2, '0'),
    ('top_k', 2 ** 31, 'below'), ('min_tokens', 2 ** 31, 'below'),
    ('top_p', 0, 'at most 1'), ('top_p', 1.1, 'at most 1'), ('min_p', 2, 'between 0'),
    ('typical_p', 0, 'at most 1'), ('eta_cutoff', 1, 'less than 1'), ('repetition_penalty', 0, '1 is off'),
    ('repetition_penalty', 1e-40, '1e-30')])
def test_a_bad_value_is_named(name, value, allowed):
  with pytest.raises(ValueError, match=f'{name}={value} .*{allowed}'):
    generate.Sampling(**{name: value})


class Table(transformer.LanguageModel):
  """A model whose logits are always LOGITS, so that its samples have a known distribution."""
  vocab: int = 6
  max_length: int = 99

  def unstack(self, params):
    return params

  def init_cache(self, batch_size, length):
    return jnp.zeros(batch_size)

  def apply(self, params, batch, *, key=None, cache=None):
    return transformer.Output(batch.tokens, lambda h: jnp.broadcast_to(jnp.asarray(LOGITS), (*h.shape, 6)), cache)


class Six(Words):
  vocab_size, bos_id, eos_id = 6, 0, 77   # never ends


def sample_table(sampling, rows=512, n=32):
  return tokens_of(Table(), None, [''] * rows, sampling, n, seed=3, tokenizer=Six())


@pytest.mark.parametrize(('sampling', 'logits'), [
    (generate.Sampling(), LOGITS), (generate.Sampling(temperature=0.7), LOGITS / 0.7),
    (generate.Sampling(top_k=3), np.where(np.arange(6) < 3, LOGITS, -np.inf))])
def test_samples_have_the_distribution_of_the_softmax(sampling, logits):
  p = np.exp(logits) / np.exp(logits).sum()
  samples = sample_table(sampling)
  counts = np.bincount(samples.ravel(), minlength=6)
  assert counts[p == 0].sum() == 0
  chi_square = (np.square(counts - samples.size * p)[p > 0] / (samples.size * p[p > 0])).sum()
  assert chi_square < 20.5   # 5 degrees of freedom: 1 in 1000 by chance
  repeats = (samples[:, 1:] == samples[:, :-1]).mean(), (samples[1:] == samples[:-1]).mean()
  np.testing.assert_allclose(repeats, np.square(p).sum(), atol=0.02)   # steps and rows are independent


# Decoding.


@pytest.mark.parametrize(('family', 'kwargs'), [
    (transformer.llama, {'kv_heads': 2, 'tied': False}), (transformer.gpt2, {})])
def test_cached_decoding_is_the_argmax_of_the_full_forward(family, kwargs):
  model, params = make(family, **kwargs)
  forward = jax.jit(lambda params, tokens: (out := model.apply(params, Batch(tokens))).head(out.hidden))
  generated = tokens_of(model, params, PROMPTS, GREEDY, 20)
  for prompt, row in zip(PROMPTS, generated):
    ids = [256, *prompt.encode(), *row]
    padded = np.zeros((1, 64), np.int32)   # padding on the right, which a causal model does not see
    padded[0, :len(ids)] = ids
    best = np.argmax(forward(params, padded)[0, :, :258], axis=-1)[len(ids) - 21:len(ids) - 1]
    end = np.argmax(best == 257) + 1 if 257 in best else 20
    np.testing.assert_array_equal(row[:end], best[:end])
    assert len(set(row[:end])) > 3   # otherwise the test shows little


@pytest.mark.parametrize('sampling', [GREEDY, MIXED])
def test_a_completion_does_not_depend_on_its_batch(sampling):
  together = tokens_of(*tiny(), PROMPTS, sampling, 24, seed=5)
  for prompt, row in zip(PROMPTS[:3], together):
    np.testing.assert_array_equal(tokens_of(*tiny(), [prompt], sampling, 24, seed=5)[0], row)
  assert (together[3] == together[0]).all() == sampling.greedy   # equal prompts give different samples
  assert sampling.greedy or (tokens_of(*tiny(), PROMPTS[:1], sampling, 24, seed=6)[0] != together[0]).any()


@pytest.mark.slow
def test_a_mesh_makes_the_same_tokens():
  expected = tokens_of(*tiny(), PROMPTS, MIXED, 24)
  with jax.set_mesh(sharding.make_mesh('fsdp:4,tensor:2')) as mesh:
    generated = tokens_of(*tiny(mesh), PROMPTS[:3], MIXED, 10)
  np.testing.assert_array_equal(generated, expected[:3, :10])   # the mesh adds a row of padding


def test_the_penalty_is_for_tokens_of_prompt_and_output():
  never = generate.Sampling(temperature=0, repetition_penalty=1e9)
  generated = tokens_of(Table(), None, ['_de'], never, 4, tokenizer=Six())   # <s> _de are 0 2
  assert generated.tolist() == [[1, 0, 0, 0]]   # 0 is more likely than 1, until both have occurred


def test_prompts_compile_once_for_each_bucket_and_decoding_once():
  model = Table(max_length=98)   # its own entries in the cache of compilations
  before = engine_module._prefill._cache_size(), engine_module._step._cache_size()
  for prompt, n in [('f', 20), ('f ' * 12, 37), ('', 18), ('f ' * 30, 30)]:   # prompts padded to 16, 16, 16 and 32
    tokens_of(model, None, [prompt], GREEDY, n, tokenizer=Six())
  assert (engine_module._prefill._cache_size() - before[0], engine_module._step._cache_size() - before[1]) == (2, 1)


# Text.


def test_pieces_are_whole_characters_and_join_to_the_text():
  text = 'naïve 日本語 🙂🏳️‍🌈 end'
  pieces = text_of(text.encode())
  assert ''.join(pieces) == text and '\ufffd' not in ''.join(pieces) and len(list(filter(None, pieces))) == len(text)
  assert ''.join(text_of('🙂🙂'.encode()[:-1])) == '🙂'   # an unfinished character
  assert ''.join(text_of(b'a\xffb')) == 'a\ufffdb'        # bytes that are not UTF-8


@pytest.mark.parametrize('data, shown', [
    ('the sign \ufffd'.encode(), 'the sign \ufffd'), ('\ufffd'.encode(), '\ufffd'), (b'caf\xc3', 'caf'),
    ('\ufffd\ufffd'.encode() + b'\xe2\x82', '\ufffd\ufffd'), (b'a\xf0\x9f\x98', 'a'), ('€'.encode(), '€')])
def test_a_replacement_character_that_was_written_stays_and_that_of_half_a_character_does_not(data, shown):
  text = generate.TextStream(Bytes(), np.zeros(0, np.int32), ())
  assert ''.join([*(text.push(byte) for byte in data), text.end()]) == shown


def test_a_completion_keeps_the_space_after_its_prompt():
  words = Words()
  assert text_of([4, 6, 5, 7], words, prompt=[2, 3]) == [' x', '=', ' ', ' return', '']
  assert text_of([4, 0, 4], words) == ['x', '', ' x', '']


@pytest.mark.parametrize(('stop', 'expected'), [
    ([], ' x=END return'), (['END'], ' x='), (['D', 'END'], ' x='), (['=E'], ' x'), (['x=END ret'], ' '),
    ([' x'], ''), (['ENDx'], ' x=END return'), (['return', 'N'], ' x=E'), (['=END', 'D ret'], ' x')])
def test_a_stop_string_is_found_across_tokens_and_left_out(stop, expected):
  for end in [], [1, 4]:   # nothing comes after eos
    pieces = text_of([4, 6, 10, 9, 7, *end], Words(), prompt=[2, 3], stop=stop)
    assert ''.join(pieces) == expected


def test_only_the_beginning_of_a_stop_string_is_held_back():
  assert text_of([4, 6], Words(), prompt=[2, 3], stop=['1234']) == ['', '', ' x=']
  assert text_of([4, 6], Words(), prompt=[2, 3], stop=['12']) == [' ', 'x', '=']


def test_streams_join_to_completions():
  model, params = tiny()
  whole = generate.generate(model, params, Bytes(), PROMPTS, MIXED, max_tokens=24, seed=1)
  pieces = list(generate.stream(model, params, Bytes(), PROMPTS, MIXED, max_tokens=24, seed=1))
  assert [''.join(column) for column in zip(*pieces)] == whole and len(pieces) > 2
  stop = whole[0][5:8]
  cut = generate.generate(model, params, Bytes(), PROMPTS, MIXED, max_tokens=24, seed=1, stop=[stop])
  assert cut == [text[:text.index(stop)] if stop in text else text for text in whole]
  ends = tokens_of(model, params, PROMPTS, MIXED, 24, seed=1)[0]

  class Ends(Bytes):
    eos_id = int(ends[7])   # a token that the model writes

  first = ends.tolist().index(Ends.eos_id)
  ended = generate.generate(model, params, Ends(), PROMPTS, MIXED, max_tokens=24, seed=1)
  assert ended[0] == Bytes().decode(ends[:first]).rstrip('\ufffd')
  ids = dataclasses.replace(MIXED, stop_ids=(Ends.eos_id,))   # of the sampling, not of the tokenizer
  assert generate.generate(model, params, Bytes(), PROMPTS, ids, max_tokens=24, seed=1) == ended
  row, *_ = generate.tokens(model, params, Bytes(), Bytes().encode_batch(PROMPTS), ids, max_tokens=24, seed=1)
  assert row.tolist() == ends[:first].tolist()
  with pytest.raises(ValueError, match='id 258 in'):
    generate.generate(model, params, Bytes(), PROMPTS, generate.Sampling(stop_ids=(258,)))


@pytest.mark.slow
def test_text_ends_at_any_end_token():
  model, params = tiny()
  generated = tokens_of(model, params, PROMPTS, GREEDY, 24)
  first, second = int(generated[0][5]), int(generated[2][1])

  class Ends(Bytes):
    eos_ids = 257, first, second

  together = generate.generate(model, params, Ends(), PROMPTS, GREEDY, max_tokens=24)
  for row, text in zip(generated, together):
    ended = np.flatnonzero(np.isin(row, Ends.eos_ids))[:1].tolist()
    assert text == ''.join(text_of(row[:ended[0] if ended else None]))
  # Each end token ends one of them.
  assert len({int(row[np.isin(row, Ends.eos_ids)][0]) for row in generated[[0, 2]]}) == 2
  ended, = rows_of(model, params, PROMPTS[:1], GREEDY, 24, tokenizer=Ends())
  assert ended.tolist() == generated[0, :generated[0].tolist().index(first) + 1].tolist()   # no token follows it
  alone = generate.stream(model, params, Ends(), PROMPTS[:1], GREEDY, max_tokens=110)
  assert len(list(alone)) <= 2 < len(list(generate.stream(model, params, Bytes(), PROMPTS[:1], GREEDY, max_tokens=110)))


@pytest.mark.slow
def test_ids_give_ids_and_a_prompt_may_be_bidirectional():
  model, params = tiny()
  generated = tokens_of(model, params, PROMPTS, GREEDY, 24)

  class Ends(Bytes):
    eos_ids = 257, int(generated[0][5])

  ids = Bytes().encode_batch(PROMPTS)
  completions = generate.tokens(model, params, Ends(), ids, GREEDY, max_tokens=24)
  for row, ours in zip(generated, completions):
    end = np.flatnonzero(np.isin(row, Ends.eos_ids))[:1].tolist()
    np.testing.assert_array_equal(ours, row[:end[0] if end else None])

  def mark(batch):
    return batch._replace(bidirectional=batch.segments > 0)
  marked = generate.tokens(model, params, Bytes(), ids, GREEDY, max_tokens=24, mark=mark)
  batch = mark(model.prompt(ids[:1], 1, Bytes().bos_id, 257))
  logits = (lambda out: out.head(out.hidden))(model.apply(params, batch))[0, -1]
  assert marked[0][0] == np.argmax(logits[:Bytes().vocab_size])
  assert any(a.tolist() != b.tolist() for a, b in zip(marked, generated))
  with pytest.raises(ValueError, match='max_tokens=0'):
    generate.tokens(model, params, Bytes(), ids, max_tokens=0)


def test_bad_requests_are_refused():
  call = functools.partial(generate.generate, Table(), None, Six())
  assert call([]) == generate.tokens(Table(), None, Six(), []) == []
  for error, kwargs in [
      ('3 tokens .* max_tokens=97 .* 99', {'max_tokens': 97}), ('max_tokens=0', {'max_tokens': 0}),
      ("stop=\\['a', ''\\]", {'stop': ['a', '']}), ("stop='a'", {'stop': 'a'})]:
    with pytest.raises(ValueError, match=error):
      call(['f f'], **kwargs)
  assert len(call(['f f'], max_tokens=96)) == 1   # just fits
  with pytest.raises(ValueError, match='11 tokens, the model only 6'):
    generate.generate(Table(), None, Words(), ['f'])
