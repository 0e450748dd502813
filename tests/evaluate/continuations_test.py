"""Continuations of a context that is read once have the scores of the whole texts, and the same bits in any company."""
import jax
import numpy as np
import pytest
from helpers import decoders, meshes
from helpers.slow import slow

from lm.evaluate import continuations, score
from lm.models import attention, latent, layers, rotary, stack, transformer

STARTS, SIZES = (70, 128, 64, 66, 2, 127, 70), (1, 33, 2, 65)   # tokens of contexts and of continuations


def trunk(mixer):
  block = layers.Block(mixer, layers.FeedForward(32), layers.RMSNorm(), layers.RMSNorm())
  return transformer.Transformer(264, 32, stack.stacks([block] * 2), layers.RMSNorm(), 128)


MODELS = {'window': trunk(attention.Attention(4, 2, 8, rotary.Rotary(), scores=attention.AttentionScores(window=20))),
          'latent': trunk(latent.LatentAttention(4, None, 8, 4, 4, 8, rotary.Rotary()))}


@pytest.fixture(scope='module')
def texts():
  """Returns (tokens, start) of the continuations of each context, as far as they fit the 129 tokens of the models."""
  rng, result = np.random.default_rng(0), []
  for start in STARTS:
    context = rng.integers(258, size=start)
    sizes = [size for size in SIZES if start + size <= 129]
    result += [(np.concatenate([context, rng.integers(258, size=size)]), start) for size in sizes]
  return result


def predicted(model, params, texts):
  return continuations.predictions(model, params, *map(list, zip(*texts)))


def check(model, params, texts, values, tolerance):
  """Checks predictions against those of each text in one piece."""
  whole = score.predictions(model, params, [tokens for tokens, _ in texts])
  for one, (_, start), expected in zip(values, texts, whole, strict=True):
    for a, b in zip(one, expected, strict=True):
      np.testing.assert_allclose(a, b[start - 1:], atol=tolerance)


def test_scores_are_those_of_whole_texts_with_the_same_bits_in_any_company(texts, monkeypatch):
  model, params = decoders.make(transformer.gpt2)
  read, contexts_of = [], continuations._contexts
  monkeypatch.setattr(continuations, '_contexts', lambda contexts, *args: read.extend(contexts) or contexts_of(
      contexts, *args))
  before = [function._cache_size() for function in (score.predict, continuations._read)]
  together = predicted(model, params, texts)
  programs = [function._cache_size() for function in (score.predict, continuations._read)]
  # Contexts of 65 to 129 tokens have rows of 128 columns, continuations have 32 or 64, and whole texts 32 to 128.
  assert programs[0] - before[0] <= 2 + 5 and programs[1] - before[1] == 1
  assert sorted(map(len, read)) == sorted(start - 1 for start in STARTS if start > 64)
  check(model, params, texts, together, 1e-4)
  jax.tree.map(np.testing.assert_array_equal, predicted(model, params, texts[::-1]), together[::-1])
  for number in (0, 3, len(texts) - 1):
    jax.tree.map(np.testing.assert_array_equal, predicted(model, params, texts[number:number + 1]),
                 together[number:number + 1])


@pytest.mark.parametrize('name,mesh', [('window', 'fsdp:1'), *slow(
    ('latent', 'fsdp:4,tensor:2'), ('window', 'fsdp:4,tensor:2'))])
def test_each_attention_and_mesh_has_the_scores_of_whole_texts(texts, name, mesh):
  with meshes.on(mesh):
    params = jax.jit(MODELS[name].init)(jax.random.key(0))
    values = predicted(MODELS[name], params, texts)
    check(MODELS[name], params, texts, values, 2e-5)


def test_texts_with_other_positions_when_they_are_long_are_scored_whole(texts):
  scaling = rotary.LongRope((1.,) * 4, (9.,) * 4, 100, 1.)
  model = trunk(attention.Attention(4, 2, 8, rotary.Rotary(scaling=scaling)))
  with meshes.on('fsdp:1'):
    params = jax.jit(model.init)(jax.random.key(0))
    check(model, params, texts, predicted(model, params, texts), 0)
