"""A sequence mixer in a file of its own, with a cache of its own, trains, resumes and writes text."""
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import RUN, go, logged, same, saved

from lm import generate
from lm.data.batch import Batch
from lm.data.tokenizers.folder import Bytes

FILE = '''
"""Linear attention with a decay (Sun et al. 2023, RetNet): S <- decay S + k v^T, y = q S; its cache is the state S."""
import flax.linen as nn
import jax
import jax.numpy as jnp

from lm import sharding
from lm.models import attention, layers, stack, transformer


class LinearAttention(nn.Module):
  heads: int
  head_size: int

  @nn.compact
  def __call__(self, x_BTD, context, cache=None):
    q, k, v = (attention.project(self, name, x_BTD, 'NH', self.heads, self.head_size, False, x_BTD.shape[-1] ** -0.5)
               for name in ('query', 'key', 'value'))
    segments = context.visible.segments_BT
    segments = jnp.ones(x_BTD.shape[:2], jnp.int32) if segments is None else segments
    k = jnp.where(segments[:, :, None, None] > 0, k, 0)   # padding adds nothing to the state
    decay, time = 1 - 2. ** -(1 + jnp.arange(self.heads)), x_BTD.shape[1]
    distance = jnp.arange(time)[:, None] - jnp.arange(time)[None]
    weights = jnp.where(distance[None] < 0, 0, decay[:, None, None] ** jnp.maximum(distance, 0)[None])
    same = segments[:, None, :, None] == segments[:, None, None, :]
    y = jnp.einsum('BNTS,BSNH->BTNH', jnp.einsum('BTNH,BSNH->BNTS', q, k) * weights[None] * same, v)
    if cache is not None:
      ages = decay[None] ** (1 + jnp.arange(time))[:, None]   # [T, N]
      y = y + jnp.einsum('BTNH,BNHG->BTNG', q * ages[None, :, :, None], cache)
      left = decay[None] ** (time - 1 - jnp.arange(time))[:, None]
      cache = cache * (decay ** time)[None, :, None, None] + jnp.einsum(
          'BTNH,BTNG->BNHG', k * left[None, :, :, None], v)
    return attention.output(self, y, x_BTD.shape[-1], False, x_BTD.shape[-1] ** -0.5), cache

  @nn.nowrap
  def init_cache(self, batch_size, slots, dtype):
    state = jnp.zeros((batch_size, self.heads, self.head_size, self.head_size), jnp.float32)
    return sharding.constrain(state, 'BN--')


def model(vocab):
  block = layers.Block(LinearAttention(2, 4), layers.FeedForward(16, std=0.3, out_std=0.3), layers.RMSNorm(),
                       layers.RMSNorm())
  return transformer.Transformer(vocab, 8, stack.stacks([block] * 2), layers.RMSNorm(), 64, std=1.)
'''
TEXTS = ['def f(x):', 'a', 'a longer prompt', '']


@pytest.fixture(scope='module')
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp('mixer') / 'linear_attention.py'
  path.write_text(FILE)
  spec = importlib.util.spec_from_file_location('linear_attention', path)
  sys.modules['linear_attention'] = module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.model(RUN.data.tokenizer.vocab_size)


@pytest.mark.slow
def test_a_new_mixer_trains_and_resumes(model, tmp_path):
  go(tmp_path / 'whole', model=model)
  go(tmp_path / 'parts', model=model, steps=2)
  assert go(tmp_path / 'parts', model=model).start == 2
  assert same(saved(tmp_path / 'whole', model=model)[1], saved(tmp_path / 'parts', model=model)[1])
  losses = logged(tmp_path / 'whole')
  assert losses[6] < losses[1]


@pytest.mark.slow
def test_a_cache_of_a_new_kind_continues_unequal_prompts_as_the_full_forward(model):
  params = jax.jit(model.init)(jax.random.key(0))
  tokens = np.random.default_rng(0).integers(3, 200, (2, 9)).astype('i4')
  segments = np.ones((2, 9), 'i4')
  segments[1, :4] = tokens[1, :4] = 0   # the second row is padded on the left
  positions = np.maximum(np.cumsum(segments, 1) - 1, 0).astype('i4')
  whole = Batch(tokens, positions=positions, segments=segments)
  expected = jax.jit(lambda: model.apply(params, whole).hidden)()
  alone = jax.jit(lambda: model.apply(params, Batch(tokens[1:, 4:])).hidden)()
  np.testing.assert_allclose(expected[1, 4:], alone[0], atol=1e-5)
  cache, hidden = model.init_cache(2, 9), []
  for part in (slice(0, 5), slice(5, 6), slice(6, 9)):
    out = model.apply(params, jax.tree.map(lambda x, part=part: x[:, part], whole), cache=cache)
    cache = out.cache
    hidden.append(out.hidden)
  np.testing.assert_allclose(jnp.concatenate(hidden, axis=1)[:, 4:], expected[:, 4:], atol=1e-5)


@pytest.mark.slow
def test_a_new_mixer_writes_each_text_of_a_batch_as_alone(model):
  params, tokenizer = jax.jit(model.init)(jax.random.key(0)), Bytes(('<|a|>', '<|b|>'))
  sampling = generate.Sampling(temperature=0.7)
  together = generate.generate(model, params, tokenizer, TEXTS, sampling, max_tokens=12)
  assert len(set(together)) == len(TEXTS)
  assert together == [generate.generate(model, params, tokenizer, [text], sampling, max_tokens=12)[0] for text in TEXTS]


@pytest.mark.slow
def test_a_scheduler_serves_a_new_mixer(model):
  params, tokenizer = jax.jit(model.init)(jax.random.key(0)), Bytes(('<|a|>', '<|b|>'))
  texts = [np.asarray(ids, np.int32) for ids in tokenizer.encode_batch([*TEXTS, TEXTS[2]])]
  expected = generate.tokens(model, params, tokenizer, texts, generate.Sampling(0), max_tokens=12)
  engine = generate.Engine(model, model.unstack(params), 64, tokenizer.vocab_size, tokenizer.eos_ids)
  scheduler = generate.Scheduler(engine, 2, (4, 1))
  requests = [generate.Request([tokenizer.bos_id, *ids], generate.Sampling(0), 12) for ids in texts]
  for request in requests:
    scheduler.submit(request)
  written = {request: [] for request in requests}
  while scheduler.is_busy:
    for event in scheduler.step():
      written[event.request] += [token for token in event.ids if token not in tokenizer.eos_ids]
  assert list(written.values()) == [ids.tolist() for ids in expected]
  assert scheduler.shared_tokens == 0   # its state has no pages, so every prompt is read
