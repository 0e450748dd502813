"""Multi-head latent attention equals NumPy, its cache the full forward pass, on every mesh, and `transformers`."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.meshes import on
from helpers.slow import slow

from lm import sharding
from lm.data.batch import Batch
from lm.models import attention, latent, layers, rotary, stack, transformer
from lm.models.context import Context

ROWS, TIME, WIDTH, HEADS, RANK, NOPE, ROPE, VALUE = 4, 7, 16, 4, 8, 5, 4, 3
FULL = latent.LatentAttention(HEADS, 8, RANK, NOPE, ROPE, VALUE, rotary.Rotary(50., interleaved=True))
PLAIN = FULL.clone(query_rank=None, scores=attention.AttentionScores(scale=0.5))
BIASED = FULL.clone(bias=True)
ALL = pytest.mark.parametrize('module', [FULL, PLAIN, BIASED], ids=['query_rank', 'plain_query', 'bias'])
# These programs are run once or twice: optimising them takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})
SEGMENTS = np.array([[1] * 7, [1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 3, 3], [1, 1, 1, 1, 1, 1, 2]], 'i4')
POSITIONS = np.stack([np.arange(TIME) - np.searchsorted(row, row) for row in SEGMENTS]).astype('i4')


def shapes(module):
  def init():
    x, positions = jnp.zeros((ROWS, 1, WIDTH)), jnp.zeros((ROWS, 1), jnp.int32)
    x, positions = sharding.constrain(x, 'BTD'), sharding.constrain(positions, 'BT')
    return module.init(jax.random.key(0), x, Context(positions, attention.Visible()))['params']
  return jax.eval_shape(init)


def random_params(module):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: (0.5 * rng.normal(size=x.shape) + (x.ndim == 1)).astype('f4'), shapes(module))


def inputs():
  return np.random.default_rng(1).normal(size=(2, ROWS, TIME, WIDTH)).astype('f4')


def run(module, params, x, dy):
  """Returns the output for packed rows, and the gradients of <output, dy> by the parameters and x."""
  def apply(params, x):
    segments, positions = (sharding.constrain(jnp.asarray(a), 'BT') for a in (SEGMENTS, POSITIONS))
    x = sharding.constrain(x, 'BTD')
    return module.apply({'params': params}, x, Context(positions, attention.Visible(segments, segments)))[0]

  y, back = jax.vjp(apply, params, x)
  return y, *back(sharding.constrain(dy, 'BTD'))


def reference(p, x, scale):
  """Returns the output by the equations of the DeepSeek-V2 paper, one head at a time."""
  def norm(x, p):
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * p['scale']

  def rotate(x):   # [B, T, ROPE]: adjacent entries form a complex number
    turn = np.exp(1j * POSITIONS[..., None] * 50. ** (-np.arange(0, ROPE, 2) / ROPE))
    z = (x[..., ::2] + 1j * x[..., 1::2]) * turn
    return np.stack([z.real, z.imag], -1).reshape(x.shape)

  def down(name):
    return x @ p[name] + p.get(name + '_bias', 0)

  query = p['query'] if 'query' in p else p['query_up']
  latents = x if 'query' in p else norm(down('query_down'), p['query_norm'])
  c = norm(down('key_value_down'), p['key_value_norm'])
  k_rope = rotate(down('key_rope'))
  sees = np.tri(TIME, dtype=bool) & (SEGMENTS[:, :, None] == SEGMENTS[:, None])
  y = p.get('out_bias', 0)
  for head in range(HEADS):
    q = latents @ query[:, head]
    scores = q[..., :NOPE] @ (c @ p['key_up'][:, head]).swapaxes(1, 2) + rotate(q[..., NOPE:]) @ k_rope.swapaxes(1, 2)
    weights = np.where(sees, np.exp(scores * scale), 0)
    y = y + weights / weights.sum(-1, keepdims=True) @ (c @ p['value_up'][:, head]) @ p['out'][head]
  return y


def assert_close(actual, expected, tolerance=2e-5):
  """Asserts that arrays agree within `tolerance` of the largest absolute expected value."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


@functools.cache
def without_mesh(module):
  return jax.tree.map(np.asarray, jit(functools.partial(run, module))(random_params(module), *inputs()))


