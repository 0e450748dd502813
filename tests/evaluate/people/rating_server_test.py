"""Raters never learn a system's name, a link opens the tasks of one rater, and bad requests are refused in one line."""
import base64
import hashlib
import json
import re
import socket

import pytest
from helpers import human_studies

from lm.evaluate import people

pytest.importorskip('starlette')

SECRET = ('zebra', 'quagga', 'okapi')   # names of systems, which occur in no text


def study(folder, mode='pairwise', **settings):
  systems = SECRET if mode == 'best_worst' else SECRET[:2]
  return human_studies.new_study(folder, systems, mode=mode, **settings)


def vote(client, link, state, answer, id='', **changes):
  return client.post(f'{link}/vote', json={'id': id or f'vote-{state["task"]}-{link[-8:]}', 'task': state['task'],
                                           'answer': answer, 'comment': '', 'seconds': 1.5, **changes})


ANSWERS = {'pairwise': {'choice': 0}, 'best_worst': {'best': 0, 'worst': 2}, 'likert': {'ratings': [[3], [4]]}}


@pytest.mark.parametrize('mode', ANSWERS)
def test_no_response_to_a_rater_has_the_name_of_a_system_nor_says_what_is_a_check(tmp_path, mode):
  store = study(tmp_path, mode, criteria=('fluency',) if mode == 'likert' else None)
  client, link = human_studies.client(store), f'/rate/{store.raters[1]}'
  replies = [client.get(link), client.get(f'{link}/task')]
  while (state := replies[-1].json())['task'] is not None:
    replies.append(vote(client, link, state, ANSWERS[mode]))
  replies += [client.post(f'{link}/undo', json={'id': state['last']}), client.post(f'{link}/skip', json={'task': 0}),
              client.post(f'{link}/vote', json={'task': 0}), client.get(f'{link}/results'),
              client.get(f'/results/{store.raters[1]}/data'), client.get(f'/results/{store.raters[1]}/votes.csv')]
  assert len(replies) == 2 + len(store.tasks[1]) + 6
  for reply in replies:
    sent = reply.text + str(reply.headers)
    assert not any(word in sent for word in (*SECRET, 'scrambled', store.results_token, store.raters[2]))
  names = set().union(*(reply.json().keys() for reply in replies[1:-6]))
  assert names == {'stored', 'mode', 'question', 'criteria', 'scale', 'task', 'done', 'total', 'skipped', 'last',
                   'prompt', 'texts'}


def test_a_rater_sees_each_text_where_the_vote_says_that_it_was(tmp_path):
  store = study(tmp_path)
  client, link = human_studies.client(store), f'/rate/{store.raters[2]}'
  state = client.get(f'{link}/task').json()
  while state['task'] is not None:
    task = store.tasks[2][state['task']]
    intact = [store.study.items[task.item].texts[store.study.systems.index(system)] for system in task.shown]
    assert state['prompt'] == store.study.items[task.item].prompt
    for position, (text, whole) in enumerate(zip(state['texts'], intact)):
      assert (text == whole) == (position != task.scrambled)
    state = vote(client, link, state, {'choice': 1}).json()
  for row in client.get(f'/results/{store.results_token}/votes.csv').text.splitlines()[1:]:
    *_, check, shown, preferred, comment = row.split(',')
    assert preferred == shown.split('|')[1] and comment == ''


def test_unknown_links_are_answered_in_one_line_and_show_nothing(tmp_path):
  store = study(tmp_path)
  client = human_studies.client(store)
  for method, path in (('GET', '/rate/x/task'), ('POST', '/rate/x/vote'), ('GET', '/results/x/data'),
                       ('GET', f'/rate/{store.results_token}/task'), ('GET', f'/results/{store.raters[1]}/data'),
                       ('POST', '/rate/é/undo')):
    reply = client.request(method, path)
    assert reply.status_code == 404 and reply.json() == {
        'error': 'This link belongs to no one in this study. Ask for the link again, and open the whole of it.'}
  for path in ('/', '/rate/x', '/results/x', '/rate'):
    assert client.get(path).status_code == 404 and '<!doctype html>' in client.get(path).text
  assert not store.votes()


@pytest.mark.parametrize('changes', [
    {'id': 'short'}, {'id': 7}, {'task': 99}, {'task': '0'}, {'answer': {'choice': 5}}, {'answer': None},
    {'seconds': 'x'}, {'comment': 'x' * 5001}, {'comment': None}])
