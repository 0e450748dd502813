"""The objective of masked diffusion on a distribution that can be enumerated: its bound, estimates and masks."""
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.exact_denoiser import BOS, JOINT, LENGTH, MASK, VOCAB, Exact, placed

from lm import sharding
from lm.data.batch import Batch, Dialogue, Row, Special, blank, template
from lm.generate import unmask
from lm.models import transformer
from lm.objectives.diffusion import masked_diffusion
from lm.objectives.objective import sequence_mean

SPECIAL = Special(BOS, 9, 10, (MASK,))
TEXTS = list(itertools.product(range(VOCAB), repeat=LENGTH))


def loss_of(apply, params, batch):
  loss, weight, sums = masked_diffusion().loss(apply, params, batch, None)
  return loss, weight, sums


def every_set(text):
  """Returns one row for each set of masked positions of bos and a text, with the probability of the set."""
  tokens, weights, shares = [], [], []
  for n in range(1, LENGTH + 1):
    sets = list(itertools.combinations(range(LENGTH), n))
    for places in sets:
      masked, importance = np.int32([BOS, *text]), np.zeros(LENGTH + 1, np.float32)
      masked[1 + np.array(places)], importance[1 + np.array(places)] = MASK, LENGTH / n
      tokens.append(masked)
      weights.append(importance)
      shares.append(1 / LENGTH / len(sets))
  return np.stack(tokens), np.stack(weights), np.array(shares)


def expected_bound(params):
  """Returns the exact bound of each text in nats: the expected loss of the objective over all sets of masks."""
  @jax.jit
  def one(tokens, importance, target):
    counted = jnp.arange(LENGTH + 1)[None] > 0
    batch = Batch(tokens[None], target[None], counted.astype('f4'), columns={'importance': importance[None]})
    return loss_of(Exact().apply, params, batch)[0]

  bounds = []
  for text in TEXTS:
    tokens, weights, shares = every_set(text)
    losses = jax.vmap(one, in_axes=(0, 0, None))(tokens, weights, jnp.int32([BOS, *text]))
    bounds.append(float(np.dot(shares, losses)))
  return np.array(bounds)


def test_the_expected_loss_bounds_the_nll_and_equals_it_for_exact_conditionals():
  nll = -np.log(JOINT.ravel())
  bound = expected_bound(JOINT)
  np.testing.assert_allclose(bound, nll, rtol=2e-5)
  other = np.random.default_rng(1).dirichlet(np.full(27, 2.)).reshape(3, 3, 3).astype('f4')
  np.testing.assert_allclose(expected_bound(other), -np.log(other.ravel()), rtol=2e-5)
  p = JOINT.ravel()
  assert np.dot(p, bound) + 0.05 < np.dot(p, expected_bound(other))   # the bound of a wrong model is looser


class Wrong(Exact):
  """Conditionals of no joint distribution: they are too sharp where no token or one token is masked."""

  def apply(self, params, batch, *, key=None, cache=None):
    out = super().apply(params, batch)
    few = (batch.tokens == MASK).sum(1)[:, None, None] < 2
    return out._replace(hidden=jax.nn.log_softmax(jnp.where(few, 2., 1.) * out.hidden))


def test_conditionals_that_do_not_agree_give_a_looser_bound():
  """By Jensen's inequality, the likelihood under a random order is at least that of the bound."""
  orders = np.zeros(9)
  apply = jax.jit(lambda tokens: jax.nn.softmax(Wrong().apply(JOINT, Batch(tokens[None])).hidden[0]))
  for n, text in enumerate(TEXTS[:9]):
    for order in itertools.permutations(range(LENGTH)):
      tokens, p = np.int32([BOS, MASK, MASK, MASK]), 1.
      for i in order:
        p *= float(apply(tokens)[1 + i, text[i]])   # float() waits for JAX, which may read the array without a copy
        tokens[1 + i] = text[i]
      orders[n] += p / 6
  model = Wrong()
  bounds = unmask.log_likelihood(model, JOINT, [np.int32([BOS, *text]) for text in TEXTS[:9]], MASK, draws=1024)
  assert (bounds < np.log(orders) + 0.05).all() and (bounds < np.log(orders) - 0.05).any()


def test_the_likelihood_of_a_text_is_estimated():
  texts = [np.int32([BOS, *text]) for text in TEXTS[:6]]
  estimates = unmask.log_likelihood(Exact(), JOINT, texts, MASK, draws=512)
  np.testing.assert_allclose(estimates, np.log(JOINT.ravel()[:6]), atol=0.15)
  with jax.set_mesh(sharding.make_mesh('fsdp:8')):
    again = unmask.log_likelihood(Exact(), JOINT, texts[:1], MASK, draws=512)
  np.testing.assert_allclose(again, estimates[:1], rtol=1e-5)
  conditional = unmask.log_likelihood(Exact(), JOINT, texts, MASK, draws=64, prefix=3)   # the last token alone
  table = JOINT[0, 0] / JOINT[0, 0].sum()
  np.testing.assert_allclose(conditional[:3], np.log(table), rtol=1e-4)
  assert unmask.log_likelihood(Exact(), JOINT, [np.int32([BOS])], MASK).tolist() == [0]
  with pytest.raises(ValueError, match='17 tokens is more than the 16'):
    unmask.log_likelihood(Exact(), JOINT, [np.zeros(17, np.int32)], MASK)


