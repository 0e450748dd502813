"""Metrics equal arithmetic by hand; scores and compressors equal other ways to the same number."""
import bz2
import dataclasses
import gzip
import itertools
import lzma

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import meshes

from lm import evaluate, sharding
from lm.data import dataset
from lm.data.batch import Batch
from lm.data.text.source import Source
from lm.data.tokenizers.folder import Bytes
from lm.evaluate import compression, score
from lm.models import transformer
from lm.models.transformer import Output
from lm.objectives import objective
from lm.objectives.next_token import next_token
from lm.train import validation

TEXTS = ['a', 'Ω and ά', 'the rest of it, ' * 4, 'né', '日本' * 5]
TOKENIZER = Bytes(('<|a|>', '<|b|>'))
V = TOKENIZER.vocab_size


def itself(logits):
  return sharding.constrain(logits, 'BTV')


@dataclasses.dataclass(frozen=True)
class Bigram:
  """log p(next | token) = log softmax(table[token]); the table is the parameter."""
  max_length: int = 8
  causal = True

  def apply(self, params, batch, *, key=None, cache=None):
    assert key is None   # evaluation has no dropout
    hidden = params.at[batch.tokens].get(out_sharding=sharding.spec('BT-'))
    return Output(hidden, jax.tree_util.Partial(itself), None)


@pytest.fixture(scope='module')
def data(tmp_path_factory):
  source = Source('tiny', {'train': ['something else'], 'validation': TEXTS}, 'fingerprint')
  return dataset.Text(source, TOKENIZER, 12).open(tmp_path_factory.mktemp('data'), progress=lambda line: None)


def measure(data, table, mesh='fsdp:1', rows=4, denominator=objective.token_mean, limit=None, **options):
  mesh = meshes.mesh_of(mesh)
  run = next_token(denominator=denominator)
  with jax.set_mesh(mesh):
    step = validation.make_step(Bigram().apply, run, data.tokenizer)
    batches = data.batches('validation', run, rows, repeat=False, **options)
    return validation.evaluate(step, jnp.asarray(table), batches, mesh, limit)


def test_a_uniform_model_has_the_entropy_of_its_vocabulary(data):
  metrics = measure(data, np.zeros((V, V), np.float32))
  size = sum(len(text.encode()) for text in map(str.strip, TEXTS))
  tokens = size + len(TEXTS)   # the end of each document is a target without bytes
  assert metrics['nll'] == metrics['loss'] == pytest.approx(np.log(V), rel=1e-6)
  # All tokens are equally likely.
  assert metrics['perplexity'] == pytest.approx(V, rel=1e-5) and metrics['accuracy'] == 1
  assert metrics['bits_per_byte'] == pytest.approx(np.log2(V) * tokens / size, rel=1e-6)


@pytest.fixture(scope='module')
def table():
  return np.random.default_rng(0).normal(size=(V, V)).astype(np.float32)


@pytest.fixture(scope='module')
def by_hand(table):
  """Returns (sum of nll, number of targets, number of correct ones, bytes), one pair at a time in float64."""
  logits, pairs = table.astype(np.float64), []
  for text in map(str.strip, TEXTS):
    pairs += itertools.pairwise([TOKENIZER.bos_id, *text.encode(), TOKENIZER.eos_id])
  nll = sum(np.log(np.exp(logits[a]).sum()) - logits[a, b] for a, b in pairs)
  return nll, len(pairs), sum(logits[a].argmax() == b for a, b in pairs), sum(b < 256 for _, b in pairs)


@pytest.mark.parametrize('mesh, rows, options', [
    ('fsdp:1', 1, {}), ('fsdp:1', 5, {'seed': None}), ('fsdp:1', 16, {'seed': 3}), ('fsdp:8', 8, {}),
    ('fsdp:4,tensor:2', 8, {'context': 6})])
def test_metrics_are_those_by_hand_for_any_batch_order_context_and_mesh(data, table, by_hand, mesh, rows, options):
  metrics, (nll, tokens, right, size) = measure(data, table, mesh, rows, **options), by_hand
  expected = {'loss': nll / tokens, 'nll': nll / tokens, 'perplexity': np.exp(nll / tokens),
              'bits_per_byte': nll / np.log(2) / size, 'accuracy': right / tokens}
  assert metrics == {name: pytest.approx(value, rel=1e-5) for name, value in expected.items()}


