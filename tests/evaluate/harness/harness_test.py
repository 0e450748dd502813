"""lm-evaluation-harness as a client: requests are answered alike in any company, once, and with one bos."""
import json
import math
import pathlib
import types

import jax
import numpy as np
import pytest

from lm.data.chat import conversation, templates
from lm.data.tokenizers.folder import Bytes
from lm.evaluate import harness, row_shapes, score
from lm.evaluate.harness import requests
from lm.generate.sampling import Sampling

pytestmark = pytest.mark.filterwarnings('ignore')   # of the libraries that the harness imports
ROOT = pathlib.Path(__file__).parents[3]
TASKS = str(ROOT / 'experiments/tasks')


def of(*args):
  return types.SimpleNamespace(args=args)


def pairs(*args):
  return [of(*one) for one in args]


@pytest.fixture
def make(library, parts):
  def client(*args, **kwargs):
    return harness.client_class()(*parts, *args, **kwargs)
  return client


PAIRS = [('ab', ' cd'), ('', 'ef'), ('a ', 'b'), ('x' * 200, 'yes'), ('', '<s>g'), (' ', 'h'), ('ab', ''),
         ('ab', ' cd'), ('c', 'z' * 300)]


def test_continuations_are_scored_by_the_rules_of_the_harness(make, parts):
  model, params, tokenizer = parts
  bos, most = [tokenizer.bos_id], model.max_length

  def plain(context, continuation):   # both as ids
    ids = [*context, *continuation]
    log_p, = score.log_probabilities(model, params, [np.int32(ids[-max(most, len(continuation)) - 1:])])
    return log_p[len(log_p) - len(continuation):].sum(dtype=np.float64)
  ids = lambda text: list(text.encode())
  expected = [plain(bos + ids('ab'), ids(' cd')), plain(bos, ids('ef')), plain(bos + ids('a'), ids(' b')),
              plain(ids('x' * 200)[-(most - 2):], ids('yes')), plain(bos, ids('g')), plain(bos, ids(' h')), 0.,
              plain(bos + ids('ab'), ids(' cd')), plain(bos + ids('c'), ids('z' * 300))]
  scores = [log_p for log_p, _ in make().loglikelihood(pairs(*PAIRS))]
  assert scores[:3] + scores[4:] == expected[:3] + expected[4:]
  assert math.isclose(scores[3], expected[3], rel_tol=1e-6)   # its context is read apart


def test_a_token_across_the_join_leaves_a_continuation_to_score(library, parts):
  class Merging(Bytes):
    """Writes 'ab' as one token, that of 'A'."""

    def encode_batch(self, texts):
      return super().encode_batch([text.replace('ab', 'A') for text in texts])
  client = harness.client_class()(*parts[:2], Merging(parts[2].control))
  bos = [client.prefix_token_id]
  assert client._encode_pair('xa', 'b') == (bos + list(b'xa'), list(b'b'))   # nothing would be left to score
  assert client._encode_pair('xa', 'bc') == (bos + list(b'xa'), list(b'c'))   # as the harness encodes it
  assert client._encode_pair('x', 'ab') == (bos + list(b'x'), list(b'A'))


def test_an_answer_is_the_same_to_the_last_bit_in_any_company_and_few_programs_are_compiled(make, parts):
  rng = np.random.default_rng(0)
  texts = [''.join(rng.choice(list('abcd '), size=rng.integers(1, 150))) for _ in range(120)]
  batch = pairs(*((text[:i % 40], text[i % 40:] or 'e') for i, text in enumerate(texts)))
  before = score.predict._cache_size()
  together = make().loglikelihood(batch)
  assert score.predict._cache_size() - before <= len({row_shapes.width(length, 128) for length in range(1, 129)})
  alone = make()
  assert [alone.loglikelihood([request])[0] for request in batch[:12]] == together[:12]
  assert make().loglikelihood(batch[::-1]) == together[::-1]


