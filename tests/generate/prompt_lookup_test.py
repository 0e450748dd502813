"""Drafts that are looked up in the text leave the text, and its distribution, those of the model alone."""
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decoders import GREEDY, PROMPTS, Bytes, make, rows_of

from lm import generate
from lm.generate import prompt_lookup
from lm.models import transformer

TABLE = 0.95 * np.random.default_rng(0).dirichlet(np.full(5, 0.4), 5).astype('f4') + np.float32(0.01)


def follower(text, drafts):
  """Returns what `look_up` has to return, by a plain loop."""
  def equal(place):
    count = 0
    while count < 3 and place - count >= 0 and text[place - count] == text[len(text) - 1 - count]:
      count += 1
    return count

  best = max(range(len(text) - 1), key=lambda place: (equal(place), place), default=-1)
  if best < 0 or not equal(best):
    return [-1] * drafts
  period = text[best + 1:]
  return [period[i % len(period)] for i in range(drafts)]


def test_what_followed_the_last_tokens_is_looked_up():
  rng = np.random.default_rng(0)
  for _ in range(300):
    text = rng.integers(0, rng.integers(2, 9), rng.integers(1, 24))
    assert prompt_lookup.look_up(text, 5).tolist() == follower(text.tolist(), 5)


class Chain(transformer.LanguageModel):
  """A model whose next token depends on the last one alone, by TABLE."""
  vocab: int = 5
  max_length: int = 99

  def unstack(self, params):
    return params

  def init_cache(self, batch_size, slots):
    return transformer.Cache((), jnp.zeros((batch_size, slots), int), jnp.zeros((batch_size, slots), int),
                             jnp.zeros(batch_size, int))

  def apply(self, params, batch, *, key=None, cache=None):
    def head(h):
      return jnp.log(TABLE)[h[..., 0].astype(int)]
    cache = cache._replace(index=cache.index + batch.tokens.shape[1])
    return transformer.Output(batch.tokens[..., None].astype('f4'), head, cache)


class Five(Bytes):
  vocab_size, bos_id, eos_id = 5, 0, 77   # never ends

  def encode_batch(self, texts):
    return [np.zeros(len(text), np.int32) for text in texts]


@pytest.mark.parametrize('temperature', [1., 0.6])
def test_tokens_have_the_distribution_of_the_model(temperature):
  draft = prompt_lookup.PromptLookup(3)
  samples = np.stack(rows_of(Chain(), None, [''] * 512, generate.Sampling(temperature), 40, draft=draft,
                             tokenizer=Five(), seed=3))
  p = TABLE.astype('f8') ** (1 / temperature)
  p /= p.sum(1, keepdims=True)
  chi_square = 0
  for token in range(5):
    after = np.bincount(samples[:, 1:][samples[:, :-1] == token], minlength=5)
    expected = after.sum() * p[token]
    assert after.sum() > 100
    chi_square += (np.square(after - expected) / expected)[expected > 0].sum()
  assert chi_square < 45.3   # at 20 degrees of freedom, one sample in 1000 exceeds this
  assert min(draft.accepted, draft.proposed - draft.accepted) > 2000   # otherwise the test shows little


@pytest.mark.slow
def test_greedy_text_is_that_of_the_model_alone_and_repetitions_are_accepted():
  model, params = make(kv_heads=2, tied=False)
  draft = prompt_lookup.PromptLookup(4)
  plain = rows_of(model, params, PROMPTS, GREEDY, 60)
  for row, expected in zip(rows_of(model, params, PROMPTS, GREEDY, 60, draft=draft), plain, strict=True):
    np.testing.assert_array_equal(row, expected)
  assert 0 < draft.acceptance < 1 and 0 < draft.proposed < 4 * draft.passes


def test_what_cannot_be_drafted_is_refused():
  with pytest.raises(ValueError, match='drafts=0 must be from 1 to 15'):
    prompt_lookup.PromptLookup(0)
  with pytest.raises(ValueError, match='drafts=16 must be from 1 to 15'):
    prompt_lookup.PromptLookup(16)