def test_the_loss_is_the_objectives_and_the_other_metrics_are_not(data, table, by_hand):
  metrics, (nll, tokens, *_) = measure(data, table, denominator=objective.sequence_mean), by_hand
  pieces = sum(int(row.max()) for row in data.batches('validation', next_token(), 99, repeat=False)(0).segments)
  assert metrics['loss'] == pytest.approx(nll / pieces, rel=1e-5)
  assert metrics['nll'] == pytest.approx(nll / tokens, rel=1e-5)


def test_a_limit_evaluates_the_first_batches_alone(data, table):
  first = data.batches('validation', next_token(), 2, repeat=False)(0)
  logits, weighted = table.astype(np.float64), first.weights > 0
  nll = np.log(np.exp(logits[first.tokens]).sum(-1)) - logits[first.tokens, first.targets]
  assert measure(data, table, rows=2, limit=1)['nll'] == pytest.approx(nll[weighted].mean(), rel=1e-5)


def test_nothing_to_evaluate_is_refused(data):
  batches = data.batches('validation', next_token(), 2, repeat=False)

  class Unasked:
    rows, steps_per_epoch = batches.rows, batches.steps_per_epoch

    def with_bytes(self):
      return self

    def __call__(self, step, rows):
      return batches(step, rows)._replace(weights=np.zeros((len(rows), batches.length), np.float32))

  mesh = sharding.make_mesh('fsdp:1', jax.devices()[:1])
  with jax.set_mesh(mesh), pytest.raises(ValueError, match='nothing to evaluate'):
    step = validation.make_step(Bigram().apply, next_token(), data.tokenizer)
    validation.evaluate(step, jnp.zeros((V, V)), Unasked(), mesh)


@pytest.mark.parametrize('mesh', ['fsdp:1', 'fsdp:8'])
@pytest.mark.parametrize('lengths', [[2], [9], [40], [1, 3, 0, 8, 10, 21, 2, 2, 5, 40, 9]], ids=str)
def test_log_probabilities_of_texts_are_those_of_their_pairs(table, mesh, lengths):
  texts = [np.random.default_rng(length).integers(256, size=length) for length in lengths]
  with meshes.on(mesh):
    results = evaluate.log_probabilities(Bigram(), jnp.asarray(table), texts)
  logits = table.astype(np.float64)
  for tokens, scores in zip(texts, results, strict=True):
    expected = [logits[a, b] - np.log(np.exp(logits[a]).sum()) for a, b in itertools.pairwise(tokens)]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-5)


@dataclasses.dataclass(frozen=True)
class Counter:
  """A model with log p(0 | the t tokens before) = log sigmoid(-t), whose scores show how many tokens it has seen."""
  max_length: int = 8
  causal = True

  def apply(self, params, batch: Batch):
    return Output(batch.positions[..., None], lambda t: jnp.concatenate([-t, 0 * t], axis=-1).astype(jnp.float32), None)


def test_every_token_of_a_long_text_has_half_a_window_before_it():
  lengths = [2, 8, 9, 13, 14, 30]
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    texts = evaluate.log_probabilities(Counter(), None, [np.zeros(length, np.int32) for length in lengths])
  for length, scores in zip(lengths, texts, strict=True):
    context = np.rint(np.log(np.expm1(-scores.astype(np.float64))))   # inverts -log(1 + e^t)
    assert np.array_equal(context[:8], np.arange(min(8, length - 1)))
    assert (context[8:] >= 4).all() and (context < 8).all() and len(scores) == length - 1


