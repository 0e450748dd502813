"""Models equal NumPy in float64; each position sees what it should; one computation agrees with itself done in other
ways.
"""
import functools
import operator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.transformers import GPT2, LLAMA, ROWS, THETA, TIME, VOCAB, make_batch, random_params

from lm.data.batch import Batch
from lm.models import attention, transformer
from lm.models.context import Context

MODELS = pytest.mark.parametrize('model', [GPT2, LLAMA], ids=['gpt2', 'llama'])
# These programs are run once or twice: optimising them takes longer than running them.
jit = functools.partial(jax.jit, compiler_options={'xla_backend_optimization_level': 0,
                                                   'xla_llvm_disable_expensive_passes': True})


def sees(batch):
  """Returns which positions each position sees, [B, T, S], from the definition."""
  b, t, s = np.ix_(np.arange(ROWS), np.arange(TIME), np.arange(TIME))
  later_is_hidden = s <= t + 0 * b
  if batch.segments is None:
    return later_is_hidden
  return (later_is_hidden | batch.bidirectional[b, s]) & (batch.segments[b, t] == batch.segments[b, s])


def reference(params, batch):
  """Returns the hidden states and the mean loss in NumPy; the names of parameters say what the model is."""
  def norm(p, x):
    if 'bias' in p:
      return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5) * p['scale'] + p['bias']
    return x / np.sqrt((x ** 2).mean(-1, keepdims=True) + 1e-6) * p['scale']

  def rotate(x):
    half = x.shape[-1] // 2
    turn = np.exp(1j * positions[..., None, None] * THETA ** (-np.arange(half) / half))
    z = (x[..., :half] + 1j * x[..., half:]) * turn
    return np.concatenate([z.real, z.imag], -1)

  def attention(p, x):
    q, k, v = (np.einsum('btd,dnh->btnh', x, p[n]) + p.get(n + '_bias', 0) for n in ('query', 'key', 'value'))
    if 'positions' not in params:
      q, k = rotate(q), rotate(k)
    k, v = (np.repeat(y, q.shape[2] // y.shape[2], axis=2) for y in (k, v))
    scores = np.einsum('btnh,bsnh->bnts', q, k) / np.sqrt(q.shape[-1])
    scores = np.exp(np.where(sees(batch)[:, None], scores, -np.inf))
    y = np.einsum('bnts,bsnh->btnh', scores / scores.sum(-1, keepdims=True), v)
    return np.einsum('btnh,nhd->btd', y, p['out']) + p.get('out_bias', 0)

  def feed_forward(p, x):
    up = x @ p['up'] + p.get('up_bias', 0)
    if 'gate' in p:
      gate = x @ p['gate']
      up = gate / (1 + np.exp(-gate)) * up
    else:
      up = up * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up ** 3))) / 2
    return up @ p['down'] + p.get('down_bias', 0)

  positions = np.arange(TIME)[None] if batch.positions is None else batch.positions
  x = params['embedding'][batch.tokens]
  if 'positions' in params:
    x = x + params['positions'][positions]
  for layer in range(len(params['blocks']['0']['attention']['out'])):
    p = jax.tree.map(operator.itemgetter(layer), params['blocks']['0'])
    x = x + attention(p['attention'], norm(p['attention_norm'], x))
    x = x + feed_forward(p['feed_forward'], norm(p['feed_forward_norm'], x))
  x = norm(params['norm'], x)
  logits = x @ params.get('head', params['embedding']).T
  nll = np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]
  return x, (nll * batch.weights).sum() / batch.weights.sum()


def mean_loss(model, params, batch):
  out = model.apply(params, batch)
  scores = jax.nn.log_softmax(out.head(out.hidden))
  nll = -jnp.take_along_axis(scores, batch.targets[..., None], -1)[..., 0]
  return jnp.sum(nll * batch.weights) / jnp.sum(batch.weights)


forward = jit(lambda model, params, batch: model.apply(params, batch).hidden, static_argnums=0)
decode = jit(lambda model, params, batch, cache: model.apply(params, batch, cache=cache)[:3:2], static_argnums=0)
loss_and_grads = jit(jax.value_and_grad(mean_loss, argnums=1), static_argnums=0)


def assert_close(actual, expected, tolerance=2e-5):
  """Asserts that arrays agree within `tolerance` of the largest absolute expected value."""
  actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
  np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance * np.abs(expected).max())


PACKED = pytest.mark.parametrize('packed', [False, True], ids=['plain', 'packed'])


@PACKED
@MODELS
def test_the_forward_pass_equals_numpy(model, packed):
  params, batch = random_params(model), make_batch(packed)
  assert_close(forward(model, params, batch), reference(jax.tree.map(np.float64, params), batch)[0])


@pytest.mark.parametrize('model,packed', [(GPT2, False), (LLAMA, False), (LLAMA, True)],
                         ids=['gpt2', 'llama', 'llama_packed'])
