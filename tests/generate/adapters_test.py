"""Rows of one batch have adapters of their own: each answers as the model into which its adapter is merged."""
import collections
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.decoders import Bytes, make
from helpers.meshes import on
from jax.sharding import NamedSharding

from lm import evaluate, generate, lora, serve, sharding
from lm.data.batch import Batch
from lm.generate import Request, Sampling, Scheduler
from lm.models import attention, latent, moe, quantized_decoder, stack
from lm.models import layers as parts
from lm.models.encoder_decoder import t5
from lm.models.low_rank_weight import choose_adapters

PREFIX = [Bytes.bos_id, *b'a prefix of more than four pages.']


def random_adapters(model, *settings):
  """Returns models with adapters of these ranks, scales and matrices, and random parameters of them."""
  rng, mesh = np.random.default_rng(1), jax.sharding.get_mesh()

  def value(like):
    layout = None if mesh.empty else NamedSharding(mesh, like.sharding.spec)
    return jax.device_put(rng.normal(0, 0.1, like.shape).astype(np.float32), layout)

  models = [lora.Adapted(model, *each) for each in settings]
  return [(each, jax.tree.map(value, jax.eval_shape(each.init, jax.random.key(0)))) for each in models]


def merged(model, params, adapters):
  """Returns the parameters of the model alone and with each adapter merged."""
  return [params, *(adapted.merge({'base': params, **trained})[1] for adapted, trained in adapters)]


@functools.cache
def model_and_adapters():
  model, params = make(kv_heads=2, tied=False)
  params = jax.tree.map(lambda x: x / 2, params)   # so that rounding changes log-probabilities less
  return model, params, random_adapters(model, (2, 3., None), (5, 10., ('*attention/query', '*down')))


@functools.cache
def scheduler():
  model, params, adapters = model_and_adapters()
  params = model.unstack(lora.with_row_adapters(params, adapters))
  engine = generate.Engine(model, params, 96, Bytes.vocab_size, Bytes().eos_ids)
  subject = Scheduler(engine, 3, (8, 2, 1), pages=30)
  subject.warm_up()
  return subject


def requests():
  own = [Request([*PREFIX, *b'first'], Sampling(0), 9, top=1, adapter=i) for i in (0, 1, 2)]
  return [*own, Request([*PREFIX, *b'next'], Sampling(top_p=0.8), 12, seed=3, adapter=1),
          Request(PREFIX[:32], Sampling(), 6, choices=2, adapter=2), Request([5], Sampling(), 8),
          Request(PREFIX[:32], max_tokens=0, scores_prompt=True, adapter=2)]


def answers(subject, new):
  """Returns the exact ids and log-probabilities of requests, by number and choice; of a prompt, if it is scored."""
  result = collections.defaultdict(lambda: ([], []))
  while subject.is_busy:
    for event in subject.step():
      ids, scores = result[new.index(event.request), event.choice]
      ids += event.ids
      scores += event.log_probabilities
      if event.prompt_scores is not None:
        scores += event.prompt_scores.log_probabilities_T.tolist()
  return dict(result)


def test_a_row_answers_as_the_merged_model_in_any_company_and_nothing_compiles():
  model, params, adapters = model_and_adapters()
  subject, alone = scheduler(), {}
  for number, request in enumerate(requests()):
    subject.submit(request)
    alone |= {(number, choice): answer for (_, choice), answer in answers(subject, [request]).items()}
  rng, new = np.random.default_rng(0), requests()
  for number in rng.permutation(len(new)):
    subject.submit(new[number])
  assert answers(subject, new) == alone
  assert subject.compilations == 0 and subject.pool.used == 0

  @jax.jit
  def logits(params, tokens):
    out = model.apply(params, Batch(tokens))
    return out.head(out.hidden)[0, :, :Bytes.vocab_size]

  models = merged(model, params, adapters)
  assert len({str(alone[i, 0][0]) for i in (0, 1, 2)}) == 3   # the adapters matter
  for (number, _), (ids, scores) in alone.items():
    own, text = models[new[number].adapter], [*new[number].ids, *ids]
    expected, = evaluate.log_probabilities(model, own, [np.int32(text)])
    np.testing.assert_allclose(scores, expected[len(text) - 1 - len(scores):], rtol=0, atol=1e-5)
    if number < 3:   # greedy
      best = np.asarray(logits(own, np.int32([text])).argmax(-1))
      np.testing.assert_array_equal(ids, best[len(new[number].ids) - 1:-1])


