"""Models that are trained to denoise see what the marks of the objective allow, and decode with a cache."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.documents import documents
from helpers.slow import slow

from lm.data import tokenizers
from lm.data.batch import Batch, Special
from lm.data.rows.packed_documents import Stream
from lm.models import attention, layers, rotary, stack, transformer
from lm.objectives import infill, masked, prefix, span_corruption
from lm.objectives.span_corruption import DECODER

BEGIN, END, TIME, VOCAB = 0, 1, 24, 128
NAMES = tokenizers.sentinels(8)


@functools.cache
def model(window=None):
  heads = attention.Attention(2, 2, 4, rotary.Rotary(10_000.), scores=attention.AttentionScores(window=window))
  block = layers.Block(heads, layers.FeedForward(16), layers.RMSNorm(), layers.RMSNorm())
  decoder = transformer.Transformer(VOCAB, 8, stack.stacks([block]), layers.RMSNorm(), TIME)
  rng = np.random.default_rng(0)
  shapes = jax.eval_shape(decoder.init, jax.random.key(0))
  return decoder, jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape) + (x.ndim < 3)).astype('f4'), shapes)


def packed(objective) -> Batch:
  """Returns a batch with several segments in a row, in which no token of the text occurs twice."""
  ids = Special(BEGIN, END, VOCAB, tuple(range(100, 100 + len(objective.control)))[:VOCAB - 100])
  return Stream(objective, ids, TIME, 3, None, store=documents([6, 12, 30, 9]))(0)


@pytest.mark.parametrize('window', [3, *slow(None)])
@pytest.mark.parametrize('objective', [
    prefix.prefix(), masked.masked(), span_corruption.span_corruption(layout=DECODER, sentinels=NAMES),
    infill.infill(1.)], ids=['prefix', 'masked', 'spans', 'infill'])
def test_no_position_depends_on_a_target_or_another_segment(objective, window):
  """By the gradient of each position by the embedding of each place; the model has one layer."""
  decoder, params = model(window)
  batch = packed(objective)
  # Each place a token of its own, so that the rows of the table are the places.
  places = np.arange(3 * TIME).reshape(3, TIME).astype(np.int32)
  marks = np.zeros_like(places, bool) if batch.bidirectional is None else batch.bidirectional

  def hidden(table):
    inputs = batch._replace(tokens=places, targets=None, weights=None)
    return decoder.apply({**params, 'embedding': table}, inputs).hidden @ jnp.arange(1., 9.)

  def slopes(table):   # one position at a time, because jacrev would run 72 at once
    back = jax.vjp(hidden, table)[1]
    one_hot = jnp.eye(3 * TIME).reshape(3 * TIME, 3, TIME)
    return jax.lax.map(lambda position: back(position)[0], one_hot)                      # [B T, V, D]

  gradients = np.asarray(jax.jit(slopes)(params['embedding']))
  depends = np.any(gradients != 0, axis=-1)[:, :3 * TIME].reshape(3, TIME, 3, TIME)
  t = np.arange(TIME)
  expected = ((t[:, None] >= t) | marks[:, None]) & (batch.segments[:, :, None] == batch.segments[:, None])
  if window:
    expected = expected & (abs(t[:, None] - t) < window)
  for row in range(3):
    real = batch.segments[row] > 0
    np.testing.assert_array_equal(depends[row, real, row], expected[row, real])
    assert not depends[row, :, [i for i in range(3) if i != row]].any()
    if objective.prompt is not None:
      for i in np.flatnonzero(batch.weights[row]):
        # A position whose target is weighted sees no later place of its segment, so neither its target nor a later one.
        later = [s for s in range(i + 1, TIME) if batch.segments[row, s] == batch.segments[row, i]]
        assert not depends[row, i, row, later].any()
  assert batch.segments.max() > 1 and batch.weights.any()


@pytest.mark.parametrize('window', [None, 4])
def test_decoding_after_a_bidirectional_prompt_is_the_full_forward(window):
  decoder, params = model(window)
  tokens = np.random.default_rng(0).integers(0, VOCAB, (2, 16)).astype(np.int32)
  segments = np.ones_like(tokens)
  whole = Batch(tokens, segments=segments, bidirectional=np.arange(16)[None].repeat(2, 0) < 9)
  prompt = prefix.bidirectional_prompt(Batch(tokens[:, :9], segments=segments[:, :9]))

  @jax.jit
  def both(params):
    out = decoder.apply(params, prompt, cache=decoder.init_cache(2, 32))

    def step(cache, token):
      out = decoder.apply(params, Batch(token[:, None]), cache=cache)
      return out.cache, out.hidden

    return decoder.apply(params, whole).hidden, out.hidden, jax.lax.scan(step, out.cache, tokens[:, 9:].T)[1]

  full, first, steps = both(params)
  np.testing.assert_allclose(np.concatenate([first, np.moveaxis(steps[:, :, 0], 0, 1)], axis=1), full, atol=2e-4)