def test_loss_and_gradients_are_those_of_numpy(model, packed):
  params, batch = random_params(model), make_batch(packed)
  assert ('head' in params) != model.tied
  loss, grads = loss_and_grads(model, params, batch)
  leaves, tree = jax.tree.flatten(jax.tree.map(np.float64, params))
  assert float(loss) == pytest.approx(reference(tree.unflatten(leaves), batch)[1], rel=1e-6)
  rng = np.random.default_rng(2)
  for i, (path, grad) in enumerate(jax.tree_util.tree_leaves_with_path(grads)):
    size = np.linalg.norm(grad)
    # A bias of the keys shifts all scores of a query alike, so its gradient is only rounding.
    assert (size < 1e-6) == (path[-1].key == 'key_bias'), (path, size)
    for _ in range(3):
      direction = rng.normal(size=grad.shape)

      def moved(by, i=i, direction=direction):
        near = [*leaves[:i], leaves[i] + by * direction, *leaves[i + 1:]]
        return reference(tree.unflatten(near), batch)[1]

      slope = (moved(1e-5) - moved(-1e-5)) / 2e-5
      assert abs(np.sum(grad * direction) - slope) < 1e-5 * max(size, 1e-2) * np.sqrt(grad.size), path


@PACKED
def test_a_position_depends_on_what_it_sees_and_on_nothing_else(packed):
  params, batch = random_params(LLAMA), make_batch(packed)
  once = sees(batch).astype(int)
  for row, t in np.ndindex(ROWS, TIME):
    # No token occurs twice and the head is a table of its own: a row of the gradient is that of one input.
    only = np.zeros((ROWS, TIME), 'f4')
    only[row, t] = 1
    _, grads = loss_and_grads(LLAMA, params, batch._replace(weights=only))
    depends = np.any(np.asarray(grads['embedding'])[batch.tokens] != 0, axis=-1)
    expected = np.zeros((ROWS, TIME), bool)
    expected[row] = np.linalg.matrix_power(once[row], len(LLAMA.layers))[t] > 0
    assert expected[row, t + 1:].any() <= packed
    np.testing.assert_array_equal(depends, expected)


@MODELS
def test_packed_documents_are_as_if_alone(model):
  params, batch = random_params(model), make_batch(True)._replace(bidirectional=None)
  hidden = forward(model, params, batch)
  first = batch.segments == 1
  changed = batch._replace(tokens=np.where(first, batch.tokens, (batch.tokens + 5) % VOCAB))
  np.testing.assert_array_equal(forward(model, params, changed)[first], hidden[first])
  assert not np.array_equal(forward(model, params, changed), hidden)
  starts = np.argmax(batch.segments == 2, axis=1)     # moves the second documents to the start of their rows
  alone = Batch(*(None if x is None else np.stack([np.roll(r, -s) for r, s in zip(x, starts)]) for x in batch))
  for row, start in list(enumerate(starts))[1:]:
    length = int((batch.segments[row] == 2).sum())
    assert_close(forward(model, params, alone)[row, :length], hidden[row, start:start + length], 1e-6)


def test_scanned_layers_equal_unrolled_ones():
  params, batch = random_params(GPT2), make_batch(False)

  def unrolled(params):
    positions = jnp.broadcast_to(jnp.arange(TIME), (ROWS, TIME))
    x = params['embedding'][batch.tokens] + params['positions'][positions]
    for i, block in enumerate(GPT2.layers):
      layer = jax.tree.map(operator.itemgetter(i), params['blocks']['0'])
      x, *_ = block.apply({'params': layer}, x, Context(positions, attention.Visible()))
    return GPT2.norm.apply({'params': params['norm']}, x)

  assert_close(forward(GPT2, params, batch), jit(unrolled)(params), 1e-6)


@pytest.mark.slow
def test_remat_saves_memory_and_changes_nothing():
  params, batch = random_params(LLAMA), make_batch(True)

  def count_residuals(model):
    backward = jax.eval_shape(lambda p: jax.vjp(lambda p: model.apply(p, batch).hidden, p)[1], params)
    return sum(x.size for x in jax.tree.leaves(backward))

  whole, lean = LLAMA.clone(remat=None), LLAMA.clone(remat=jax.checkpoint_policies.nothing_saveable)
  assert count_residuals(lean) < 0.8 * count_residuals(LLAMA) < 0.8 * 0.8 * count_residuals(whole)
  # A new function: models that differ in `remat` alone are equal, and would share a compiled function.
  actual = jit(jax.value_and_grad(functools.partial(mean_loss, whole)))(params, batch)
  jax.tree.map(functools.partial(assert_close, tolerance=1e-5), actual, loss_and_grads(LLAMA, params, batch))


@pytest.mark.parametrize('model,chunks', [(GPT2, [5, 1, 1, 1]), (LLAMA, [5, 1, 1, 1]), (LLAMA, [1] * TIME)],
                         ids=['gpt2', 'llama', 'llama_one_by_one'])
