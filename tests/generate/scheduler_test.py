"""Requests join and leave the rows of a scheduler, and are as they are alone, bit for bit. `pages_test` has pages."""
import functools

import jax
import numpy as np
import pytest
from helpers.decoders import Bytes, make

from lm import evaluate, generate
from lm.data.batch import Batch
from lm.generate import Request, Sampling, Scheduler

EOS, VOCAB = Bytes.eos_id, Bytes.vocab_size


@functools.cache
def model_and_params():
  return make(kv_heads=2, tied=False)


def scheduler(rows=3, **options):
  model, params = model_and_params()
  engine = generate.Engine(model, model.unstack(params), 96, VOCAB, (EOS,))
  return Scheduler(engine, rows, **{'widths': (16, 4, 1), 'pages': 0, **options})


def ids(text):
  return [Bytes.bos_id, *text.encode()]


def requests():
  """Returns new requests of different lengths and settings."""
  return [
      Request(ids('def f(x):'), Sampling(0), 9), Request(ids(''), Sampling(), 12, seed=5),
      Request(ids('def f(x):'), Sampling(0.8, 60, 0.95, 0.001, 1.2, 0.5, 0.5), 5, seed=2 ** 40, choices=2, top=3),
      Request(ids('a longer prompt of 35 bytes, or so.'), Sampling(1.3, top_p=0.9), 7, 3, scores_prompt=True, top=2),
      Request(ids('x'), Sampling(top_k=5), 1), Request(ids('abc'), Sampling(0, repetition_penalty=1.5), 11),
      Request(ids('abcd'), Sampling(min_p=0.1, logit_bias=((65, 9.), (66, 8.)), bad_words=((65, 65), (66,))), 8, 1),
      Request(ids('a stop id'), Sampling(stop_ids=tuple(range(0, 32, 2)), min_tokens=2), 20, 4),
      Request(ids('only scored'), max_tokens=0, scores_prompt=True)]


def drain(engine):
  events = []
  while engine.is_busy:
    events += engine.step()
  return events


def answers(events):
  """Returns {(request, choice): (ids, log-probabilities, reason, alternatives, prompt scores)} with exact values."""
  result = {}
  for event in events:
    new, scores, reason, top, prompt = result.setdefault((event.request, event.choice), ([], [], [], [], []))
    new += event.ids
    scores += event.log_probabilities
    top += [event.scores.top_ids_TK.tolist(), event.scores.top_log_probabilities_TK.tolist()] if event.ids else []
    reason += [event.finish_reason] if event.finish_reason else []
    prompt += [x.tolist() for x in event.prompt_scores or ()]
  return result


@functools.cache
def shared():
  """Returns a scheduler that is warm. A test leaves it idle."""
  subject = scheduler()
  subject.warm_up()
  for request in requests():
    subject.submit(request)
  drain(subject)
  assert subject.compilations == 0
  return subject


def alone():
  """Returns the answers of the requests one after the other, by their numbers in `requests` and by choice."""
  result = {}
  for number, request in enumerate(requests()):
    shared().submit(request)
    result |= {(number, choice): answer for (_, choice), answer in answers(drain(shared())).items()}
  return result


alone_answers = functools.cache(alone)


def in_order(order, rng):
  """Returns the answers of requests that arrive in an order, at random steps."""
  new, events = requests(), []
  for number in order:
    shared().submit(new[number])
    for _ in range(rng.integers(0, 4)):
      events += shared().step()
  return {(new.index(request), choice): answer
          for (request, choice), answer in answers(events + drain(shared())).items()}


def check_orders(count):
  expected = alone_answers()
  assert len({str(answer[0]) for answer in expected.values()}) == len(expected)
  rng = np.random.default_rng(0)
  compiled = shared().compilations
  for _ in range(count):
    assert in_order(rng.permutation(len(requests())), rng) == expected
  assert shared().compilations == compiled


def test_answers_are_the_same_bits_in_any_company_and_nothing_compiles():
  check_orders(3)


@pytest.mark.slow
def test_answers_are_the_same_bits_in_fifty_orders_of_arrival():
  check_orders(50)


def test_scores_are_those_of_the_scorer():
  new_requests = requests()
  texts = [np.int32([*new_requests[number].ids, *new]) for (number, _), (new, *_) in alone_answers().items()]
  scored = evaluate.log_probabilities(*model_and_params(), texts)
  for ((number, _), (new, scores, reason, _, prompt)), full in zip(alone_answers().items(), scored, strict=True):
    request = new_requests[number]
    start = len(request.ids) - 1
    np.testing.assert_allclose(scores, full[start:], rtol=0, atol=1e-5)
    if request.scores_prompt:
      np.testing.assert_allclose(prompt[0], full[:start], rtol=0, atol=1e-5)
    assert (reason == ['stop']) == (new[-1:] != [] and new[-1] in {EOS, *request.sampling.stop_ids})
    assert reason == ['stop'] or reason == ['length'] and len(new) == request.max_tokens