def test_greedy_continuations_are_called_greedy(make, parts):
  model, params, tokenizer = parts
  letters, contexts = [chr(i) for i in range(32, 127)], [f'{letter} to' for letter in 'abcdefghijklmnop']
  answers = make().loglikelihood(pairs(*((context, ' ' + letter) for context in contexts for letter in letters)))
  answers = [answers[i:i + len(letters)] for i in range(0, len(answers), len(letters))]
  tokens = [[tokenizer.bos_id, *context.encode(), 32, 0] for context in contexts]
  predicted = score.predictions(model, params, [np.int32(ids) for ids in tokens])
  space_is_likely = [one.correct[-2] for one in predicted]
  tops = [one.log_p[-2] + one.top_log_p[-1] for one in predicted]
  for row, top, space in zip(answers, tops, space_is_likely):
    for log_p, is_greedy in row:
      assert is_greedy == (space and math.isclose(log_p, top, rel_tol=1e-6))
  greedy = make().loglikelihood(pairs(*((context, letter) for context in contexts for letter in letters)))
  assert 0 < sum(is_greedy for _, is_greedy in greedy) <= len(contexts)


@pytest.mark.parametrize('count', [1, 127, 128, 129, 300])
def test_rolling_windows_are_those_of_the_harness(make, parts, library, count):
  from lm_eval import utils
  model, params, tokenizer = parts
  text = ''.join(np.random.default_rng(count).choice(list('abcdef'), size=count))
  windows = utils.get_rolling_token_windows(list(text.encode()), tokenizer.bos_id, model.max_length, 1)
  expected = 0.
  for context, continuation in map(utils.make_disjoint_window, windows):
    log_p, = score.log_probabilities(model, params, [np.int32(context + continuation)])
    expected += log_p[len(context) - 1:].sum(dtype=np.float64)
  log_p, = make().loglikelihood_rolling(pairs((text,)))
  np.testing.assert_allclose(log_p, expected, rtol=1e-6)


def test_windows_have_the_published_values():
  pieces = list(score._pieces(0, 34, 10, 10))
  inputs = [range(piece.first - 1, piece.stop - 1) for piece in pieces]   # -1 is the token before the text
  scored = [range(piece.start, piece.stop) for piece in pieces]
  assert inputs == [range(-1, 9), range(9, 19), range(19, 29), range(23, 33)]
  assert scored == [range(10), range(10, 20), range(20, 30), range(30, 34)]


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary(library, parts):
  class Uniform:
    causal, reads_source, max_length, vocab = True, False, 64, 257

    def apply(self, params, batch):
      hidden = jax.numpy.zeros((*batch.tokens.shape, 1)) + 0 * params
      return types.SimpleNamespace(hidden=hidden, head=jax.tree_util.Partial(
          lambda hidden: jax.numpy.zeros((*hidden.shape[:2], 257))))
  client = harness.client_class()(Uniform(), jax.numpy.zeros(()), parts[2])
  result = harness.evaluate(client, ('lm_paragraphs',), TASKS)
  values = {measure.name: measure.interval() for measure in result.measures}
  np.testing.assert_allclose(values['lm_paragraphs/byte_perplexity'], [257.] * 3, rtol=1e-6)
  np.testing.assert_allclose(values['lm_paragraphs/bits_per_byte'], [8.005624549193879] * 3, rtol=1e-6)


def test_chat_prompts_have_one_bos_and_the_ids_of_the_template(make, parts):
  tokenizer, template = parts[2], conversation.Turns()
  client = make(template)
  messages = [{'role': 'system', 'content': 'be brief'}, {'role': 'user', 'content': 'hi '}]
  text = client.apply_chat_template(messages)
  assert client.tok_encode(text) == template.encode(tokenizer, messages, True)[0].tolist()
  assert client.tok_encode(text).count(tokenizer.bos_id) == 1 == client.tok_encode('hi').count(tokenizer.bos_id)
  context, continuation = client._encode_pair(text, 'yes')
  assert context == client.tok_encode(text) and continuation == list(b'yes')
  prefilled = client.apply_chat_template([*messages, {'role': 'assistant', 'content': 'It is'}], False)
  assert prefilled == text + 'It is'
  assert client.chat_template(True) == template.jinja(tokenizer) and client.chat_template(False) is None
  with pytest.raises(ValueError, match='no chat template'):
    make().apply_chat_template(messages)
  with pytest.raises(ValueError, match="'tools' cannot be chosen"):
    client.chat_template('tools')
  assert isinstance(client._renderer, templates.JinjaTemplate)


def test_texts_that_are_written_end_before_stop_strings_and_are_cut_on_the_left(make):
  settings = {'until': ['\n\n'], 'max_gen_toks': 12}
  context, client = 'w' * 116, make()   # 128 - 12 tokens are read
  whole, longer = client.generate_until(pairs((context, settings), ('q' * 150 + context, settings)))
  assert len(whole) > 4 and longer == whole
  stop = whole[3:5]
  short, = client.generate_until(pairs(('q' + context, {**settings, 'until': [stop, '']})))
  assert short == whole[:whole.index(stop)]


