"""A judge model behind a local server that misbehaves as real ones do: both orders, retries, resumption, agreement."""
import contextlib
import http.server
import importlib
import json
import pathlib
import re
import threading

import numpy as np
import pytest

from lm.evaluate import chat_endpoint, chat_judge
from lm.evaluate.chat_judge import Judgement
from lm.evaluate.people import agreement
from lm.evaluate.people.system_outputs import Item


class Server:
  """Answers a request with what `reply(text A, text B)` returns: a text, a status with headers, or raw bytes."""

  def __init__(self):
    self.requests, self.headers, self.pauses, self.lock = [], [], [], threading.Lock()
    self.reply = lambda first, second: '[[C]]'
    server = self

    class Handler(http.server.BaseHTTPRequestHandler):
      def do_POST(self):   # noqa: N802
        body = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        with server.lock:
          server.requests.append(body)
          server.headers.append((self.path, dict(self.headers)))
        texts = re.findall(r'<text>\n(.*?)\n</text>', body['messages'][-1]['content'], re.DOTALL)
        reply = server.reply(*texts)
        status, headers = 200, {}
        if isinstance(reply, tuple):
          status, headers, reply = *reply, b'busy'
        if isinstance(reply, str | None):
          reply = json.dumps({'choices': [{'message': {'role': 'assistant', 'content': reply}}]}).encode()
        with contextlib.suppress(ConnectionError):
          self.send_response(status)
          for name, value in {**headers, 'Content-Length': str(len(reply))}.items():
            self.send_header(name, value)
          self.end_headers()
          self.wfile.write(reply)

      def log_message(self, *_):
        pass
    self._server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler)
    self.address = f'http://127.0.0.1:{self._server.server_port}/v1'
    self._thread = threading.Thread(target=self._server.serve_forever, kwargs={'poll_interval': 0.01})
    self._thread.start()

  def close(self):
    self._server.shutdown()
    self._thread.join()
    self._server.server_close()


@pytest.fixture
def server():
  server = Server()
  yield server
  server.close()


def longer(first, second):
  return f'Reasons. [[{"A" if len(first) > len(second) else "B"}]]'


def items(count):
  return [Item(f'i{i}', f'task {i}', (f'short {i}', f'a longer text {i}')) for i in range(count)]


def endpoint(server, **settings):
  return chat_endpoint.Endpoint(server.address, 'judge', sleep=server.pauses.append, **settings)


def test_each_pair_is_asked_in_both_orders_with_temperature_0(server):
  server.reply = longer
  judgements = chat_judge.judge(items(5), ['x', 'y'], endpoint(server, key='secret').ask, parallel=3)
  assert judgements == [Judgement(f'i{i}', ('x', 'y'), -1, -1) for i in range(5)]
  assert len(server.requests) == 10 and {one['temperature'] for one in server.requests} == {0}
  assert {one['model'] for one in server.requests} == {'judge'}
  (path, headers), *_ = server.headers
  assert path == '/v1/chat/completions' and headers['Authorization'] == 'Bearer secret'
  assert 'secret' not in repr(endpoint(server, key='secret'))
  for i in range(5):
    first, second = [one['messages'][-1]['content'] for one in server.requests
                     if f'task {i}\n' in one['messages'][-1]['content']]
    places = [text.index('a longer') - text.index('short') for text in (first, second)]
    assert min(places) < 0 < max(places)


def test_what_is_shown_first_wins_nothing(server):
  server.reply = lambda first, second: '[[A]]'
  judgements = chat_judge.judge(items(6), ['x', 'y'], endpoint(server).ask)
  assert [(one.shown, one.swapped, one.verdict) for one in judgements] == [(1, -1, 0)] * 6
  text = ' '.join(chat_judge.summarise(judgements).sentences)
  assert 'same verdict in 0.00 [0.00, 0.00] of 6 pairs' in text
  assert 'shown first is preferred in 1.00 [1.00, 1.00]' in text and 'no replacement for people' in text


@pytest.mark.parametrize('reply,verdict', [
    ('I think [[A]]', 1), ('[[B]]', -1), ('x [[C]] y', 0), ('[[A]] and again [[A]]', 1), ('[[A]] or [[B]]', None),
    ('A', None), ('[[D]]', None), ('[A]', None), ('', None), ('I cannot judge these texts.', None)])
