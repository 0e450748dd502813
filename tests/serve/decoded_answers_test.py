"""The server of a random decoder: its numbers are those of the scorer, also through a harness, and nothing compiles."""
import contextlib
import json
import types
import warnings

import numpy as np
import pytest
from helpers import decoders, tokenizers
from helpers.scripted_engine import address_of

from lm import generate
from lm.data.batch import Batch
from lm.data.tokenizers.huggingface import HuggingFace
from lm.evaluate import harness, score

pytest.importorskip('uvicorn')
pytest.importorskip('prometheus_client')
httpx = pytest.importorskip('httpx')
pytestmark = pytest.mark.slow

TOKENS = HuggingFace(tokenizers.byte_level(['<|endoftext|>']).to_str(), '<|endoftext|>', '<|endoftext|>', (), False)


@pytest.fixture(scope='module')
def model():
  return decoders.make()


@pytest.fixture(scope='module')
def served(model):
  """Yields a client of a server, and the scheduler behind it."""
  decoder, params = model
  engine = generate.Engine(decoder, decoder.unstack(params), 128, TOKENS.vocab_size, TOKENS.eos_ids)
  scheduler = generate.Scheduler(engine, 4, (16, 4, 1), pages=40)
  scheduler.warm_up()
  with (address_of(scheduler, None, 64, (decoder, engine.params), TOKENS) as address,
        httpx.Client(base_url=address, timeout=120) as client):
    yield client, scheduler


def log_probabilities(model, text):
  """Returns the scorer's log-probability of each token of a text but the first."""
  return score.log_probabilities(*model, [TOKENS.encode(text)])[0]


def test_log_probabilities_are_those_of_the_scorer(model, served):
  client, _ = served
  body = {'prompt': 'def naïve(x):', 'max_tokens': 9, 'logprobs': 3, 'echo': True, 'seed': 1}
  logprobs = client.post('/v1/completions', json=body).json()['choices'][0]['logprobs']
  ids = [*TOKENS.encode(body['prompt']).tolist()]
  expected = log_probabilities(model, body['prompt'])
  np.testing.assert_allclose(logprobs['token_logprobs'][1:len(ids)], expected, atol=1e-5)
  data = client.post('/v1/score', json={'text_1': 'def ', 'text_2': ['naïve', 'f(x)']}).json()['data']
  whole = lambda text: log_probabilities(model, text)[len('def ') - 1:].sum()
  np.testing.assert_allclose([each['score'] for each in data], [whole('def naïve'), whole('def f(x)')], atol=1e-4)


def test_an_embedding_is_the_mean_of_the_last_hidden_states(model, served):
  decoder, params = model
  ids = TOKENS.encode('naïve words').astype(np.int32)
  hidden = np.asarray(decoder.apply(params, Batch(ids[None])).hidden)[0].mean(0)
  data = served[0].post('/v1/embeddings', json={'input': ['naïve words', 'x']}).json()['data']
  np.testing.assert_allclose(data[0]['embedding'], hidden / np.linalg.norm(hidden), atol=1e-6)


def test_a_seed_fixes_an_answer_streamed_or_not_and_choices_differ(served):
  client, scheduler = served
  compiled = scheduler.compilations   # since the scheduler was warmed up, by the scorer of the test before
  body = {'prompt': 'ab', 'max_tokens': 20, 'n': 3, 'seed': 5, 'temperature': .9, 'top_p': .95}
  whole = client.post('/v1/completions', json=body).json()['choices']
  streamed = dict.fromkeys(range(3), '')
  for line in client.post('/v1/completions', json={**body, 'stream': True}).text.split('\n\n')[:-2]:
    choice, = json.loads(line.removeprefix('data: '))['choices']
    streamed[choice['index']] += choice['text']
  assert [choice['text'] for choice in whole] == list(streamed.values()) and len(set(streamed.values())) == 3
  assert scheduler.compilations == compiled


def figure(client, name):
  """Returns a figure of /metrics."""
  line, = (line for line in client.get('/metrics').text.splitlines() if line.startswith(f'vllm:{name}{{'))
  return float(line.rpartition(' ')[2])


def test_a_prompt_that_comes_again_is_not_read_again_and_has_the_same_answer(served):
  client, _ = served
  body = {'prompt': 'a prompt of more than two pages of sixteen', 'max_tokens': 5, 'seed': 1, 'logprobs': 1}
  answers, cached, hits = [], [], [figure(client, 'prefix_cache_hits_total')]
  for _ in range(2):
    answer = client.post('/v1/completions', json={**body, 'n': 2}).json()
    answers.append(answer['choices'])
    cached.append(answer['usage']['prompt_tokens_details']['cached_tokens'])
    hits.append(figure(client, 'prefix_cache_hits_total'))
  assert answers[0] == answers[1]
  assert cached == [after - before for before, after in zip(hits, hits[1:])] == [0, 32]
  assert figure(client, 'kv_cache_usage_perc') == 0 and figure(client, 'num_requests_running') == 0


def test_the_client_of_the_harness_gets_the_numbers_of_our_adapter(model, served):
  pytest.importorskip('tenacity')
  client, _ = served
  with warnings.catch_warnings(), contextlib.ExitStack() as stack:
    warnings.simplefilter('ignore')
    completions = pytest.importorskip('lm_eval.models.openai_completions')
    address = f'{client.base_url}/v1/completions'
    remote = completions.LocalCompletionsAPI(model='tiny', base_url=address, max_length=128)
    stack.callback(remote.tokenizer.session.close)
    pairs = [('ab', ' cd'), ('a ', 'b'), ('some words', ' and more'), ('naïve', ' 日本')]
    requests = [types.SimpleNamespace(args=pair) for pair in pairs]
    answers = remote.loglikelihood(requests, disable_tqdm=True)
  adapter = harness.client_class()(*model, TOKENS)
  expected = adapter.loglikelihood(requests)
  np.testing.assert_allclose([value for value, _ in answers], [value for value, _ in expected], atol=1e-4)
  assert [greedy for _, greedy in answers] == [greedy for _, greedy in expected]
