"""Speculative decoding writes the text, or draws from the distribution, of the trunk alone, whatever is drafted."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decoders import GREEDY, PROMPTS, Bytes, rows_of
from helpers.slow import slow

from lm import generate, sharding
from lm.data.batch import Batch
from lm.generate import completion, module_drafts, speculative
from lm.models import attention, latent, prediction_heads, rotary, stack, transformer
from lm.models import layers as parts

RNG = np.random.default_rng(0)
P, Q = RNG.dirichlet(np.ones(5), 2).astype('f4')


def random_params(model, scale):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype('f4'),
                      jax.eval_shape(model.init, jax.random.key(0)))


# The rule.


@pytest.mark.parametrize(('drafts', 'target', 'expected'), [
    ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]), ([1, 2, 3], [1, 5, 3, 4], [1, 5]), ([1, 2], [1, 2, 5], [1, 2, 5]),
    ([3], [7, 6], [7])])
def test_greedy_drafts_are_accepted_as_published(drafts, target, expected):
  one_hot = lambda ids: jax.nn.one_hot(jnp.array([ids]), 8)
  accepted, token = speculative.verify(one_hot(target), one_hot(drafts), jnp.array([drafts]),
                                       jnp.full((1, len(drafts)), 0.999), jax.random.split(jax.random.key(0), 1))
  assert [*drafts[:int(accepted[0])], int(token[0])] == expected


def chi_square(tokens, p):
  counts = np.bincount(tokens, minlength=len(p))
  return np.square(counts - len(tokens) * p) @ (1 / (len(tokens) * p))


def test_tokens_are_distributed_as_the_model_says_whatever_was_drafted():
  """Of 100,000 pairs of drafts on a table of 5 tokens, each emitted token has the distribution of its place."""
  n, keys = 100_000, jax.random.split(jax.random.key(1), 4)
  p = np.stack([P, Q[::-1], P[::-1]])
  q = np.stack([Q, P])
  drafts = jnp.stack([jax.random.categorical(key, jnp.log(x), shape=(n,)) for key, x in zip(keys, q)], 1)
  uniform = jax.random.uniform(keys[2], (n, 2))
  accepted, token = jax.jit(speculative.verify)(*(jnp.broadcast_to(x, (n, *x.shape)) for x in (p, q)), drafts, uniform,
                                                jax.random.split(keys[3], n))
  accepted, emitted = np.asarray(accepted), np.asarray(jnp.pad(drafts, ((0, 0), (0, 1))))
  emitted = np.where(np.arange(3)[None] == accepted[:, None], np.asarray(token)[:, None], emitted)
  for place in range(3):
    value = chi_square(emitted[accepted >= place, place], p[place].astype('f8'))
    assert value < 18.5   # at 4 degrees of freedom, one sample in 1000 exceeds this
  assert (accepted >= 1).mean() == pytest.approx(np.minimum(p[0], q[0]).sum(), abs=0.01)


def test_equal_distributions_are_always_accepted():
  accepted, _ = speculative.verify(jnp.stack([P, P])[None], P[None, None], jnp.array([[2]]), jnp.array([[0.9999999]]),
                                   jax.random.split(jax.random.key(0), 1))
  assert int(accepted[0]) == 1


class Tables(transformer.LanguageModel):
  """A model that draws from P, and drafts from Q."""
  vocab: int = 5
  max_length: int = 99
  depths: int = 2

  def unstack(self, params):
    return params

  def init_cache(self, batch_size, slots):
    return transformer.Cache((), jnp.zeros((batch_size, slots), int), jnp.zeros((batch_size, slots), int),
                             jnp.zeros(batch_size, int))

  def init_depth_caches(self, batch_size, slots):
    return 0, 0

  def apply(self, params, batch, *, key=None, cache=None):
    head = lambda h: jnp.log(jnp.where(h == 0, P[None, None], Q[None, None]))
    return transformer.Output(jnp.zeros((*batch.tokens.shape, 1)), head, cache)

  def depth(self, params, k, hidden, *args):
    return hidden + 1, hidden + 1, 0, None


class Five(Bytes):
  vocab_size, bos_id, eos_id = 5, 0, 77   # never ends

  def encode_batch(self, texts):
    return [np.zeros(len(text), np.int32) for text in texts]


@pytest.mark.parametrize('temperature', [1., 0.6])
def test_decoding_draws_from_the_model_and_counts_what_was_accepted(temperature):
  draft, softmax = module_drafts.SelfSpeculation(), lambda p: p ** (1 / temperature) / (p ** (1 / temperature)).sum()
  samples = np.stack(rows_of(Tables(), None, [''] * 512, generate.Sampling(temperature), 32, draft=draft,
                             tokenizer=Five(), seed=3))
  p, q = softmax(P.astype('f8')), softmax(Q.astype('f8'))
  assert samples.shape == (512, 32) and chi_square(samples.ravel(), p) < 18.5
  repeats = (samples[:, 1:] == samples[:, :-1]).mean(), (samples[1:] == samples[:-1]).mean()
  np.testing.assert_allclose(repeats, np.square(p).sum(), atol=0.02)   # steps and rows are independent
  each = np.minimum(p, q).sum()
  assert draft.acceptance == pytest.approx((each + each ** 2) / 2, abs=0.02)
  assert draft.tokens_per_pass == pytest.approx(1 + each + each ** 2, abs=0.04)


class Recurrent(Tables):
  """A model whose cache has a state of a recurrence, which cannot forget tokens."""

  def init_cache(self, batch_size, slots):
    return super().init_cache(batch_size, slots)._replace(layers=(jnp.zeros((batch_size, 4)),))


def test_a_recurrent_trunk_is_refused():
  with pytest.raises(ValueError, match='keys and values for each token, .* Recurrent has another cache'):
    rows_of(Recurrent(), None, ['a'], generate.Sampling(), 4, draft=module_drafts.SelfSpeculation(), tokenizer=Five())


# Models.

KINDS = pytest.mark.parametrize('kind', [prediction_heads.parallel, *slow(prediction_heads.sequential)],
                                ids=['parallel', 'sequential'])


def trunk(attend, positions=False):
  block = parts.Block(attend, parts.FeedForward(16), parts.RMSNorm(), parts.RMSNorm())
  return transformer.Transformer(264, 32, stack.stacks([block]), parts.RMSNorm(), 64, positions, tied=False)


WINDOW = trunk(attention.Attention(4, 2, 8, rotary.Rotary(), scores=attention.AttentionScores(window=5)))
LATENT = trunk(latent.LatentAttention(4, None, 8, 4, 4, 8), positions=True)


@pytest.mark.parametrize('model', [
    pytest.param(prediction_heads.sequential(WINDOW, 2), id='window', marks=pytest.mark.slow),
    pytest.param(prediction_heads.parallel(LATENT, 2), id='latent', marks=pytest.mark.slow)])
def test_greedy_text_is_that_of_the_trunk(model):
  """Up to the last place of the model, with rows that end early among them."""
  params = random_params(model, 0.6)
  plain = rows_of(model.trunk, params, PROMPTS, GREEDY, 37)
  draft = module_drafts.SelfSpeculation()
  assert_equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  assert_equal(rows_of(model, params, PROMPTS, GREEDY, 37, draft=draft), plain)
  assert draft.proposed == draft.passes * model.depths > 0

  class Ends(Bytes):
    eos_ids = 257, int(plain[0][8])

  ended = [row[:next((i + 1 for i, token in enumerate(row) if token in Ends.eos_ids), len(row))] for row in plain]
  assert_equal(rows_of(model, params, PROMPTS, GREEDY, 37, draft=draft, tokenizer=Ends()), ended)
  assert len(ended[0]) < len(plain[0])


SMALL = transformer.llama(12, 16, 1, heads=2, hidden=16, max_length=64)


class Twelve(Bytes):
  vocab_size, bos_id, eos_id = 11, 0, 10

  def encode_batch(self, texts):
    return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) % 10 for text in texts]


@pytest.mark.slow
@KINDS
def test_drafts_are_those_of_the_modules_without_a_cache(kind):
  """After each round, whatever was accepted, the modules have read the true tokens and the earlier drafts."""
  model, words = kind(SMALL, 2), Twelve()
  params, sampling = random_params(model, 0.25), generate.Sampling()   # flat distributions, so most drafts are accepted
  ids = words.encode_batch(PROMPTS[:3])
  batch, stream = completion.prompt_batch(model, ids, words), generate.random_streams(ids, 3, 0)
  engine = module_drafts.SelfSpeculation().engine(model, model.unstack(params), 59, 11, (77,))
  state, _ = engine.prefill(batch, generate.settings([sampling] * 3, [0] * 3, stream), [27] * 3)

  @jax.jit
  def forward(params, tokens):
    out = model.apply(params, Batch(tokens))
    return [out.head(hidden) for hidden in out.ahead]

  steps, first = [], np.asarray(state.first_B)
  for _ in range(6):
    tokens, index, drafted = (np.asarray(x) for x in (state.tokens_BS, state.cache.index, state.drafted_BDV))
    for row in range(3):
      padded = np.zeros((1, 64), np.int32)
      padded[0, :index[row] + 3 - first[row]] = tokens[row, first[row]:index[row] + 3]   # with the drafts
      for k, logits in enumerate(forward(params, padded)):
        expected = jax.nn.softmax(logits[0, index[row] - 1 - first[row], :11])
        np.testing.assert_allclose(drafted[row, k, :11], expected, rtol=1e-3, atol=1e-5)
    state, _ = engine.step(state, 1)
    steps.append(np.asarray(state.cache.index) - index)
  # Rows where all drafts are accepted, and rows where none is.
  assert {1, 3} <= set(np.concatenate(steps).tolist()) and len(set(map(tuple, steps))) > 2


@pytest.mark.slow
def test_a_completion_depends_neither_on_its_batch_nor_on_the_mesh():
  model = prediction_heads.sequential(SMALL.clone(vocab=13), 2)
  params, make = random_params(model, 0.5), functools.partial(rows_of, sampling=generate.Sampling(top_p=0.9), n=24,
                                                              tokenizer=Twelve(), seed=5)
  together = make(model, params, PROMPTS[:3], draft=module_drafts.SelfSpeculation())
  alone = make(model, params, PROMPTS[1:2], draft=module_drafts.SelfSpeculation())
  np.testing.assert_array_equal(alone[0], together[1])
  with jax.set_mesh(sharding.make_mesh('fsdp:2,tensor:2', jax.devices()[:4])):
    placed = jax.tree.map(lambda x, like: jax.device_put(
        x, jax.sharding.NamedSharding(jax.sharding.get_mesh(), like.sharding.spec)), params,
                          jax.eval_shape(model.init, jax.random.key(0)))
    for row, expected in zip(make(model, placed, PROMPTS[:3], draft=module_drafts.SelfSpeculation()), together):
      np.testing.assert_array_equal(row, expected)


@pytest.mark.slow
def test_fewer_drafts_than_depths_are_allowed_and_bad_requests_refused():
  model = prediction_heads.sequential(SMALL, 2)
  params, draft = random_params(model, 0.5), module_drafts.SelfSpeculation(1)

  def call(model, draft, **settings):
    sampling = generate.Sampling(**settings)
    return generate.generate(model, params, Twelve(), ['ab'], sampling, max_tokens=8, draft=draft)

  call(model, draft)
  assert draft.proposed == draft.passes and draft.tokens_per_pass == 1 + draft.acceptance
  for error, bad, settings in [('drafts=3: this model can draft 1 to 2', module_drafts.SelfSpeculation(3), {}),
                               ('repetition_penalty=1.2', draft, {'repetition_penalty': 1.2})]:
    with pytest.raises(ValueError, match=error):
      call(model, bad, **settings)
  with pytest.raises(ValueError, match='nothing to draft with'):
    call(SMALL, module_drafts.SelfSpeculation())