def test_a_text_scores_as_its_logits_say_and_in_company_as_alone_to_the_last_bit():
  model = transformer.llama(64, 32, 2, 4, max_length=96)
  texts = [np.random.default_rng(length).integers(64, size=length) for length in (200, 5, 90, 3, 9, 9, 40, 33, 2)]
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    params = jax.jit(model.init)(jax.random.key(0))
    together = score.predictions(model, params, texts)
    backwards = score.predictions(model, params, texts[::-1])[::-1]
    for text, first, second in zip(texts, together, backwards):
      alone, = score.predictions(model, params, [text])
      for values, company, other_company in zip(alone, first, second):
        np.testing.assert_array_equal(values, company)
        np.testing.assert_array_equal(values, other_company)
    tokens = texts[2]
    logits = jax.jit(lambda batch: (out := model.apply(params, batch)).head(out.hidden))(Batch(tokens[None, :-1]))
    table = np.asarray(jax.nn.log_softmax(logits))[0]
  np.testing.assert_allclose(together[2].log_p, table[np.arange(89), tokens[1:]], atol=1e-5)
  np.testing.assert_allclose(together[2].top_log_p, table.max(-1), atol=1e-5)
  np.testing.assert_array_equal(together[2].correct, table.argmax(-1) == tokens[1:])


@pytest.mark.parametrize('window,stride,expected', [
    # tokens before each of 12 targets, by hand
    (4, 4, [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]), (4, 1, [0, 1, 2, 3, 3, 3, 3, 3, 3, 3, 3, 3]),
    (4, 2, [0, 1, 2, 3, 2, 3, 2, 3, 2, 3, 2, 3]), (5, 5, [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 3, 4])])
def test_windows_read_as_many_tokens_as_they_can(window, stride, expected):
  """With a stride of the whole window they are the rolling windows of lm-evaluation-harness."""
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    predicted, = score.predictions(Counter(), None, [np.zeros(13, np.int32)], window=window, stride=stride)
  np.testing.assert_array_equal(np.rint(np.log(np.expm1(-predicted.log_p.astype(np.float64)))), expected)


@pytest.mark.parametrize('window,stride,message', [
    (9, None, 'a window of 9 tokens is not between 1 and 8'), (0, None, 'a window of 0'),
    (4, 5, 'a stride of 5 tokens is not between 1 and 4'), (None, 0, 'a stride of 0')])
def test_windows_that_cannot_be_are_refused(window, stride, message):
  with pytest.raises(ValueError, match=message):
    score.predictions(Counter(), None, [np.zeros(13, np.int32)], window=window, stride=stride)


def test_compressors_are_those_of_the_command_line():
  rng = np.random.default_rng(0)
  words = [bytes(rng.integers(97, 123, size=7).astype(np.uint8)) for _ in range(300)]
  text, training = (b' '.join(words[i] for i in rng.integers(300, size=n)) for n in (400, 3000))
  bits = compression.compress(text, training)
  size = {'gzip -9': gzip.compress(text, 9), 'bzip2 -9': bz2.compress(text, 9)}
  assert {name: bits[name][0] for name in size} == {name: 8 * len(data) / len(text) for name, data in size.items()}
  assert bits['xz -9'][0] == pytest.approx(8 * len(lzma.compress(text, preset=9)) / len(text), rel=0.01)
  assert all(0 < primed < 0.8 * alone for alone, primed in bits.values())
  # The text is part of the primer, so hardly any bits are needed.
  again = compression.compress(training[-400:], training)
  assert max(again['gzip -9'][1], again['xz -9'][1]) < 0.5


@pytest.mark.slow
def test_gzip_is_primed_with_the_end_of_the_training_text():
  rng = np.random.default_rng(1)
  text, other = (rng.integers(97, 123, size=n).astype(np.uint8).tobytes() for n in (4000, 60_000))
  primed = {where: compression.compress(text, training)['gzip -9'][1]
            for where, training in (('end', other + text), ('begin', text + other), ('nowhere', other))}
  assert primed['end'] < 0.1 * primed['nowhere'] and primed['begin'] == pytest.approx(primed['nowhere'], rel=0.02)


def test_the_number_of_batches_and_rows_is_reported(data):
  first = data.batches('validation', next_token(), 2, repeat=False)
  total = first.steps_per_epoch
  rows = f'batches of 2 rows of {first.length} positions'
  assert validation.describe_batches(first) == f'all {total} {rows}, each without the text before it'
  assert validation.describe_batches(first, 1).startswith(f'the first 1 of {total} batches')
  after = data.batches('validation', next_token(), 2, repeat=False, context=4)
  assert validation.describe_batches(after, 10 ** 6).startswith(f'all {after.steps_per_epoch} batches')
  assert validation.describe_batches(after).endswith('of which 4 repeat the row before')
