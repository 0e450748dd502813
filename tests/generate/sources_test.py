"""Encoder-decoders join and leave the rows of a scheduler: the same bits in any company, and the scorer's numbers."""
import collections
import functools

import jax
import numpy as np
import pytest
from helpers.decoders import Bytes

from lm import evaluate, generate
from lm.generate import Request, Sampling, Scheduler
from lm.models import encoder_decoder

START, EOS = Bytes.bos_id, Bytes.eos_id
TEXTS = ['a source', '', 'a source of more than thirty-two bytes', 'another one', 'a source', 'x' * 63]


@functools.cache
def model_and_params():
  model, rng = encoder_decoder.t5(264, 16, 1, 2, 8, 32), np.random.default_rng(0)
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return model, jax.tree.map(lambda x: (0.6 * rng.normal(size=x.shape)).astype('f4'), shapes)


@functools.cache
def scheduler():
  """Returns a scheduler that is warm. A test leaves it idle."""
  model, params = model_and_params()
  subject = Scheduler(generate.Engine(model, model.unstack(params), 64, Bytes.vocab_size, (EOS,)), 3, (8, 1))
  subject.warm_up()
  return subject


def source(text):
  return [*text.encode(), EOS]


def requests():
  """Returns new requests, of which the last scores a text of several chunks."""
  settings = [(Sampling(0), 9, 1), (Sampling(), 12, 1), (Sampling(0.8, top_p=0.9), 7, 2), (Sampling(0), 5, 1),
              (Sampling(1.3, repetition_penalty=1.2), 8, 1)]
  new = [Request([START], sampling, count, seed=3, choices=choices, source=source(text))
         for text, (sampling, count, choices) in zip(TEXTS, settings)]
  return [*new, Request([START, *b'a scored text'], max_tokens=0, scores_prompt=True, source=source(TEXTS[-1]))]


def answers(new, order, rng):
  """Returns the exact answers to requests that arrive in an order, at random steps, by number and choice."""
  events, result = [], collections.defaultdict(list)
  for number in order:
    scheduler().submit(new[number])
    for _ in range(rng.integers(0, 4)):
      events += scheduler().step()
  while scheduler().is_busy:
    events += scheduler().step()
  for event in events:
    prompt = () if event.prompt_scores is None else event.prompt_scores.log_probabilities_T.tolist()
    result[new.index(event.request), event.choice] += [*event.ids, *event.log_probabilities, *prompt]
  return dict(result)


@functools.cache
def alone():
  rng, result = np.random.default_rng(0), {}
  for number, request in enumerate(requests()):
    result |= {(number, choice): answer for (_, choice), answer in answers([request], [0], rng).items()}
  return result


def test_answers_are_the_same_bits_in_any_company_and_nothing_compiles():
  rng = np.random.default_rng(1)
  compiled = scheduler().compilations
  for _ in range(3):
    assert answers(requests(), rng.permutation(len(TEXTS)), rng) == alone()
  assert scheduler().compilations == compiled
  assert len({str(answer) for answer in alone().values()}) == len(alone())


@pytest.mark.slow
def test_scores_are_those_of_the_scorer_and_the_text_that_of_a_batch():
  new, texts, scores = requests(), [], []
  for (number, _), answer in alone().items():
    texts.append([*new[number].ids, *(x for x in answer if isinstance(x, int))])
    scores.append([x for x in answer if isinstance(x, float)])
  sources = [np.int32(new[number].source) for number, _ in alone()]
  expected = evaluate.log_probabilities(*model_and_params(), [np.int32(text) for text in texts], sources)
  for own, full in zip(scores, expected, strict=True):
    np.testing.assert_allclose(own, full, rtol=0, atol=1e-5)
  greedy = generate.tokens(*model_and_params(), Bytes(), [np.int32(source(TEXTS[0])[:-1])], Sampling(0), max_tokens=9)
  assert [i for i in texts[0][1:] if i != EOS] == greedy[0].tolist()


@pytest.mark.parametrize(('message', 'options'), [
    ('source=None, and an encoder-decoder', {}), (r'source=\[\] must have one token', {'source': []}),
    ('source must be whole numbers from 0 to 263; they are 5 to 264', {'source': [5, 264]}),
    ('source of 65 tokens is more than the 64', {'source': [0] * 65})])
def test_a_source_that_cannot_be_read_is_refused(message, options):
  with pytest.raises(ValueError, match=message):
    scheduler().submit(Request([START], **options))
  assert not scheduler().is_busy
