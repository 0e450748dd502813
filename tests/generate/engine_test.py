"""Rows of the engine share one compiled step with any settings, join and leave, and equal their text alone."""
import functools
import operator

import jax
import numpy as np
import pytest
from helpers.decoders import PROMPTS, Bytes, make

from lm import evaluate, generate, sharding
from lm.generate import engine as engine_module
from lm.generate import filters, module_drafts
from lm.models import attention, encoder_decoder, latent, prediction_heads, rotary, stack, transformer
from lm.models import layers as parts

BOS, EOS = Bytes.bos_id, Bytes.eos_id
MIXED = generate.Sampling(0.8, top_k=60, top_p=0.95, min_p=0.001, repetition_penalty=1.2)
REQUESTS = [   # prompt, sampling, seed, tokens
    ('def f(x):', generate.Sampling(0), 0, 9), ('', generate.Sampling(), 5, 12), ('def f(x):', MIXED, 2 ** 40, 4),
    ('a longer prompt, 27 bytes.', generate.Sampling(1.3, top_p=0.9), 3, 7), ('x', generate.Sampling(top_k=5), 0, 1),
    ('abc', generate.Sampling(0, repetition_penalty=1.5), 1, 11), ('abcd', generate.Sampling(min_p=0.1), 1, 8)]


def random_params(model, scale):
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda x: (scale * rng.normal(size=x.shape)).astype('f4'),
                      jax.eval_shape(model.init, jax.random.key(0)))


def trunk(attend, positions=False):
  block = parts.Block(attend, parts.FeedForward(16), parts.RMSNorm(), parts.RMSNorm())
  return transformer.Transformer(264, 32, stack.stacks([block]), parts.RMSNorm(), 64, positions, tied=False)


WINDOW = trunk(attention.Attention(4, 2, 8, rotary.Rotary(), scores=attention.AttentionScores(window=5)))
LATENT = trunk(latent.LatentAttention(4, None, 8, 4, 4, 8), positions=True)


@functools.cache
def case(name):
  """Returns (model, params, draft) of a case."""
  match name:
    case 'llama':
      return *make(kv_heads=2, tied=False), None
    case 'encoder-decoder':
      model, draft = encoder_decoder.t5(264, 16, 1, 2, 8, 32), None
    case 'drafts':
      model, draft = prediction_heads.sequential(WINDOW, 2), module_drafts.SelfSpeculation()
    case 'latent':
      model, draft = LATENT, None
  return model, random_params(model, 0.6), draft


def engine_of(model, params, draft=None):
  params = model.unstack(params)
  return (generate.Engine(model, params, 64, 258, (EOS,)) if draft is None else
          draft.engine(model, params, 59, 258, (EOS,)))


def read(engine, request, rows=1):
  """Returns the state after the prompt of a request, and its first token."""
  prompt, sampling, seed, limit = request
  ids, = Bytes().encode_batch([prompt])
  stream = generate.random_streams([ids], rows, BOS)
  return engine.prefill(engine.model.prompt([ids], rows, BOS, EOS),
                        generate.settings([sampling] * rows, [seed] * rows, stream), [limit] * rows)


def serve(engine, requests, rows=2, count=1):
  """Returns (ids, log-probabilities) of each request, on this number of rows; each begins as soon as a row is free."""
  width = max(requests, key=lambda request: len(request[0]))[0]
  if engine.model.reads_source:
    width = 'x' * 30
  state, _ = read(engine, (width, generate.Sampling(), 0, 0), rows)   # a prompt that fills the cache
  waiting, running, written = list(range(len(requests))), {}, [([], []) for _ in requests]

  def record(request, row, tokens):
    n = int(tokens.count_B[row])
    written[request][0].extend(tokens.ids_BT[row, :n].tolist())
    written[request][1].extend(np.asarray(tokens.log_probabilities_BT)[row, :n].tolist())

  while waiting or running:
    for row in sorted(set(range(rows)) - set(running)):
      if waiting:
        running[row] = waiting.pop(0)
        new, tokens = read(engine, requests[running[row]])
        record(running[row], 0, tokens)
        state = engine.insert(state, new, [row])
    state, tokens = engine.step(state, count)
    finished = np.asarray(state.ended_B)
    for row, request in list(running.items()):
      record(request, row, tokens)
      if finished[row]:
        del running[row]
  return written