def test_a_vote_that_is_wrong_is_refused_and_not_stored(tmp_path, changes):
  store = study(tmp_path)
  client, link = human_studies.client(store), f'/rate/{store.raters[1]}'
  reply = vote(client, link, client.get(f'{link}/task').json(), **{'answer': {'choice': 0}, **changes})
  assert reply.status_code == 400 and 'error' in reply.json() and not store.votes()


def test_requests_that_are_no_json_or_too_long_are_refused(tmp_path):
  store = study(tmp_path)
  client, link = human_studies.client(store), f'/rate/{store.raters[1]}'
  for content, status in ((b'\xff', 400), (b'[1]', 400), (b'', 400), (b'{"x": "' + b'y' * 70_000 + b'"}', 413)):
    for action in ('vote', 'skip', 'undo'):
      assert client.post(f'{link}/{action}', content=content).status_code == status
  assert client.post(f'{link}/skip', json={'task': 99}).status_code == 400
  assert client.post(f'{link}/undo', json={'id': 'never-sent'}).status_code == 409


def test_a_full_disk_is_an_error_after_which_the_page_tries_again(tmp_path):
  store = study(tmp_path)
  client, link = human_studies.client(store), f'/rate/{store.raters[1]}'
  state = client.get(f'{link}/task').json()
  store._connection.execute('PRAGMA query_only=1')   # as unwritable as a full disk
  reply = vote(client, link, state, {'choice': 0})
  assert reply.status_code == 503 and 'the database cannot be written' in reply.json()['error']
  store._connection.execute('PRAGMA query_only=0')
  assert vote(client, link, state, {'choice': 0}).json()['done'] == 1


def test_undo_shows_the_task_again_with_its_answer(tmp_path):
  store = study(tmp_path, 'likert', criteria=('fluency',))
  client, link = human_studies.client(store), f'/rate/{store.raters[1]}'
  first = client.get(f'{link}/task').json()
  second = vote(client, link, first, ANSWERS['likert'], comment='hm').json()
  undone = client.post(f'{link}/undo', json={'id': second['last']}).json()
  assert undone == {**first, 'answer': ANSWERS['likert'], 'comment': 'hm'}
  assert vote(client, link, first, ANSWERS['likert'], id='vote-another').json() == {**second, 'last': 'vote-another'}


def test_the_page_may_run_its_own_script_and_load_nothing_else(tmp_path):
  store = study(tmp_path)
  reply = human_studies.client(store).get(f'/rate/{store.raters[1]}')
  policy = dict(part.split(' ', 1) for part in reply.headers['content-security-policy'].split('; '))
  for tag in ('script', 'style'):
    body, = re.findall(f'<{tag}>(.*?)</{tag}>', reply.text, re.DOTALL)
    assert policy[f'{tag}-src'] == f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'"
  assert policy['default-src'] == "'none'" and policy['connect-src'] == "'self'"
  assert not re.search(r'(?:src|href)="(?!data:)|url\(|@import|innerHTML|document\.write|\son\w+="', reply.text)
  assert reply.headers['referrer-policy'] == 'no-referrer' and reply.headers['cache-control'] == 'no-store'


def test_text_with_markup_is_sent_as_it_is(tmp_path):
  texts = '<script>alert(1)</script> one two three four five six', '<img src=x onerror=alert(2)> a b c d e f'
  for name, text in zip('ab', texts):
    (tmp_path / name).write_text(f'{text}\n' * 4)
  store = people.open_study(tmp_path / 'study', [str(tmp_path / name) for name in 'ab'], {'checks': 0})
  reply = human_studies.client(store).get(f'/rate/{store.raters[1]}/task')
  assert sorted(reply.json()['texts']) == sorted(texts) and reply.headers['content-type'] == 'application/json'


def test_results_leave_out_the_raters_that_are_named(tmp_path):
  store = study(tmp_path)
  human_studies.answer_all(store, 1, human_studies.preferred(SECRET))
  client, link = human_studies.client(store), f'/results/{store.results_token}'
  everything, without = (client.get(f'{link}/data{query}').json() for query in ('', '?without=1,x'))
  assert everything['sentences'][0].startswith('10 of 20 answers') and len(everything['tables']) == 4
  assert without['sentences'] == ['0 of 10 answers are in, 0 of them to attention checks, which count for no rating.',
                                  'Left out: rater 1.']
  json.dumps(everything, allow_nan=False)
  assert client.get(f'{link}/other.csv').status_code == 404


def test_a_port_in_use_is_one_clear_line(tmp_path):
  store = study(tmp_path)
  with socket.create_server(('127.0.0.1', 0)) as server:
    port = server.getsockname()[1]
    with pytest.raises(OSError, match=f'cannot listen on 127.0.0.1 port {port} .*; give another --port or --host'):
      people.serve(store, '127.0.0.1', port)