def test_cached_decoding_equals_the_full_forward(model, chunks):
  """Rows of unequal length are padded on the left, and the cache has more slots than needed."""
  params, batch = random_params(model), make_batch(False)
  pads = np.array([0, 3, 5])
  slots = np.arange(TIME)[None]
  padded = Batch(np.stack([np.roll(row, p) for row, p in zip(batch.tokens, pads)]),
                 segments=(slots >= pads[:, None]).astype('i4'), positions=np.maximum(slots - pads[:, None], 0))
  cache, outputs, start = model.init_cache(ROWS, TIME + 3), [], 0
  for size in chunks:
    hidden, cache = decode(model, params, jax.tree.map(lambda x, a=start, b=start + size: x[:, a:b], padded), cache)
    outputs.append(hidden)
    start += size
  assert (cache.index == TIME).all()
  expected = forward(model, params, batch)
  for row, pad in enumerate(pads):
    assert_close(np.concatenate(outputs, axis=1)[row, pad:], expected[row, :TIME - pad], 1e-5)


def test_a_cache_without_segments_or_positions_counts_on():
  params, batch = random_params(GPT2), make_batch(False)
  first, cache = decode(GPT2, params, Batch(batch.tokens[:, :4]), GPT2.init_cache(ROWS, TIME))
  second, _ = decode(GPT2, params, Batch(batch.tokens[:, 4:]), cache)
  assert_close(jnp.concatenate([first, second], axis=1), forward(GPT2, params, batch), 1e-5)


def test_a_bidirectional_prompt_is_cached_as_such():
  params, batch = random_params(LLAMA), make_batch(False)
  batch = batch._replace(bidirectional=np.arange(TIME)[None] < np.array([[5], [3], [0]]))
  first, cache = decode(LLAMA, params, jax.tree.map(lambda x: x[:, :5], batch), LLAMA.init_cache(ROWS, TIME + 3))
  second, _ = decode(LLAMA, params, jax.tree.map(lambda x: x[:, 5:], batch), cache)
  assert_close(jnp.concatenate([first, second], axis=1), forward(LLAMA, params, batch), 1e-5)


@pytest.mark.parametrize('both_ways', [False, True], ids=['causal', 'both_ways'])
def test_attention_over_several_blocks_equals_the_dense_formula(both_ways):
  """The row is longer than a block of queries, and the last block is not full."""
  rng, time = np.random.default_rng(5), 300
  q, dy = rng.normal(size=(2, 1, time, 4, 8)).astype('f4')
  k, v = rng.normal(size=(2, 1, time, 2, 8)).astype('f4')
  segments = np.sort(rng.integers(0, 4, (1, time))).astype('i4')
  bidirectional = rng.uniform(size=(1, time)) < 0.1
  visible = attention.Visible(segments, segments, bidirectional if both_ways else None)
  mask = np.tril(np.ones((1, time, time), bool)) | (bidirectional[:, None] & both_ways)
  mask = mask & (segments[:, :, None] == segments[:, None])

  def dense(q, k, v):
    k, v = jnp.repeat(k, 2, axis=2), jnp.repeat(v, 2, axis=2)
    scores = jnp.where(mask[:, None], jnp.einsum('btnh,bsnh->bnts', q, k) / 8 ** 0.5, -jnp.inf)
    return jnp.einsum('bnts,bsnh->btnh', jax.nn.softmax(scores), v)

  def and_grads(attend):
    y, back = jax.vjp(attend, q, k, v)
    return y, *back(dy)

  actual = jit(lambda: and_grads(lambda q, k, v: attention.attend(q, k, v, visible)))()
  for a, b in zip(actual, jit(lambda: and_grads(dense))(), strict=True):
    assert_close(a, b, 1e-5)


def count(model):
  return sum(x.size for x in jax.tree.leaves(jax.eval_shape(model.init, jax.random.key(0))))


def test_full_size_models_have_their_published_numbers_of_parameters():
  assert count(transformer.gpt2()) == 124_439_808
  llama_1b = transformer.llama(128_256, 2048, 16, heads=32, kv_heads=8, hidden=8192)
  assert count(llama_1b) == 1_235_814_400


@pytest.mark.parametrize('make,message', [
    (lambda: transformer.gpt2(width=10, heads=3), 'heads=3 does not divide width=10'),
    (lambda: transformer.llama(9, 16, 1, heads=4, kv_heads=3), 'kv_heads=3 does not divide heads=4'),
    (lambda: transformer.llama(9, 12, 1, heads=4), 'width=12 over heads=4 gives heads of size 3'),
    (lambda: jax.eval_shape(GPT2.apply, random_params(GPT2), Batch(np.zeros((1, TIME + 1), 'i4'))),
     f'{TIME + 1} tokens are more than the {TIME}'),
], ids=['heads', 'kv_heads', 'odd', 'length'])
def test_sizes_that_do_not_fit_are_refused(make, message):
  with pytest.raises(ValueError, match=message):
    make()