def test_verdicts_are_parsed_strictly(reply, verdict):
  assert chat_judge.parse(reply) == verdict


def test_refusals_are_counted_and_left_out(server):
  server.reply = lambda first, second: None if '3' in first + second else longer(first, second)
  judgements = chat_judge.judge(items(6), ['x', 'y'], endpoint(server).ask)
  assert [one.verdict for one in judgements] == [-1, -1, -1, None, -1, -1]
  results = chat_judge.summarise(judgements)
  assert '1 of 6 pairs have no verdict' in results.sentences[1]
  assert results.tables[0].rows[0][:5] == ('x', 'y', '0', '0', '5')
  assert not chat_judge.summarise([judgements[3]]).tables


def test_equal_texts_are_not_asked(server):
  assert chat_judge.judge([Item('1', '', ('same', 'same'))], ['x', 'y'], endpoint(server).ask) == []
  assert not server.requests


def test_a_busy_server_is_asked_again_after_growing_pauses_which_are_printed(server, capsys):
  replies = iter([(503, {}), (429, {'Retry-After': '7'}), (500, {}), (429, {'Retry-After': 'Wed, 21 Oct 2065'})])
  server.reply = lambda *_: next(replies, '[[A]]')
  assert endpoint(server).ask(chat_judge.messages('', 'a', 'b')) == '[[A]]'
  assert server.pauses == [1, 7, 4, 8]
  second = capsys.readouterr().err.splitlines()[1]
  assert 'status 429' in second and 'attempt 3 of 6 follows in 7 seconds' in second


def test_a_server_that_stays_away_and_one_that_refuses_are_errors(server):
  ask = lambda **settings: endpoint(server, **settings).ask(chat_judge.messages('', 'a', 'b'))
  server.reply = lambda *_: (503, {})
  with pytest.raises(ConnectionError, match='no reply after 3 attempts .status 503: busy'):
    ask(attempts=3)
  assert len(server.requests) == 3
  server.reply = lambda *_: (401, {})
  with pytest.raises(ValueError, match='refuses the request with status 401: busy'):
    ask()
  assert len(server.requests) == 4
  for raw in b'<html>', b'[]', b'{"choices": []}', b'{"choices": [{"message": null}]}':
    server.reply = lambda *_, raw=raw: raw
    with pytest.raises(ValueError, match='not as OpenAI does'):
      ask()
  server.reply = lambda *_: (302, {'Location': f'{server.address}/elsewhere'})
  with pytest.raises(ValueError, match='status 302'):
    ask()
  assert not any('elsewhere' in path for path, _ in server.headers)
  closed = Server()
  closed.close()
  with pytest.raises(ConnectionError, match='no reply after 2 attempts'):
    endpoint(closed, attempts=2).ask([])


def test_a_run_that_stops_goes_on_and_asks_nothing_twice(server, tmp_path):
  file = tmp_path / 'replies.jsonl'
  server.reply = lambda first, second: (400, {}) if '4' in first + second else longer(first, second)
  with pytest.raises(ValueError, match='status 400'):
    chat_judge.judge(items(6), ['x', 'y'], chat_endpoint.KeptReplies(endpoint(server), file).ask)
  assert len(file.read_text().splitlines()) >= 8   # of four items; the pool may have been ahead
  with open(file, 'ab') as lines:
    lines.write(b'{"request": "cut o')   # by a kill
  server.reply, count = longer, len(server.requests)
  judge_model = chat_endpoint.KeptReplies(endpoint(server), file)
  judgements = chat_judge.judge(items(6), ['x', 'y'], judge_model.ask)
  assert [one.verdict for one in judgements] == [-1] * 6
  assert judge_model.sent == len(server.requests) - count <= 4 and len(file.read_text().splitlines()) == 12
  again = chat_endpoint.KeptReplies(endpoint(server), file)
  assert chat_judge.judge(items(6), ['x', 'y'], again.ask) == judgements and again.sent == 0
  other = chat_endpoint.KeptReplies(endpoint(server, max_tokens=5), file)
  chat_judge.judge(items(1), ['x', 'y'], other.ask)
  assert other.sent == 2   # another request
  file.write_text('[]\n')
  with pytest.raises(ValueError, match='line 1 is no kept reply'):
    chat_endpoint.KeptReplies(endpoint(server), file)