def test_alternatives_are_the_most_probable_tokens():
  model, params = model_and_params()
  request = requests()[3]
  new, _, _, top, (_, prompt_ids, prompt_scores) = alone_answers()[3, 0]
  top_ids, top_scores = (sum(top[i::2], prompt) for i, prompt in enumerate((prompt_ids, prompt_scores)))

  @jax.jit
  def log_probabilities(batch):
    out = model.apply(params, batch)
    return jax.nn.log_softmax(out.head(out.hidden)[0])

  table = np.asarray(log_probabilities(Batch(np.int32([[*request.ids, *new[:-1]]]))))
  expected = np.argsort(-table[:, :VOCAB], axis=1)[:, :2]
  np.testing.assert_array_equal(top_ids, expected)
  np.testing.assert_allclose(top_scores, np.take_along_axis(table, expected, 1), rtol=0, atol=1e-5)


def test_an_aborted_request_frees_its_row_within_a_step_and_changes_no_other():
  subject, new = shared(), requests()
  compiled = subject.compilations
  first, second, third, fourth = new[1], new[3], new[6], new[7]   # three rows
  for request in (first, second, third, fourth):
    subject.submit(request)
  events = []
  while subject.running < 3:
    events += subject.step()
  subject.abort(second)
  assert subject.running == 2
  subject.abort(second)   # has no effect any more
  last = subject.step()
  assert [(event.ids, event.finish_reason) for event in last if event.request is second] == [([], 'abort')]
  assert fourth in [event.request for event in last] and subject.running == 3
  events += last + drain(subject)
  for number, request in ((1, first), (6, third), (7, fourth)):
    assert answers(events)[request, 0] == alone_answers()[number, 0]
  waiting = requests()[2]
  subject.submit(waiting)
  subject.abort(waiting)
  assert [(event.choice, event.finish_reason) for event in drain(subject)] == [(0, 'abort'), (1, 'abort')]
  assert subject.compilations == compiled and not subject.is_busy


@pytest.mark.parametrize(('message', 'options'), [
    (r'ids=\[\] must have one token', {'ids': []}), ('0 to 263; they are 5 to 264', {'ids': [5, 264]}),
    ('choices=0', {'choices': 0}), ('top=21 must be from 0 to 20', {'top': 21}), ('max_tokens=-1', {'max_tokens': -1}),
    ('prompt of 1 tokens and max_tokens=96 .* 96 of the context', {'max_tokens': 96}),
    ('prompt of 96 tokens and a new one', {'ids': [0] * 96, 'max_tokens': None}), ('seed=-1', {'seed': -1}),
    ('min_tokens=4 is more than max_tokens=3', {'sampling': Sampling(min_tokens=4)}),
    ('id 258 in logit_bias', {'sampling': Sampling(stop_ids=(258,))})])
def test_a_request_that_can_never_run_is_refused(message, options):
  with pytest.raises(ValueError, match=message):
    shared().submit(Request(**{'ids': [1], 'max_tokens': 3, **options}))
  assert not shared().is_busy


@pytest.mark.slow
def test_a_context_of_two_tokens_is_enough():
  model, params = model_and_params()
  subject = Scheduler(generate.Engine(model, model.unstack(params), 2, VOCAB, (EOS,)), 1)
  subject.warm_up()
  subject.submit(Request([1]))
  assert [(len(event.ids), event.finish_reason) for event in drain(subject)] in ([(1, 'length')], [(1, 'stop')])


def test_a_scheduler_that_cannot_work_is_refused():
  with pytest.raises(ValueError, match='must include 1'):
    scheduler(widths=(4, 2))
  with pytest.raises(ValueError, match='rows=0'):
    scheduler(rows=0)
  with pytest.raises(ValueError, match='pages=1 must be 0 or at least 2'):
    scheduler(pages=1)
  few = scheduler(pages=4)   # three for texts, of 16 tokens each
  with pytest.raises(ValueError, match='17 tokens and max_tokens=32 are more than the 48 of the context'):
    few.submit(Request([1] * 17, max_tokens=32))
  few.submit(Request([1] * 17))   # it may be as long as there are pages
