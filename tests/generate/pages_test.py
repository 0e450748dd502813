"""Prompts share the pages of their prefixes, with the same bits as alone; pages return; attention is that of a row."""
import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decoders import Bytes, make

from lm import evaluate, generate, sharding
from lm.generate import Request, Sampling, Scheduler, page_pool
from lm.models import attention, kernels, latent, paged, rotary, stack, transformer
from lm.models import layers as parts

PREFIX = [Bytes.bos_id, *b'a prefix of more than four pages.']


@functools.cache
def model_and_params(mesh=None):
  return make(kv_heads=2, tied=False, mesh=mesh)


def scheduler(mesh=None, pages=22):   # rows can need 36: some requests wait for pages, and prefixes are forgotten
  model, params = model_and_params(mesh)
  engine = generate.Engine(model, model.unstack(params), 96, Bytes.vocab_size, Bytes().eos_ids)
  subject = Scheduler(engine, 3, (8, 2, 1), pages=pages)
  subject.warm_up()
  return subject


def requests():
  return [Request([*PREFIX, *b'first'], Sampling(0), 9), Request([*PREFIX, *b'next'], Sampling(top_p=0.8), 30, seed=3),
          Request(PREFIX[:32], Sampling(), 6, choices=2), Request(PREFIX[:32], Sampling(0), 40, scores_prompt=True),
          Request([*PREFIX[:20], *b'another text'], Sampling(0.7), 12), Request([5], Sampling(), 60),
          Request([*PREFIX[:20], *b'another text, longer'], Sampling(0.7), 8)]


def answers(subject, new):
  """Returns the exact answers to requests, by number and choice."""
  result = collections.defaultdict(list)
  while subject.is_busy:
    for event in subject.step():
      result[new.index(event.request), event.choice] += [*event.ids, *event.log_probabilities, event.finish_reason]
  return {key: [x for x in value if x is not None] for key, value in result.items()}


def test_a_shared_prefix_is_read_once_and_gives_the_same_bits():
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])) as mesh:   # as a server has it
    check_bits(mesh)


@pytest.mark.slow
def test_a_mesh_that_splits_heads_has_pages_too():
  with jax.set_mesh(sharding.make_mesh('tensor:2', jax.devices()[:2])) as mesh:
    alone = check_bits(mesh)
  subject, new = scheduler(), requests()
  for request in new:
    subject.submit(request)
  for key, answer in answers(subject, new).items():
    np.testing.assert_allclose(alone[key][:-1], answer[:-1], rtol=1e-5)   # sums of two devices


def test_a_mesh_that_splits_rows_has_no_pages():
  model, params = model_and_params()
  engine = generate.Engine(model, params, 96, Bytes.vocab_size, Bytes().eos_ids)
  mesh = sharding.make_mesh('fsdp:2', jax.devices()[:2])
  with jax.set_mesh(mesh), pytest.raises(ValueError, match='pages=22 are not possible: the mesh splits rows'):
    Scheduler(engine, 4, (8, 2, 1), pages=22)
  with jax.set_mesh(mesh), pytest.raises(ValueError, match='rows=5 must be a positive multiple of 2'):
    Scheduler(engine, 5)
  with jax.set_mesh(mesh):
    subject = Scheduler(engine, 4, (8, 2, 1))
  assert subject.pool is None and 'splits rows' in subject.sharing_obstacle


def check_bits(mesh):
  """Asserts that answers are those alone to the last bit. Returns them."""
  alone = {}
  for number, request in enumerate(requests()):
    subject = scheduler(mesh)
    subject.submit(request)
    alone |= {(number, choice): answer for (_, choice), answer in answers(subject, [request]).items()}
    assert subject.shared_tokens == 0
  subject, rng, shared = scheduler(mesh), np.random.default_rng(0), []
  for _ in range(3):
    new, before = requests(), subject.shared_tokens
    for number in rng.permutation(len(new)):
      subject.submit(new[number])
    assert answers(subject, new) == alone
    shared.append(subject.shared_tokens - before)
    assert subject.pool.used == 0 and subject.compilations == 0
  assert min(shared) > 40 and shared[-1] > shared[0]
  check_abort_of_a_choice(subject)
  return alone