@pytest.mark.slow
@pytest.mark.parametrize('name', ['llama', 'encoder-decoder', 'drafts', 'latent'])
def test_rows_that_join_and_leave_are_as_they_are_alone(name):
  """Bit for bit, log-probabilities too. The ids also equal `generate.tokens`, and the scores a full forward pass."""
  model, params, draft = case(name)
  requests = [request for request in REQUESTS if draft is None or request[1].repetition_penalty == 1]
  engine = engine_of(model, params, draft)
  together = serve(engine, requests)
  assert len({tuple(ids) for ids, _ in together}) == len(requests)
  for request, (ids, scores) in zip(requests, together):
    assert serve(engine, [request]) == [(ids, scores)]
    prompt, sampling, seed, limit = request
    assert len(ids) == limit or ids[-1] == EOS
    source = [*Bytes().encode_batch([prompt])[0].tolist()]
    if draft is None:
      expected, = generate.tokens(model, params, Bytes(), [np.int32(source)], sampling, max_tokens=limit, seed=seed)
      assert expected.tolist() == [i for i in ids if i != EOS]
    if model.reads_source:
      full, = evaluate.log_probabilities(model, params, [np.int32([BOS, *ids])], sources=[np.int32([*source, EOS])])
    else:
      full, = evaluate.log_probabilities(getattr(model, 'trunk', model), params, [np.int32([BOS, *source, *ids])])
    np.testing.assert_allclose(scores, full[-len(ids):], rtol=0, atol=1e-5)


def test_settings_and_lengths_share_one_step():
  model, params, _ = case('llama')
  engine = engine_of(model.clone(max_length=127), params)   # its own entries in the cache of compilations
  before = [function._cache_size() for function in (engine_module._prefill, engine_module._step, engine_module._insert)]
  serve(engine, REQUESTS)
  after = [function._cache_size() for function in (engine_module._prefill, engine_module._step, engine_module._insert)]
  # The prefill compiles for one row of 16 columns, one of 32, and two empty rows; insertion and the step compile once,
  # for any settings and lengths.
  assert [b - a for a, b in zip(before, after)] == [3, 1, 1]


def test_a_row_that_is_evicted_stops_and_the_others_go_on():
  model, params, _ = case('llama')
  engine, results = engine_of(model, params), []
  for evicted in [], [1]:
    state, _ = engine.prefill(model.prompt(Bytes().encode_batch(PROMPTS), 4, BOS, EOS),
                              generate.settings([MIXED] * 4, [0] * 4, np.arange(4)), [20] * 4)
    state, first = engine.step(state, 3)
    state, second = engine.step(engine.evict(state, evicted), 5)
    assert first.count_B.tolist() == [3] * 4
    results.append(second)
  whole, less = results
  assert whole.count_B.tolist() == [5] * 4 and less.count_B.tolist() == [5, 0, 5, 5]
  others = np.array([0, 2, 3])
  np.testing.assert_array_equal(less.ids_BT[others], whole.ids_BT[others])
  assert set(less.ids_BT[1].tolist()) == {EOS}


@pytest.mark.slow
def test_rows_join_on_a_mesh():
  model, params, _ = case('llama')
  requests = [REQUESTS[i] for i in (0, 2, 3)]
  expected = serve(engine_of(model, params), requests, rows=4)
  with jax.set_mesh(sharding.make_mesh('fsdp:2,tensor:2', jax.devices()[:4])) as mesh:
    model, params = make(kv_heads=2, tied=False, mesh=mesh)
    engine = engine_of(model, params)
    state, _ = read(engine, ('x', generate.Sampling(), 0, 0), 4)
    written = [[] for _ in requests]
    for i, request in enumerate(requests):
      new, tokens = read(engine, request, 2)   # the mesh needs two rows, so the request is repeated and one row dropped
      written[i] += tokens.rows(1)[0].tolist()
      state = engine.insert(state, new, [3 - i, 4])
    for _ in range(4):
      state, tokens = engine.step(state, 3)
      for ids, row in zip(written, reversed(tokens.rows(4))):
        ids += row.tolist()
  assert written == [ids for ids, _ in expected]


@pytest.mark.slow
def test_filters_of_rows_are_those_of_each_row():
  rng = np.random.default_rng(0)
  logits, texts = rng.normal(0, 3, (len(REQUESTS), 40)).astype('f4'), rng.integers(0, 40, (len(REQUESTS), 20))
  settings = generate.settings([sampling for _, sampling, _, _ in REQUESTS], [0] * len(logits), np.arange(len(logits)))
  history = filters.new_history(texts, 40, written=10)
  rows = generate.process(logits, settings, history)
  for row in range(len(rows)):
    alone = generate.process(*jax.tree.map(operator.itemgetter(slice(row, row + 1)), (logits, settings, history)))
    np.testing.assert_array_equal(rows[row:row + 1], alone)


def test_requests_that_do_not_fit_are_refused():
  model, params, _ = case('llama')
  engine = engine_of(model, params)
  with pytest.raises(ValueError, match='16 columns and 49 new tokens .* slots=64'):
    read(engine, ('a', generate.Sampling(), 0, 49))
  state, _ = read(engine, ('a', generate.Sampling(), 0, 48))
  with pytest.raises(ValueError, match='count=17 .* 1 to 16'):
    engine.step(state, 17)
  with pytest.raises(ValueError, match=r'rows=\[0, 1\] .* 1 rows'):
    engine.insert(state, state, [0, 1])
  model, params, _ = case('encoder-decoder')
  short, long = (model.init_cache(1, 4)._replace(source_segments_BS=np.ones((1, n), 'i4')) for n in (16, 32))
  with pytest.raises(ValueError, match='source of 32 .* 16'):
    model.insert(short, long, np.int32([0]))
