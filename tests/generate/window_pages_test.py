"""Pages behind a window are given back: what a token sees is always in the pages of its row, and bits stay the same."""
import collections

import jax
import numpy as np
import pytest
from helpers.decoders import Bytes

from lm import evaluate, generate
from lm.generate import Request, Sampling, Scheduler, page_pool, page_pools
from lm.models import attention, rotary, stack, transformer
from lm.models import layers as parts


@pytest.mark.parametrize(('window', 'size', 'counts', 'shares'), [
    (9, 4, (60, 40), True), (4, 4, (0, 15), True), (1, 2, (40, 12), True), (8, 4, (60, 14), False)])
def test_every_token_sees_its_text_in_the_pages_of_its_row(window, size, counts, shares):
  """Writes (tokens up to the end of the block) into pages, as a device would, in many rows at a time."""
  rng, blocks = np.random.default_rng(0), -(-46 // size)   # of the longest text
  pools = page_pools.PagePools(counts, window, size, blocks)
  contents, rows, used_pages, shared, waited = [{}, {}], [], [], 0, 0

  def check_visible(ids, pages_GM, position, end, group):
    """Asserts that the places before `end` that the token at `position` sees are in these pages."""
    first = 0 if group == 0 else max(position - window + 1, 0)
    for place in range(first, end):
      assert contents[group][pages_GM[group, place // size], place % size] == tuple(ids[:place + 1])

  for _ in range(600):
    if rows and rng.random() < 0.7:   # a row writes some tokens at once
      i = rng.integers(len(rows))
      ids, pages_GM, start = rows[i]
      end = min(start + int(rng.choice([1, 1, 2, 16])), len(ids))
      for group in range(2):
        if counts[group]:
          for place in range(start, end):
            contents[group][pages_GM[group, place // size], place % size] = tuple(ids[:place + 1])
          for place in range(start, end):
            check_visible(ids, pages_GM, place, place + 1, group)
      rows[i] = ids, pages_GM, end
      if end == len(ids):
        pools.release(used_pages.pop(i))
        rows.pop(i)
      continue
    ids = [*np.ones(rng.integers(0, 30), int), *rng.integers(0, 2, rng.integers(2, 17))]
    length = int(rng.integers(1, len(ids)))
    keys = page_pool.prefix_keys(np.int32(ids[:length]), size) if shares else []
    prefix = pools.find(keys[:(length - 1) // size])
    pages = pools.take(keys, prefix.first_G, length, len(ids))
    if pages is None:
      waited += 1
      pools.check(len(keys), length, len(ids))
      assert rows   # without other rows, there is room for any text that passes the check
      continue
    shared += prefix.count
    for group in range(2):
      if counts[group]:
        start = prefix.count * size   # the rest of the prompt is read after it
        check_visible(ids, prefix.pages_GM, start, start, group)
        for block in np.flatnonzero(pages.is_new_GM[group]):
          assert block >= prefix.first_G[group]   # the prompt is known from there on
          for place in range(block * size, min((block + 1) * size, length)):
            contents[group][pages.pages_GM[group, block], place % size] = tuple(ids[:place + 1])
    rows.append((ids, pages.pages_GM, length))
    used_pages.append(pages.used_pages)
  for each in used_pages:
    pools.release(each)
  assert bool(shared) == shares and waited and not pools.used


def model_and_params():
  """Returns a decoder with two layers that have windows, and one between them that has none."""
  def block(window):
    attend = attention.Attention(4, 2, 8, rotary.Rotary(), scores=attention.AttentionScores(window=window))
    return parts.Block(attend, parts.FeedForward(16), parts.RMSNorm(), parts.RMSNorm())
  blocks = stack.stacks([block(9), block(None), block(5)])
  model, rng = transformer.Transformer(264, 32, blocks, parts.RMSNorm(), 128, tied=False), np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return model, jax.tree.map(lambda x: (0.4 * rng.normal(size=x.shape)).astype('f4'), shapes)


@pytest.mark.slow
def test_layers_with_and_without_windows_have_the_same_bits_in_any_company():
  model, params = model_and_params()
  engine = generate.Engine(model, model.unstack(params), 128, Bytes.vocab_size, Bytes().eos_ids)
  prefix = [Bytes.bos_id, *b'a prefix of more than four pages.']
  never_ends = Sampling(0.8, logit_bias=((Bytes.eos_id, -100.),))

  def scheduler(drafter=None):
    subject = Scheduler(engine, 3, (8, 1), pages=33, drafter=drafter)
    subject.warm_up()
    return subject

  def requests():
    return [Request([*prefix, *b'one'], never_ends, 80, 1), Request([*prefix, *b'another'], never_ends, 40, 2),
            Request(prefix[:20], never_ends, 9, 3), Request([*prefix, *b'one'], Sampling(0), 30, choices=1),
            Request([7], never_ends, 100, 4)]

  def answers(subject, new):
    result = collections.defaultdict(lambda: ([], []))
    while subject.is_busy:
      for event in subject.step():
        ids, scores = result[new.index(event.request)]
        ids += event.ids
        scores += event.log_probabilities
    return dict(result)

  alone = {}
  for number, request in enumerate(requests()):
    subject = scheduler()
    subject.submit(request)
    alone[number] = answers(subject, [request])[0]
  texts = [np.int32([*request.ids, *alone[number][0]]) for number, request in enumerate(requests())]
  for number, full in enumerate(evaluate.log_probabilities(model, params, texts)):
    scores = alone[number][1]
    np.testing.assert_allclose(scores, full[-len(scores):], rtol=0, atol=1e-5)
  subject, rng = scheduler(), np.random.default_rng(0)
  for _ in range(2):
    new = requests()
    for number in rng.permutation(len(new)):
      subject.submit(new[number])
    assert answers(subject, new) == alone
  assert subject.shared_tokens > 100 and subject.pool.used == 0 and subject.compilations == 0
  subject, new = scheduler(generate.PromptLookup(15)), requests()
  for request in new:
    subject.submit(request)
  for number, (ids, scores) in answers(subject, new).items():
    assert ids == alone[number][0]
    np.testing.assert_allclose(scores, alone[number][1], rtol=0, atol=1e-5)
  assert subject.drafter.accepted > 0