@ALL
def test_output_and_gradients_are_those_of_numpy(module):
  params, (x, dy) = random_params(module), inputs()
  scale = 0.5 if module is PLAIN else (NOPE + ROPE) ** -0.5
  y, dparams, dx = without_mesh(module)
  leaves, tree = jax.tree.flatten(jax.tree.map(np.float64, (params, x)))
  assert_close(y, reference(*tree.unflatten(leaves), scale))
  rng = np.random.default_rng(2)
  for i, (path, grad) in enumerate(jax.tree_util.tree_leaves_with_path((dparams, dx))):
    for _ in range(2):
      direction = rng.normal(size=grad.shape)

      def moved(by, i=i, direction=direction):
        near = [*leaves[:i], leaves[i] + by * direction, *leaves[i + 1:]]
        return np.sum(reference(*tree.unflatten(near), scale) * dy)

      slope = (moved(1e-6) - moved(-1e-6)) / 2e-6
      assert np.linalg.norm(grad) > 1e-3, path
      assert abs(np.sum(grad * direction) - slope) < 2e-5 * np.linalg.norm(grad) * np.sqrt(grad.size), path


@pytest.mark.parametrize('shape', ['fsdp:2,tensor:4', *slow('fsdp:1', 'fsdp:4,tensor:2')])
def test_output_and_gradients_are_the_same_on_every_mesh(shape):
  expected = without_mesh(BIASED)
  with on(shape):
    layouts = jax.tree.map(lambda x: jax.sharding.NamedSharding(jax.sharding.get_mesh(), x.sharding.spec),
                           shapes(BIASED))
    params = jax.device_put(random_params(BIASED), layouts)
    actual = jit(functools.partial(run, BIASED))(params, *inputs())
    jax.tree.map(functools.partial(assert_close, tolerance=5e-6), actual, expected)


def test_heads_are_split_over_tensor_and_ranks_over_fsdp():
  P = jax.sharding.PartitionSpec
  with on('fsdp:2,tensor:4'):
    specs = jax.tree.map(lambda x: x.sharding.spec, shapes(FULL))
  heads = P('fsdp', 'tensor', None)
  assert {k: v for k, v in specs.items() if not k.endswith('norm')} == {
      'query_down': P('fsdp', None), 'query_up': heads, 'key_value_down': P('fsdp', None),
      'key_rope': P('fsdp', None), 'key_up': heads, 'value_up': heads, 'out': P('tensor', None, 'fsdp')}


def test_a_packed_document_is_as_if_alone():
  params, (x, _) = random_params(FULL), inputs()
  changed = np.where((SEGMENTS == 1)[..., None], x + 1, x)
  after, before = jit(lambda x: run(FULL, params, x, x)[0])(changed), without_mesh(FULL)[0]
  assert_close(after[SEGMENTS > 1], before[SEGMENTS > 1], 1e-6)
  assert np.abs(after - before).max() > 0.1


def model(module):
  block = layers.Block(module, layers.FeedForward(8), layers.RMSNorm(), layers.RMSNorm())
  return transformer.Transformer(24, WIDTH, stack.stacks([block] * 2), layers.RMSNorm(), TIME)


@pytest.mark.parametrize('module,chunks,shape', [
    (FULL, [1] * TIME, None), *slow((PLAIN, [4, 1, 1, 1], 'fsdp:2,tensor:4'))], ids=['one_by_one', 'fsdp:2,tensor:4'])
def test_cached_decoding_equals_the_full_forward(module, chunks, shape):
  """Rows of unequal length are padded on the left, and the cache has more slots than needed."""
  lm, rng = model(module), np.random.default_rng(0)
  tokens, pads, slots = rng.integers(0, 24, (ROWS, TIME)).astype('i4'), np.array([0, 2, 3, 5]), np.arange(TIME)[None]
  padded = Batch(np.stack([np.roll(row, p) for row, p in zip(tokens, pads)]),
                 segments=(slots >= pads[:, None]).astype('i4'),
                 positions=np.maximum(slots - pads[:, None], 0).astype('i4'))
  params = jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype('f4'),
                        jax.eval_shape(lm.init, jax.random.key(0)))
  expected = jit(lambda params: lm.apply(params, Batch(tokens)).hidden)(params)
  with on(shape):
    if shape:
      params = jax.device_put(params, jax.tree.map(
          lambda x: jax.sharding.NamedSharding(jax.sharding.get_mesh(), x.sharding.spec),
          jax.eval_shape(lm.init, jax.random.key(0))))
    step = jit(lambda params, batch, cache: lm.apply(params, batch, cache=cache)[:3:2])
    cache, outputs, start = jit(lambda: lm.init_cache(ROWS, TIME + 3))(), [], 0
    assert [x.shape for x in jax.tree.leaves(cache.layers)] == [(ROWS, TIME + 3, RANK + ROPE)] * 2
    for size in chunks:
      hidden, cache = step(params, jax.tree.map(lambda x, a=start, b=start + size: x[:, a:b], padded), cache)
      outputs.append(np.asarray(hidden))
      start += size
  for row, pad in enumerate(pads):
    assert_close(np.concatenate(outputs, axis=1)[row, pad:], expected[row, :TIME - pad], 1e-5)


