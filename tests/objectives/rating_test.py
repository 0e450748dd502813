"""The loss of ratings is the mean squared error of first tokens, computed one pair at a time by hand."""
import jax
import numpy as np
from helpers.encoders import jit, random_params

from lm.data.batch import Batch, RatedPair, Row, Special, blank, template
from lm.models import encoder
from lm.objectives import rating

SPECIAL = Special(30, 31, 32, ())
MODEL = encoder.scorer(encoder.bert(32, 16, 2, 2, 48))


def pair(seed, references=1):
  rng = np.random.default_rng(seed)
  ids = lambda: rng.integers(0, 30, rng.integers(1, 6)).astype('i4')
  return RatedPair(tuple(ids() for _ in range(references)), ids(), float(rng.uniform()))


def test_an_example_has_both_texts_and_the_rating_at_its_first_token():
  example = rating.example(RatedPair((np.array([1, 2]),), np.array([3]), 0.7), np.random.default_rng(0), SPECIAL)
  assert example.tokens.tolist() == [30, 1, 2, 31, 3, 31] and example.weights.tolist() == [1, 0, 0, 0, 0, 0]
  assert example.columns['types'].tolist() == [0, 0, 0, 0, 1, 1]
  assert example.columns['ratings'].tolist() == [np.float32(0.7), 0, 0, 0, 0, 0]


def test_each_reference_is_drawn():
  several = pair(0, references=3)
  rng = np.random.default_rng(0)
  drawn = {tuple(rating.example(several, rng, SPECIAL).tokens[1:]) for _ in range(60)}
  assert drawn == {(*reference, 31, *several.candidate, 31) for reference in several.references}


def test_the_loss_of_packed_rows_is_that_of_each_pair_alone():
  objective, pairs = rating.rating(), [pair(seed) for seed in range(5)]
  batch = blank(template(objective, SPECIAL, 48), 3)   # the last row is empty
  rows = [Row(batch, i) for i in range(2)]
  for i, each in enumerate(pairs):
    rows[i % 2].add(rating.example(each, np.random.default_rng(0), SPECIAL))
  params = random_params(MODEL)
  loss, count, sums = jit(lambda params: objective.loss(MODEL.apply, params, batch, None))(params)
  errors = []
  for each in pairs:
    example = rating.example(each, np.random.default_rng(0), SPECIAL)
    out = jit(MODEL.apply)(params, Batch(example.tokens[None], types=example.columns['types'][None]))
    errors.append(abs(float(out.head(out.hidden)[0, 0]) - each.rating))
  np.testing.assert_allclose(loss, np.sum(np.square(errors)), rtol=1e-4)
  assert count == len(pairs) == sums['tokens'] and sums['correct'] == sum(error < 0.1 for error in errors)
  np.testing.assert_allclose(sums['rating/error'][0], np.sum(errors), rtol=1e-4)


def test_a_few_steps_learn_what_a_token_says():
  """The rating is whether the candidate has the token 5: gradient descent finds it."""
  import optax
  objective, rng = rating.rating(), np.random.default_rng(0)
  batch = blank(template(objective, SPECIAL, 48), 16)
  for i in range(16):
    words = rng.integers(6, 30, 4).astype('i4')
    words[0] = 5 if i % 2 else 7
    each = RatedPair((np.array([9], 'i4'),), words, float(i % 2))
    Row(batch, i).add(rating.example(each, rng, SPECIAL))
  optimizer = optax.adam(3e-3)

  @jax.jit
  def step(carry, _):
    params, state = carry
    loss, grads = jax.value_and_grad(lambda p: objective.loss(MODEL.apply, p, batch, None)[0] / 16)(params)
    updates, state = optimizer.update(grads, state)
    return (optax.apply_updates(params, updates), state), loss
  params = jax.jit(MODEL.init)(jax.random.key(0))
  _, losses = jax.lax.scan(step, (params, optimizer.init(params)), None, 60)
  assert losses[-1] < 0.02 < 0.2 < losses[0]