def test_how_many_contexts_are_cut_is_said(make, capsys):
  client = make()
  client.loglikelihood(pairs(('x' * 126, 'ab'), ('x' * 127, 'ab'), ('x' * 127, 'ab'), ('a', 'b')))   # after bos
  client.generate_until(pairs(('w' * 119, {'max_gen_toks': 8}), ('w' * 120, {'max_gen_toks': 8})))
  assert [note.split(' requests')[0] for note in client.notes] == ['1 of 3 loglikelihood', '1 of 2 generate_until']
  assert all(note in capsys.readouterr().err for note in client.notes[:1])


def test_drawn_texts_differ_between_copies_and_not_between_runs(make):
  batch = pairs(*[('def f', {'do_sample': True, 'temperature': 1., 'max_gen_toks': 8})] * 3)
  texts = make().generate_until(batch)
  assert len(set(texts)) == 3 and make().generate_until(batch) == texts


def test_settings_of_generation_are_read_as_the_harness_reads_them(library, make):
  from lm_eval.models.utils import normalize_gen_kwargs
  for settings in ({}, {'do_sample': False, 'temperature': 1.}, {'temperature': .5, 'max_tokens': 3},
                   {'do_sample': True, 'temperature': .5, 'max_new_tokens': 7, 'max_gen_toks': 9},
                   {'temperature': 0, 'until': 'x'}, {'until': ['a', 'b'], 'num_beams': 1}):
    theirs, ours = normalize_gen_kwargs(settings), requests.writing(settings)
    until = theirs.get('until', [])
    assert ours == (Sampling(theirs.get('temperature', 0.)), theirs['max_gen_toks'],
                    (until,) if isinstance(until, str) else tuple(until)), settings
  for settings, message in (({'num_beams': 4}, 'num_beams=4'), ({'typical_p': .5}, 'typical_p=0.5.*not supported'),
                            ({'max_gen_toks': 0}, 'max_gen_toks=0'), ({}, 'up to 256 tokens .* reads 128')):
    with pytest.raises(ValueError, match=message):
      make().generate_until(pairs(('a', settings)))


def test_a_run_that_was_stopped_scores_only_what_has_no_answer(make, monkeypatch, tmp_path):
  from lm_eval.api.model import CachingLM
  monkeypatch.setattr('lm.evaluate.harness.adapter.CHUNK', 4)
  batch = pairs(*((f'text {i}', ' a' * i) for i in range(1, 11)))
  whole, stored, counts, shown = make().loglikelihood(batch), {}, [], []
  predictions = score.predictions

  def stopping(model, params, texts, *args, **kwargs):
    counts.append(len(texts))
    if len(counts) == 3:
      raise KeyboardInterrupt
    return predictions(model, params, texts, *args, **kwargs)
  monkeypatch.setattr(score, 'predictions', stopping)
  with pytest.raises(KeyboardInterrupt):
    make(save=stored.update, show=lambda *numbers: shown.append(numbers)).loglikelihood(batch)
  assert len(stored) == 8 and shown == [(4, 10), (8, 10)]
  counts += [0]
  assert make(answers=json.loads(json.dumps(stored))).loglikelihood(batch) == whole and counts[4:] == [2]
  counts[:] = []
  with pytest.raises(KeyboardInterrupt):   # the cache of the harness's own command line
    CachingLM(make(), str(tmp_path / 'cache.db')).loglikelihood(batch)
  counts += [0]
  assert CachingLM(make(), str(tmp_path / 'cache.db')).loglikelihood(batch) == whole and counts[4:] == [2]


def test_another_process_with_other_requests_is_refused(make, monkeypatch):
  client = make()
  monkeypatch.setattr('lm.sharding.hosts.from_process_0', lambda value: 0)   # as if process 0 had none
  with pytest.raises(ValueError, match='has other requests than process 0'):
    client.loglikelihood(pairs(('a', 'b')))


def test_encoders_are_refused(library, parts):
  model = types.SimpleNamespace(causal=False, reads_source=False)
  with pytest.raises(ValueError, match='is for decoders'):
    harness.client_class()(model, *parts[1:])