def test_prompts_share_pages_with_those_of_the_same_adapter_alone():
  subject, counts = scheduler(), []
  prompt = [7, *PREFIX]
  for adapter in 1, 2, 1, 0, 0, 2:
    before = subject.shared_tokens
    subject.submit(Request(prompt, Sampling(0), 2, adapter=adapter))
    answers(subject, [subject._waiting[0]])
    counts.append(subject.shared_tokens - before)
  assert counts == [0, 0, 32, 0, 32, 32]
  with pytest.raises(ValueError, match='adapter=3 must be from 0, for none, to 2'):
    subject.submit(Request(prompt, adapter=3))


@pytest.mark.slow
@pytest.mark.parametrize('shape, int8', [(None, False), ('fsdp:2,tensor:2', False), (None, True)])
def test_all_matrices_have_adapters_of_rows_on_a_mesh_and_in_int8(shape, int8):
  """The rows have the logits of merged models, with latent attention and biases too."""
  with on(shape):
    attend = attention.Attention(4, 2, 8, bias=True)
    block = functools.partial(parts.Block, attention_norm=parts.RMSNorm(), feed_forward_norm=parts.RMSNorm())
    blocks = [block(attend, parts.FeedForward(16, bias=True))]
    if not int8:
      blocks.append(block(latent.LatentAttention(4, 8, 8, 4, 4, 4), parts.FeedForward(16)))
    model = make()[0].clone(blocks=stack.stacks(blocks * 2))
    params = jax.jit(model.init)(jax.random.key(0))
    adapters = random_adapters(model, (1, 2., None), (3, 3., None))
    tokens = np.random.default_rng(0).integers(0, 258, (4, 6)).astype(np.int32)

    @jax.jit
    @sharding.whole_rows()
    def logits(params, adapter_B):
      params = choose_adapters(params, sharding.constrain(adapter_B, 'B'))
      out = model.apply(params, Batch(tokens), cache=model.init_cache(*tokens.shape))
      return sharding.constrain(out.head(out.hidden), '---')

    numbers = jnp.int32([0, 2, 1, 2])
    exact = quantized_decoder.float_weights(model, params, 'int8') if int8 else params
    stored = quantized_decoder.with_rounded_weights(model, params, 'int8') if int8 else params
    own = np.asarray(logits(model.unstack(lora.with_row_adapters(stored, adapters)), numbers))
    for i, each in enumerate(merged(model, exact, adapters)):
      expected = np.asarray(logits(model.unstack(each), numbers))
      np.testing.assert_allclose(own[numbers == i], expected[numbers == i], rtol=0, atol=2e-6)
      assert np.abs(own[numbers != i] - expected[numbers != i]).max() > 1e-3


@pytest.mark.slow
def test_an_embedding_is_that_of_the_merged_model():
  model, params, adapters = model_and_adapters()
  ids = np.int32(PREFIX)
  served = serve.ServedModel('own', model, scheduler().engine.params, Bytes(), 96, adapter=2)
  hidden = np.asarray(model.apply(merged(model, params, adapters)[2], Batch(ids[None])).hidden)[0].mean(0)
  np.testing.assert_allclose(served.embed(ids), hidden / np.linalg.norm(hidden), rtol=0, atol=1e-6)


def test_adapters_that_rows_cannot_choose_are_refused():
  model, _, ((adapted, _), _) = model_and_adapters()
  experts = parts.Block(attention.Attention(4, 2, 8), moe.Experts(moe.SoftmaxRouter(1), 2, 8), parts.RMSNorm(),
                        parts.RMSNorm())
  sparse = model.clone(blocks=stack.stacks([experts]))
  for other, match, path in ((sparse, None, 'blocks/0/feed_forward/down'), (model, ('head',), 'head'),
                             (model, ('embedding',), 'embedding')):
    with pytest.raises(ValueError, match=f'for {path}, a table, a head or a matrix of experts'):
      lora.check_row_adapters(other, lora.Adapted(other, 2, 4., match))
  for other in t5(264, 32, 1, 4), quantized_decoder.Quantized(**quantized_decoder._fields(model)):
    with pytest.raises(ValueError, match=f'beside a model of class {type(other).__name__}; merge'):
      lora.check_row_adapters(other, adapted)