def test_masks_are_a_set_of_each_size_alike_and_weigh_as_many():
  form, = masked_diffusion().forms
  tokens, rng = np.int32([BOS, 0, 1, 2, 0]), np.random.default_rng(0)
  sizes, places, importance = np.zeros(5), np.zeros(5), np.zeros(5)
  for _ in range(4000):
    example = form.example(tokens, rng, SPECIAL)
    masked = example.tokens == MASK
    assert (example.tokens[~masked] == tokens[~masked]).all() and (example.targets == tokens).all()
    assert example.weights.tolist() == [0, 1, 1, 1, 1] and example.bidirectional.all()
    np.testing.assert_array_equal(example.columns['importance'], np.float32(masked * 4 / masked.sum()))
    sizes[masked.sum()] += 1
    places += masked
    importance += example.columns['importance']
  assert sizes[0] == 0 and places[0] == 0
  np.testing.assert_allclose(sizes[1:] / 4000, 1 / 4, atol=0.03)
  np.testing.assert_allclose(places[1:] / 4000, 2.5 / 4, atol=0.03)   # the mean share of masked tokens
  np.testing.assert_allclose(importance[1:] / 4000, 1, atol=0.06)     # each token counts once on average


def test_the_middle_of_a_document_is_masked_whole_and_bos_alone_is_nothing():
  form, = masked_diffusion().forms
  rng = np.random.default_rng(0)
  assert any(form.example(np.int32([0, 1]), rng, SPECIAL).tokens[0] == MASK for _ in range(20))
  empty = form.example(np.int32([BOS]), rng, SPECIAL)
  assert empty.weights.tolist() == [0] and empty.columns['importance'].tolist() == [0] and empty.tokens[0] == BOS
  assert masked_diffusion().control == ('<|mask|>',)
  assert masked_diffusion().prompt is None   # it cannot write from left to right


def test_of_a_dialogue_the_answers_alone_are_masked():
  objective = masked_diffusion(needs=Dialogue)
  loss_mask = np.array([False, False, True, True])
  for seed in range(20):
    piece = Dialogue(np.int32([BOS, 0, 1, 2]), loss_mask)
    example = objective.forms[0].example(piece, np.random.default_rng(seed), SPECIAL)
    assert (example.tokens[:2] == [BOS, 0]).all() and (example.tokens == MASK).any()
    assert example.weights.tolist() == [0, 0, 1, 1] and objective.needs is Dialogue


MODEL = transformer.llama(8, 8, 2, heads=2, hidden=8, max_length=8)


def examples(documents):
  form, = masked_diffusion().forms
  return [form.example(tokens, np.random.default_rng(n), SPECIAL) for n, tokens in enumerate(documents)]


def batch_of(groups, width=8):
  """Returns a batch with one row for each group of examples."""
  batch = template(masked_diffusion(), SPECIAL, width)
  batch = blank(batch, len(groups))
  for i, group in enumerate(groups):
    row = Row(batch, i)
    for example in group:
      row.add(example)
  return batch


@functools.cache
def params():
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape)).astype('f4'),
                      jax.eval_shape(MODEL.init, jax.random.key(0)))


value_and_grad = jax.jit(jax.value_and_grad(lambda p, batch: loss_of(MODEL.apply, p, batch)[0]))


def test_packed_equals_unpacked_and_gradients_are_finite_differences():
  a, b = examples([np.int32([BOS, 0, 1, 2]), np.int32([1, 2, 2, 0])])
  (together, grads), (apart, other) = (value_and_grad(params(), batch_of(groups))
                                       for groups in ([[a, b], []], [[a], [b]]))
  assert float(together) == pytest.approx(float(apart), rel=1e-6)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), grads, other)
  direction = jax.tree.map(lambda x: np.random.default_rng(2).normal(size=x.shape).astype('f4'), params())
  shift = lambda h: jax.tree.map(lambda x, d: x + h * d, params(), direction)
  slope = (value_and_grad(shift(1e-3), batch_of([[a, b], []]))[0]
           - value_and_grad(shift(-1e-3), batch_of([[a, b], []]))[0]) / 2e-3
  expected = sum(np.vdot(np.asarray(g), d) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction)))
  assert float(slope) == pytest.approx(float(expected), rel=1e-2)


@pytest.mark.slow
def test_sums_count_tokens_and_estimate_nats():
  rows = examples([np.int32([BOS, 0, 1, 2]), np.int32([1, 2, 2, 0])])
  batch = batch_of([rows, []])
  loss, weight, sums = loss_of(MODEL.apply, params(), batch)
  out = MODEL.apply(params(), batch)
  nll = -jax.nn.log_softmax(out.head(out.hidden))[0, np.arange(8), batch.targets[0]]
  masked = batch.tokens[0] == MASK
  expected = sum(nll[i] * (3 / masked[:4].sum() if i < 4 else 4 / masked[4:].sum()) for i in np.flatnonzero(masked))
  assert float(loss) == pytest.approx(float(expected), rel=1e-5) and float(sums['nll']) == float(loss)
  assert float(weight) == 7 == float(sums['tokens']) and float(sums['accuracy'][1]) == masked.sum()
  assert float(masked_diffusion(sequence_mean).loss(MODEL.apply, params(), batch, None)[1]) == 2


@pytest.mark.slow
def test_the_loss_is_the_same_on_a_mesh():
  a, b = examples([np.int32([BOS, 0, 1, 2]), np.int32([1, 2, 2, 0])])
  batch = batch_of([[a, b], [b]])
  expected, grads = value_and_grad(params(), batch)
  with jax.set_mesh(sharding.make_mesh('fsdp:2,tensor:2', jax.devices()[:4])):
    loss, other = value_and_grad(placed(MODEL, params()), sharding.shard_rows(batch, jax.sharding.get_mesh()))
  assert float(loss) == pytest.approx(float(expected), rel=1e-5)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), grads, other)
