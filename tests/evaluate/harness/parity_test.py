"""Our client answers each request as the harness's own `hf` backend does on the same model."""
import json
import types

import jax
import numpy as np
import pytest

from lm.data.chat import conversation
from lm.data.tokenizers.folder import Bytes
from lm.evaluate import harness, score
from lm.hf import pretrained
from lm.models import transformer

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings('ignore')]   # warnings of the libraries
TOLERANCE = 1e-4


def instances(*args):
  return [types.SimpleNamespace(args=one, task_name='task') for one in args]


@pytest.fixture(scope='module')
def clients(tmp_path_factory):
  """Returns our client and that of the harness on an exported model whose most likely tokens are letters."""
  for library in ('lm_eval', 'torch', 'transformers', 'accelerate'):
    pytest.importorskip(library)
  from lm_eval.models.huggingface import HFLM
  tokenizer, folder = Bytes(('<|user|>', '<|assistant|>', '<|system|>', '<|end|>')), tmp_path_factory.mktemp('a') / 'hf'
  model = transformer.llama(tokenizer.vocab_size, 32, 2, 2, hidden=48, max_length=96, tied=False)
  params = jax.tree.map(lambda x: 12 * x if x.ndim > 1 else x, jax.jit(model.init)(jax.random.key(0)))
  letters = np.isin(np.arange(model.vocab), np.frombuffer(b'abcdefghijklmnopqrstuvwxyz. ', np.uint8))
  params = {**params, 'head': np.where(letters[:, None], np.array(params['head']), 0)}
  pretrained.write(folder, model, params, tokenizer, template=conversation.Turns())
  loaded = pretrained.load(str(folder))
  ours = harness.client_class()(loaded.model, loaded.params, loaded.tokenizer,
                                pretrained.folder_template(loaded.folder))
  # With its cache of logits, the `hf` backend mixes up windows of a document that repeats itself.
  return ours, HFLM(str(folder), device='cpu', dtype='float32', batch_size=4, logits_cache=False)


def chats(client):
  system, question = {'role': 'system', 'content': 'be brief'}, {'role': 'user', 'content': 'what is it? '}
  answer = {'role': 'assistant', 'content': 'It is '}
  return [client.apply_chat_template(messages) for messages in ([question], [system, question])] + [
      client.apply_chat_template([question, answer], False)]


def test_prompts_of_chats_are_the_same(clients):
  ours, theirs = clients
  assert chats(ours) == chats(theirs)
  for text in (*chats(ours), 'plain', '', 'spelled <|end|> it', 'é<s>'):
    assert ours.tok_encode(text) == theirs.tok_encode(text)


def test_continuations_have_the_same_scores(clients):
  rng = np.random.default_rng(0)
  texts = [''.join(rng.choice(list('abc d.é'), size=rng.integers(2, 140))) for _ in range(40)]
  requests = instances(*((text[:len(text) // 2].strip(), ' ' + text[len(text) // 2:]) for text in texts), ('', 'ab'),
                       *(('it is ' * 12 + text[:12], ' ' + letter * 8) for text in texts[:4] for letter in 'abcd'),
                       *((context, letter) for context in ['it', *chats(clients[0])]
                         for letter in 'abcdefghijklmnopqrstuvwxyz'))
  ours, theirs = (client.loglikelihood(requests, disable_tqdm=True) for client in clients)
  np.testing.assert_allclose([log_p for log_p, _ in ours], [log_p for log_p, _ in theirs], TOLERANCE, TOLERANCE)
  assert [is_greedy for _, is_greedy in ours] == [is_greedy for _, is_greedy in theirs]
  assert 0 < sum(is_greedy for _, is_greedy in ours) < len(requests)


def test_documents_have_the_same_scores_except_for_a_second_bos(clients):
  ours, theirs = clients
  requests = instances(('ab',), ('one and two ' * 3,), ('é' * 20,))
  bos = ours.prefix_token_id
  second, = score.log_probabilities(ours._model, ours._params, [np.int32([bos, bos])])
  texts = [[bos, bos, *request.args[0].encode()] for request in requests]   # what the `hf` backend scores
  expected = [log_p.sum() for log_p in score.log_probabilities(ours._model, ours._params, list(map(np.int32, texts)))]
  np.testing.assert_allclose(theirs.loglikelihood_rolling(requests, disable_tqdm=True), expected, TOLERANCE)
  alone = [log_p.sum() for log_p in score.log_probabilities(
      ours._model, ours._params, [np.int32(text[1:]) for text in texts])]
  np.testing.assert_allclose(ours.loglikelihood_rolling(requests, disable_tqdm=True), alone, 1e-6)
  assert abs(second[0]) > 0.1
  theirs.add_bos_token = False   # then both score the same windows
  try:
    requests = instances(('one and two ' * 30,), ('ab',))
    np.testing.assert_allclose(theirs.loglikelihood_rolling(requests, disable_tqdm=True),
                               ours.loglikelihood_rolling(requests, disable_tqdm=True), TOLERANCE)
  finally:
    theirs.add_bos_token = None


def test_texts_are_the_same(clients):
  settings = [{'until': ['. ', 'q'], 'max_gen_toks': 20}, {'until': [], 'max_gen_toks': 9, 'do_sample': False}]
  contexts = ['it is', 'a', 'the long ' * 12, *chats(clients[0])]
  requests = instances(*((context, each) for context in contexts for each in settings))
  ours, theirs = (client.generate_until(requests, disable_tqdm=True) for client in clients)
  assert ours == theirs, json.dumps([ours, theirs], indent=1)
  assert len(set(ours)) > 6