def check_abort_of_a_choice(subject):
  """Aborts the second of four choices in three rows: its row and pages are free, and the others stay as they are."""
  request = Request([*PREFIX, *b'x'], Sampling(logit_bias=((Bytes.eos_id, -100.),)), 30, choices=4)
  subject.submit(request)
  whole = answers(subject, [request])
  subject.submit(request)
  events = []
  while subject.running < 3:
    events += subject.step()
  used = subject.pool.used
  subject.abort(request, 1)
  subject.abort(request, 1)   # has no effect any more, and neither has that of a choice which waits
  subject.abort(request, 3)
  assert subject.running == 2 and used - subject.pool.used == 5   # of 8 tokens; it shares 4 pages with the others
  events += subject.step()
  assert subject.running == 3 and subject.pool.used == used
  while subject.is_busy:
    events += subject.step()
  for choice in 0, 2, 3:
    own = [event for event in events if event.choice == choice]
    assert [x for event in own for x in (*event.ids, *event.log_probabilities, event.finish_reason)
            if x is not None] == whole[0, choice]
  assert [event.finish_reason for event in events if event.choice == 1][-1:] == ['abort'] and not subject.pool.used


@pytest.mark.slow
def test_scores_are_those_of_the_scorer_without_a_mesh():
  subject, texts, scores = scheduler(), [], []
  for request in requests()[:2]:
    subject.submit(request)
    answer = answers(subject, [request])[0, 0][:-1]
    texts.append([*request.ids, *(x for x in answer if isinstance(x, int))])
    scores.append([x for x in answer if isinstance(x, float)])
  assert subject.shared_tokens == 32
  for own, full in zip(scores, evaluate.log_probabilities(*model_and_params(), [np.int32(text) for text in texts])):
    np.testing.assert_allclose(own, full[-len(own):], rtol=0, atol=1e-5)


@pytest.mark.parametrize(('scores', 'time', 'sinks'), [
    (kernels.AttentionScores(), 1, False), (kernels.AttentionScores(window=9, softcap=2.), 1, True),
    (kernels.AttentionScores(chunk=8, scale=0.7), 3, True)])
def test_attention_over_pages_is_that_over_a_row(scores, time, sinks):
  rng, rows, heads, size, blocks = np.random.default_rng(0), 3, 2, 4, 6
  q, *new = (rng.normal(size=(rows, time, n, 8)).astype('f4') for n in (4, heads, heads))
  pools = rng.normal(size=(2, 20, heads, size, 8)).astype('f4')
  pages, start = rng.permutation(np.arange(1, 20))[:rows * blocks].reshape(rows, blocks), jnp.int32([0, 7, 20])
  k, v = (pool[pages].swapaxes(1, 2).reshape(rows, heads, blocks * size, 8) for pool in pools)
  sinks = rng.normal(size=4).astype('f4') if sinks else None
  positions = start[:, None] + np.arange(time)[None]
  slots = np.arange(blocks * size)[None].repeat(rows, 0)
  visible = kernels.Visible(np.ones((rows, time), 'i4'), (slots < start[:, None] + time).astype('i4'), None, positions,
                            slots, start)
  dense, row_cache = attention.LayerCache(k, v).attend(q, *new, visible, scores, sinks)
  visible = visible._replace(pages_BM=np.int32(pages))
  attend = jax.jit(paged.LayerPages.attend, static_argnums=5)
  actual, cache = attend(paged.LayerPages(*pools), q, *new, visible, scores, sinks)
  np.testing.assert_allclose(actual, dense, rtol=0, atol=2e-6)
  # What a row does not see is in page 0 or belongs to others, whose numbers may not be finite.
  slot_is_seen = np.asarray(visible.mask(slice(0, time), slice(0, blocks * size), scores)).any((1, 2))
  page_is_seen = slot_is_seen.reshape(rows, blocks, size).any(2)
  assert not page_is_seen.all()
  pools[:, 0] = np.nan
  visible = visible._replace(pages_BM=np.int32(np.where(page_is_seen, pages, 0)))
  np.testing.assert_array_equal(attend(paged.LayerPages(*pools), q, *new, visible, scores, sinks)[0], actual)
  for row in range(rows):
    copied = cache.copy_out(jnp.int32(pages[row]), 0, blocks)
    for x, expected in zip(copied, row_cache):
      np.testing.assert_array_equal(x[0], expected[row])