def test_an_address_without_a_scheme_is_refused():
  with pytest.raises(ValueError, match='begins with neither'):
    chat_endpoint.Endpoint('localhost:8000', 'judge')
  assert chat_endpoint.Endpoint('http://a/v1/chat/completions', 'm').url == 'http://a/v1/chat/completions'


def test_agreement_with_people_is_cohens_kappa():
  rng = np.random.default_rng(0)
  values = rng.integers(-1, 2, (2, 80))
  values[1, :50] = values[0, :50]
  judgements = [Judgement(str(i), ('x', 'y'), int(one), int(one)) for i, one in enumerate(values[0])]
  people = {(str(i), frozenset('xy')): {1: 'x', -1: 'y', 0: 'tie'}[one] for i, one in enumerate(values[1].tolist())}
  sentence = chat_judge.summarise(judgements, people).sentences[-1]
  assert f'kappa is {agreement.cohen_kappa(*values):.2f} [' in sentence and 'of 80 pairs' in sentence
  assert f'agree in {np.mean(values[0] == values[1]):.2f} [' in sentence
  assert 'no pair in common' in chat_judge.summarise(judgements, {('z', frozenset('xy')): 'x'}).sentences[-1]


def test_equal_systems_are_not_told_apart_and_better_ones_are():
  judgements = [Judgement(str(i), ('x', 'y'), one, one) for i, one in enumerate([1, -1] * 20)]
  judgements += [Judgement(str(i), ('x', 'z'), 1, 1) for i in range(40)]
  (*_, rate, verdict), (*_, other) = chat_judge.summarise(judgements).tables[0].rows
  assert rate.value == 0.5 and verdict.startswith('not distinguishable') and other == 'better'


VOTES = '''vote,rater,time,seconds,item,check,shown,preferred,comment
1,1,0,1,i0,,x|y,x,
2,2,0,1,i0,,y|x,x,
3,3,0,1,i0,,y|x,y,
4,1,0,1,i1,,x|y,y,
5,2,0,1,i1,,x|y,x,
6,1,0,1,i2,,x|y,tie,
7,1,0,1,i2,repeat,y|x,x,
'''


def test_what_most_people_prefer_is_read_from_their_votes(tmp_path):
  file = tmp_path / 'votes.csv'
  file.write_text(VOTES)
  pair = frozenset('xy')
  assert chat_judge.preferences(file) == {('i0', pair): 'x', ('i1', pair): 'tie', ('i2', pair): 'tie'}
  file.write_text('vote,best\n1,x\n')
  with pytest.raises(ValueError, match='has no votes on pairs'):
    chat_judge.preferences(file)


def test_the_script_prints_agreement_and_writes_judgements(server, tmp_path, monkeypatch, capsys):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / 'experiments')
  script = importlib.import_module('judge')
  for i, name in enumerate('xy'):
    lines = [json.dumps({'id': item.id, 'prompt': item.prompt, 'text': item.texts[i]}) for item in items(3)]
    (tmp_path / f'{name}.jsonl').write_text('\n'.join(lines))
  (tmp_path / 'votes.csv').write_text(VOTES)
  server.reply = longer
  arguments = {'outputs': (str(tmp_path / 'x.jsonl'), str(tmp_path / 'y.jsonl')), 'address': server.address,
               'model': 'judge', 'votes': tmp_path / 'votes.csv', 'replies': tmp_path / 'replies.jsonl',
               'out': tmp_path / 'judge.json'}
  with pytest.raises(ValueError, match='the environment has no such variable'):
    script.judge(**arguments, key_variable='NO_SUCH_KEY')
  with pytest.raises(ValueError, match='has votes on x, y, and --outputs has a, b'):
    script.judge(**{**arguments, 'outputs': tuple(f'{name}={tmp_path}/{file}.jsonl' for name, file in ('ax', 'by'))})
  assert not server.requests
  script.judge(**arguments)
  text = capsys.readouterr().out
  assert 'agree in 0.00' in text and 'of 3 pairs that both judged' in text and '6 requests were sent' in text
  stored = json.loads((tmp_path / 'judge.json').read_text())
  assert [one['verdict'] for one in stored['judgements']] == [-1] * 3 and 'no replacement' in stored['caution']