def test_one_key_head_is_still_decoded_on_a_mesh():
  """The cache is split over a `model` axis of one device."""
  with on('fsdp:4'):
    lm = model(attention.Attention(4, 1, 4))
    step = lambda: lm.apply(lm.init(jax.random.key(0)), Batch(jnp.zeros((4, 1), jnp.int32)), cache=lm.init_cache(4, 4))
    assert jax.eval_shape(step).hidden.shape == (4, 1, WIDTH)


@pytest.mark.filterwarnings('default')
@pytest.mark.parametrize('query_rank,yarn', [(8, False), (None, True)])
def test_deepseek_v3_is_that_of_transformers(query_rank, yarn):
  torch = pytest.importorskip('torch')
  hf = pytest.importorskip('transformers')
  from transformers.models.deepseek_v3 import modeling_deepseek_v3 as theirs
  rope = {'rope_theta': 50., 'rope_type': 'default'}
  if yarn:
    rope = {'rope_theta': 50., 'rope_type': 'yarn', 'factor': 40., 'mscale': 1., 'mscale_all_dim': 1.,
            'original_max_position_embeddings': 64, 'beta_fast': 32, 'beta_slow': 1}
  config = hf.DeepseekV3Config(
      hidden_size=WIDTH, num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=query_rank,
      kv_lora_rank=RANK, qk_nope_head_dim=NOPE, qk_rope_head_dim=ROPE, v_head_dim=VALUE, rope_parameters=rope,
      max_position_embeddings=2560, attn_implementation='eager', rope_interleave=True)
  torch.manual_seed(0)
  module, embedding = theirs.DeepseekV3Attention(config, 0), theirs.DeepseekV3RotaryEmbedding(config)
  rng = np.random.default_rng(0)
  x, positions = inputs()[0], np.broadcast_to(np.arange(TIME) * 17, (ROWS, TIME))
  with torch.no_grad():
    for name, tensor in module.state_dict().items():
      tensor.copy_(torch.from_numpy(rng.normal(size=tuple(tensor.shape)) * 0.5 + ('norm' in name)))
    mask = torch.full((TIME, TIME), -1e9).triu(1)[None, None]
    cos_sin = embedding(torch.from_numpy(x), torch.from_numpy(positions.copy()))
    expected = module.eval()(torch.from_numpy(x), cos_sin, mask)[0].numpy()
  t = {k.removesuffix('.weight'): v.numpy() for k, v in module.state_dict().items()}
  kv_down, kv_up = t['kv_a_proj_with_mqa'].T, t['kv_b_proj'].T.reshape(RANK, HEADS, NOPE + VALUE)
  params = {'key_value_down': kv_down[:, :RANK], 'key_rope': kv_down[:, RANK:], 'key_up': kv_up[..., :NOPE],
            'value_up': kv_up[..., NOPE:], 'out': t['o_proj'].T.reshape(HEADS, VALUE, WIDTH),
            'key_value_norm': {'scale': t['kv_a_layernorm']}}
  if query_rank is None:
    params['query'] = t['q_proj'].T.reshape(WIDTH, HEADS, NOPE + ROPE)
  else:
    params |= {'query_down': t['q_a_proj'].T, 'query_norm': {'scale': t['q_a_layernorm']},
               'query_up': t['q_b_proj'].T.reshape(query_rank, HEADS, NOPE + ROPE)}
  ours = FULL.clone(query_rank=query_rank)
  if yarn:   # mscale / mscale_all_dim is 1 here; its square scales the scores
    scale = (NOPE + ROPE) ** -0.5 * (0.1 * np.log(40.) + 1) ** 2
    ours = ours.clone(rotary=rotary.Rotary(50., interleaved=True, scaling=rotary.Yarn(40., 64, 1.)),
                      scores=attention.AttentionScores(scale=float(scale)))
  assert jax.tree.map(np.shape, params) == jax.tree.map(lambda s: s.shape, shapes(ours))
  actual = jit(lambda params: ours.apply({'params': params}, x, Context(
      jnp.asarray(positions, jnp.int32), attention.Visible()))[0])(params)
  assert 0.1 < np.abs(expected).max() < 50
  np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4)