def test_a_pool_knows_which_pages_are_used_and_forgets_the_oldest_prefix_first():
  pool, rng, texts = page_pool.PagePool(30), np.random.default_rng(0), []
  stored: dict[int, bytes] = {}   # the content of each page, as a device would have it
  for _ in range(500):
    if texts and rng.random() < 0.5:
      pool.release(texts.pop(rng.integers(len(texts))))
    else:
      ids = rng.integers(0, 2, rng.integers(1, 20))
      keys, count = page_pool.prefix_keys(ids, 4), int(rng.integers(0, 4))
      assert keys == page_pool.prefix_keys(np.r_[ids[:len(keys) * 4], 7], 4) and len(keys) == len(ids) // 4
      if not pool.has(keys, count):
        assert count + len(keys) > pool.total - pool.used
        continue
      pages, is_stored = pool.take(keys, count)
      assert len(pages) == len(set(pages)) == len(keys) + count and len(is_stored) == len(keys) and 0 not in pages
      assert all(stored.get(page) == key for page, key, yes in zip(pages, keys, is_stored) if yes)
      new = [page for page, yes in zip(pages, [*is_stored, *[False] * count]) if not yes]
      assert not set(new) & {page for text in texts for page in text}
      stored |= dict.fromkeys(new, b'') | dict(zip(pages, keys))
      texts.append(pages)
    assert pool.used == len({page for text in texts for page in text})
  for text in texts:
    pool.release(text)
  assert pool.used == 0
  pool = page_pool.PagePool(4)
  for key in b'a', b'b', b'a', b'c':
    pages, _ = pool.take([key], 0)
    pool.release(pages)
  pool.release(pool.take([], 1)[0])   # needs a page: b is the oldest
  assert [pool.find([key])[0] > 0 for key in (b'a', b'b', b'c')] == [True, False, True]
  pool.take([], 2)
  assert [pool.find([key])[0] > 0 for key in (b'a', b'b', b'c')] == [False, False, True]


@pytest.mark.slow
@pytest.mark.parametrize('attend', [
    attention.Attention(4, 2, 8, rotary.Rotary(), scores=attention.AttentionScores(window=5), sinks=True),
    latent.LatentAttention(4, None, 8, 4, 4, 8)])
def test_windows_and_latents_have_pages_too(attend):
  block = parts.Block(attend, parts.FeedForward(16), parts.RMSNorm(), parts.RMSNorm())
  model = transformer.Transformer(264, 32, stack.stacks([block]), parts.RMSNorm(), 96, tied=False)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: (0.6 * rng.normal(size=x.shape)).astype('f4'),
                        jax.eval_shape(model.init, jax.random.key(0)))
  texts = [PREFIX[1:], [*PREFIX[1:20], *b'other'], [*PREFIX[1:], *b'more']]
  expected = generate.tokens(model, params, Bytes(), [np.int32(text) for text in texts], Sampling(0), max_tokens=12)
  subject = Scheduler(generate.Engine(model, model.unstack(params), 96, 258, Bytes().eos_ids), 2, (8, 1))
  new = [Request([Bytes.bos_id, *text], Sampling(0), 12) for text in texts]
  for request in new:
    subject.submit(request)
  written = answers(subject, new)
  for number, ids in enumerate(expected):
    assert [x for x in written[number, 0] if isinstance(x, int) and x != Bytes.eos_id] == ids.tolist()
  assert subject.shared_tokens == 16 + 32
