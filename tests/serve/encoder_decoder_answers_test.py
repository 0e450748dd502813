"""The server of an encoder-decoder: a prompt is the source, and log-probabilities are those of the scorer."""
import numpy as np
import pytest
from helpers.encoders import random_params
from helpers.scripted_engine import TOKENS, client_of

from lm import generate
from lm.evaluate import score
from lm.models import encoder_decoder

pytest.importorskip('starlette')
pytest.importorskip('prometheus_client')
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def model():
  t5 = encoder_decoder.t5(TOKENS.vocab_size, 16, 1, 2, 8, 32)
  return t5, random_params(t5)


@pytest.fixture(scope='module')
def client(model):
  t5, params = model
  engine = generate.Engine(t5, t5.unstack(params), 64, TOKENS.vocab_size, TOKENS.eos_ids)
  scheduler = generate.Scheduler(engine, 2, (8, 1))
  with client_of(scheduler, None, 64, model, TOKENS, context=64) as client:
    yield client


def ids(text):
  return np.frombuffer(text.encode(), np.uint8).astype(np.int32)


def scores(model, source, text):
  """Returns the scorer's log-probabilities of a text after bos, given its source."""
  texts, sources = [np.int32([TOKENS.bos_id, *text])], [np.int32([*ids(source), TOKENS.eos_id])]
  return score.log_probabilities(*model, texts, sources)[0]


def test_a_prompt_is_the_source_of_an_answer(model, client):
  body = {'prompt': ['a source', 'another'], 'max_tokens': 9, 'logprobs': 2, 'temperature': 0, 'seed': 1}
  answer = client.post('/v1/completions', json=body).json()
  assert answer['usage']['prompt_tokens'] == len('a source') + 1 + len('another') + 1
  expected = generate.generate(*model, TOKENS, body['prompt'], generate.Sampling(0), max_tokens=9)
  assert [choice['text'] for choice in answer['choices']] == expected
  written = generate.tokens(*model, TOKENS, [ids(source) for source in body['prompt']], generate.Sampling(0),
                            max_tokens=9)
  for source, choice, text in zip(body['prompt'], answer['choices'], written):
    assert len(text)
    np.testing.assert_allclose(choice['logprobs']['token_logprobs'][:len(text)], scores(model, source, text), rtol=0,
                               atol=1e-5)
  pair = client.post('/v1/score', json={'text_1': 'a source', 'text_2': 'its text'}).json()['data'][0]
  assert pair['tokens'] == len('its text')
  np.testing.assert_allclose(pair['score'], scores(model, 'a source', ids('its text')).sum(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(('path', 'body', 'param', 'message'), [
    ('completions', {'prompt': 'a', 'echo': True}, 'echo', 'echo is not supported: this model is an encoder-decoder'),
    ('completions', {'prompt': 'a' * 64}, 'prompt', 'a text of 65 tokens, and the model reads 64'),
    ('completions', {'prompt': 'a', 'max_tokens': 64}, 'prompt', 'has 1 tokens, and with max_tokens=64'),
    ('embeddings', {'input': 'a'}, 'model', 'embeddings are not supported'),
    ('chat/completions', {'messages': [{'role': 'user', 'content': 'a'}]}, 'messages', 'no chat template')])
def test_what_an_encoder_decoder_cannot_do_is_refused(client, path, body, param, message):
  answer = client.post(f'/v1/{path}', json=body)
  error = answer.json()['error']
  assert answer.status_code == 400 and error['param'] == param and message in error['message']
