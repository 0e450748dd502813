"""Packed rows hold exactly the (token, next token) pairs of their documents."""
import dataclasses
import itertools

import jax
import numpy as np
import pytest
from helpers.documents import BEGIN, END, SPECIAL, documents, pairs_in, pairs_of, same, stacked
from hypothesis import given, settings
from hypothesis import strategies as st

from lm import sharding
from lm.data.batch import Batch, Example, Form
from lm.data.rows.packed_documents import Stream
from lm.models import transformer
from lm.objectives.next_token import next_token
from lm.objectives.objective import token_objective


def rows_of(store, length, rows, *args, objective=None, **options) -> Stream:
  return Stream(objective or next_token(), SPECIAL, length, rows, *args, store=store, **options)


cases = given(sizes=st.lists(st.integers(0, 30), min_size=1, max_size=9), length=st.integers(1, 12),
              rows=st.integers(1, 7), seed=st.sampled_from([None, 0, 5]), context=st.integers(0, 5))


@cases
@settings(max_examples=150, deadline=None)
def test_every_target_occurs_once_an_epoch(sizes, length, rows, seed, context):
  store, context = documents(sizes), min(context, length - 1)
  batches = rows_of(store, length, rows, seed, context=context)
  n = batches.rows_per_epoch
  batch = stacked(batches, range(-(-3 * n // rows)))   # epochs do not end where batches do
  for epoch in range(3):
    assert pairs_in(batch, slice(epoch * n, (epoch + 1) * n)) == pairs_of(store)
  once = dataclasses.replace(batches, repeat=False)
  assert pairs_in(stacked(once, range(once.steps_per_epoch))) == pairs_of(store)
  assert not pairs_in(once(once.steps_per_epoch))
  if not context:
    padded = [int((row == 0).sum()) for row in stacked(batches, range(once.steps_per_epoch)).segments[:n]]
    assert sum(padded) == max(padded) < length   # at most one row is padded


@cases
@settings(max_examples=150, deadline=None)
def test_segments_are_pieces_of_one_document(sizes, length, rows, seed, context):
  context = min(context, length - 1)
  batch = rows_of(documents(sizes), length, rows, seed, context=context)(1)
  for tokens, targets, weights, positions, segments in zip(*batch[:5]):
    count = segments.max()
    assert np.array_equal(segments, sorted(segments[segments > 0]) + [0] * int((segments == 0).sum()))
    assert not weights[segments == 0].any() and set(segments) - {0} == set(range(1, count + 1))
    for segment in range(1, count + 1):
      inside = segments == segment
      assert np.array_equal(positions[inside], np.arange(inside.sum()))
      assert np.array_equal(tokens[inside][1:], targets[inside][:-1])
      assert segment == 1 or tokens[inside][0] == BEGIN     # only the first and the last segment of a row are cut
      assert segment == count or targets[inside][-1] == END
      assert all(p >= context or tokens[inside][0] == BEGIN for p in positions[inside & (weights > 0)])


@cases
@settings(max_examples=50, deadline=None)
def test_a_batch_is_a_pure_function_of_the_step(sizes, length, rows, seed, context):
  make = lambda: rows_of(documents(sizes), length, rows, seed, context=min(context, length - 1))
  batches = make()
  forward = [batches(step) for step in range(6)]
  assert all(same(batches(step), forward[step]) for step in (5, 0, 3, 3, 1))
  assert same(make()(4), forward[4])


def first_token_visible(tokens, rng, special):
  """An example with random targets, whose first token is visible to all positions, as in a prefix objective."""
  n = len(tokens) - 1
  return Example(tokens[:-1], rng.integers(1000, size=n), np.ones(n, np.float32), np.arange(n) == 0)


MARKED = token_objective(Form(first_token_visible, ahead=True))


@pytest.mark.parametrize('hosts', [1, 2, 4, 8])
@pytest.mark.parametrize('objective', [next_token(), MARKED], ids=['plain', 'marked'])
@pytest.mark.parametrize('repeat', [True, False])
def test_hosts_together_read_the_rows_of_one_host(hosts, objective, repeat):
  batches = rows_of(documents([9, 0, 33, 1, 17]), 7, 8, 3, repeat, objective=objective)
  for step in range(batches.steps_per_epoch + 1):
    own = [batches(step, range(8 * host // hosts, 8 * (host + 1) // hosts)) for host in range(hosts)]
    assert same(Batch(*(None if x[0] is None else np.concatenate(x) for x in zip(*own))), batches(step))


def test_the_order_is_fixed_by_seed_and_epoch():
  store = documents([5] * 40)
  orders = {}
  for seed in (0, 1, None):
    batches = rows_of(store, 6, 40, seed)   # a row holds one document, and a batch one epoch
    for epoch in (0, 1):
      orders[seed, epoch] = tuple(batches(epoch).targets[:, 0].tolist())
  assert orders[None, 0] == orders[None, 1] == tuple(store.tokens[::5].tolist())
  assert len(set(orders.values())) == 5 and len({frozenset(order) for order in orders.values()}) == 1


def test_the_rows_of_a_long_document_are_shuffled_too():
  batches = rows_of(documents([399]), 10, 40, 0)
  orders = [batches(epoch).targets[:, 0].tolist() for epoch in (0, 1)]
  assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1]) != orders[0]


def test_an_objective_gets_pieces_with_their_next_token_and_a_generator_of_their_row():
  store, pieces = documents([30, 3, 0, 12]), []

  def record(tokens, rng, special):
    pieces.append(tokens)
    return Example(tokens[:-1], rng.integers(1 << 30, size=len(tokens) - 1), np.ones(len(tokens) - 1, np.float32))

  batches = rows_of(store, 10, 5, objective=token_objective(Form(record, ahead=True)))
  batches(0)
  pieces.clear()   # the first calls try the objective out
  drawn = [batches(step).targets for step in (0, 1, 0)]
  assert np.array_equal(drawn[0], drawn[2])
  values = np.concatenate(drawn[:2])[np.concatenate(drawn[:2]) > 0]
  assert len(set(values.tolist())) == len(values)   # no two rows, nor epochs, draw the same
  whole = pairs_of(store)
  assert all(piece.dtype == np.int32 and len(piece) > 1 and pair in whole
             for piece in pieces for pair in itertools.pairwise(piece.tolist()))


def test_marks_of_bidirectional_positions_are_packed_with_their_segment():
  batch = rows_of(documents([5, 2, 0, 11]), 8, 3, objective=MARKED)(0)
  assert np.array_equal(batch.bidirectional, (batch.positions == 0) & (batch.segments > 0))


def test_a_context_that_fills_the_row_is_refused():
  with pytest.raises(ValueError, match='context=4'):
    rows_of(documents([3]), 4, 1, context=4)


@pytest.mark.parametrize('make', [
    lambda: transformer.llama(vocab=80, width=8, layers=1, heads=2, hidden=16, max_length=24),
    lambda: transformer.gpt2(vocab=80, width=8, layers=1, heads=2, max_length=24)])
def test_the_loss_of_packed_rows_is_that_of_their_pieces_alone(make):
  model, objective = make(), next_token()
  batch = rows_of(documents([7, 0, 20, 3, 1, 12, 30]), 24, 3)(0)
  pieces = [row[segments == s] for row, targets, segments in zip(batch.tokens, batch.targets, batch.segments)
            for s in range(1, segments.max() + 1)]
  next_tokens = [targets[segments == s] for targets, segments in zip(batch.targets, batch.segments)
                 for s in range(1, segments.max() + 1)]
  assert len(pieces) > 5
  pad = lambda rows, dtype: np.stack([np.pad(row, (0, 24 - len(row))) for row in rows]).astype(dtype)
  weights = pad([np.ones(len(piece)) for piece in pieces], np.float32)
  alone = Batch(pad(pieces, np.int32), pad(next_tokens, np.int32), weights)   # no segments: the causal mask suffices
  with jax.set_mesh(sharding.make_mesh('fsdp:1', jax.devices()[:1])):
    params = jax.jit(lambda: jax.tree.map(lambda x: 20 * x, model.init(jax.random.key(0))))()
    loss = jax.jit(lambda batch: objective.loss(model.apply, params, batch, None))
    (packed, tokens, _), (single, count, _) = loss(batch), loss(alone)
  assert tokens == count == weights.sum()
  np.testing.assert_allclose(packed, single, rtol=1e-5)


def test_which_documents_share_a_row_differs_by_epoch():
  """It is not only the order of the rows that differs."""
  batches = rows_of(documents([6] * 40), 32, 1)

  def company(epoch):
    rows = (batches.compose([(epoch, i)]) for i in range(batches.rows_per_epoch))
    return {frozenset(((row.tokens[row.tokens > 1] - 2) // 6).tolist()) for row in rows}
  first, second = company(0), company(1)
  assert company(0) == first and len(first & second) <= len(first) // 4
