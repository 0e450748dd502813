"""Decoding with a cache: as long as its slots last, and no longer."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from generate_test import GREEDY, PROMPTS, Bytes, make, tokens_of

from lm.data.batches import Batch
from lm.models import transformer

model_of = functools.cache(make)


@pytest.mark.parametrize('slots', [63, 64, 65, 129])
def test_cached_decoding_is_the_full_forward_around_a_full_cache(slots):
  """Prompts take 32 slots (the longest has 28 tokens), and the cache is made in steps of 64."""
  model, params = model_of(transformer.gpt2)
  count = slots - 32
  made = tokens_of(model, params, PROMPTS, GREEDY, count)

  @jax.jit
  def forward(params, tokens):
    out = model.apply(params, Batch(tokens))
    return out.head(out.hidden)

  rows = [[Bytes.bos_id, *prompt.encode(), *row] for prompt, row in zip(PROMPTS, made)]
  logits = forward(params, np.stack([np.pad(row, (0, 128 - len(row))) for row in np.array(rows, object)]).astype('i4'))
  assert max(map(len, rows)) <= model.max_length
  for row, given, text in zip(made, logits, rows):
    best = np.argmax(given[:, :Bytes.vocab_size], axis=-1)[len(text) - count - 1:len(text) - 1]
    end = np.argmax(row == Bytes.eos_id) + 1 if Bytes.eos_id in row else count
    np.testing.assert_array_equal(row[:end], best[:end])


class Counts(transformer.Model):
  """Writes 1 as long as what it has read fits its cache, and 2 after that."""
  vocab: int = 6
  max_length: int = 1024

  def unstack(self, params):
    return params

  def init_cache(self, batch_size, slots):
    return jnp.int32(slots)

  def apply(self, params, batch, *, key=None, cache=None):
    free = cache - batch.tokens.shape[1]
    token = jnp.where(free < 0, 2, 1)
    return transformer.Output(batch.tokens, lambda h: jnp.broadcast_to(jax.nn.one_hot(token, 6), (*h.shape, 6)), free)


@pytest.mark.parametrize('slots', [17, 63, 64, 65, 66, 127, 128, 129, 130, 193])
def test_what_is_written_fits_the_cache(slots):
  class Six(Bytes):
    vocab_size, bos_id, eos_id = 6, 0, 77   # never ends

  made = tokens_of(Counts(), None, [''], GREEDY, slots - 16, tokenizer=Six())
  assert made.shape == (1, slots - 16) and (made == 1).all()
