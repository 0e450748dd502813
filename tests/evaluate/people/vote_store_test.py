"""Votes are stored once, survive a kill of the server, and are never lost by what is sent twice, undone or skipped."""
import contextlib
import http.client
import importlib
import json
import os
import pathlib
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import urllib.request

import pytest
from helpers import human_studies

from lm.evaluate import people
from lm.evaluate.people import vote_store

SCRIPT = pathlib.Path(__file__).parents[3] / 'experiments' / 'human_eval.py'


def test_an_export_into_a_folder_that_is_missing_is_refused_before_the_study_is_opened(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(SCRIPT.parent)
  script, database = importlib.import_module('human_eval'), tmp_path / 'study.sqlite'
  for name in 'export', 'export_results':
    with pytest.raises(ValueError, match=f'there is no folder {tmp_path}/missing; make it, or give another file'):
      script.human_eval(outputs=('a.jsonl', 'b.jsonl'), database=database, **{name: tmp_path / 'missing/votes.csv'})
  assert not database.exists()


def test_a_vote_that_is_sent_twice_counts_once(tmp_path):
  store = human_studies.new_study(tmp_path)
  assert store.add('vote-one', 1, 0, {'choice': 0}, 'why', 1.5) and store.add('vote-one', 1, 0, {'choice': 1})
  vote, = store.votes()
  assert vote.answer == {'choice': 0} and vote.comment == 'why' and vote.seconds == 1.5
  assert vote.task == store.tasks[1][0] and store.progress(1)[:2] == (1, 1) and store.progress(2).answered == 0


def test_a_second_vote_on_a_task_does_not_replace_the_first(tmp_path):
  store = human_studies.new_study(tmp_path)
  assert store.add('vote-one', 1, 0, {'choice': 0})
  assert not store.add('vote-two', 1, 0, {'choice': 1})
  assert [vote.id for vote in store.votes()] == ['vote-one']
  assert not store.add('vote-one', 2, 0, {'choice': 1})   # an id is of one rater
  with pytest.raises(ValueError, match='no task 99'):
    store.add('vote-three', 1, 99, {'choice': 0})


def test_an_undone_vote_is_asked_again_and_does_not_come_back_when_it_is_sent_again(tmp_path):
  store = human_studies.new_study(tmp_path)
  human_studies.answer_all(store, 1, human_studies.preferred(('alpha', 'beta')), until=3)
  last = store.progress(1).last
  assert store.undo(1, last).number == 2 and store.undo(1, last).number == 2   # twice is the same
  assert store.progress(1).number == 2 and len(store.votes()) == 2
  assert store.add(last, 1, 2, {'choice': 0}) and len(store.votes()) == 2
  assert store.add('vote-new', 1, 2, {'choice': 0}) and len(store.votes()) == 3
  assert store.undo(2, 'vote-new') is None and store.undo(1, 'no-such-vote') is None
  with contextlib.closing(sqlite3.connect(store.path)) as file:
    assert file.execute('SELECT id FROM votes WHERE undone IS NOT NULL').fetchall() == [(last,)]   # it stays there


def test_skipped_tasks_come_again_at_the_end_in_the_order_of_their_skips(tmp_path):
  store = human_studies.new_study(tmp_path)
  store.skip(1, 0)
  store.skip(1, 1)
  store.skip(1, 0)
  shown = []
  while (number := store.progress(1).number) is not None:
    shown.append(number)
    store.add(f'vote-{number}', 1, number, {'choice': 0})
  assert shown == [*range(2, len(store.tasks[1])), 1, 0]
  assert store.progress(1).skipped == 0


def test_votes_of_many_threads_are_all_stored(tmp_path):
  store = human_studies.new_study(tmp_path, items=8, raters=4, votes_per_item=4)
  rule = human_studies.preferred(('beta', 'alpha'))
  threads = [threading.Thread(target=human_studies.answer_all, args=(store, rater, rule)) for rater in store.raters]
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join()
  assert len(store.votes()) == 4 * (8 + 4)


def test_a_study_continues_from_its_database_alone(tmp_path):
  store = human_studies.new_study(tmp_path, mode='likert', criteria=('fluency',), seed=3)
  store.add('vote-one', 1, 0, {'ratings': [[1], [2]]})
  again = people.open_study(store.path)
  assert (again.study, again.tasks, again.raters, again.results_token, again.votes()) == (
      store.study, store.tasks, store.raters, store.results_token, store.votes())
  outputs = [str(tmp_path / f'{name}.jsonl') for name in ('beta', 'alpha')]   # the order of the flags is no matter
  assert people.open_study(store.path, outputs, {'mode': 'likert', 'seed': None}).study == store.study


def test_raters_are_added_and_keep_their_votes_and_links(tmp_path):
  store = human_studies.new_study(tmp_path)
  human_studies.answer_all(store, 1, human_studies.preferred(('alpha', 'beta')))
  votes, links = store.votes(), dict(store.raters)
  extended = people.open_study(store.path, raters=3, votes_per_item=3)
  assert extended.votes() == votes and links.items() < extended.raters.items() and len(extended.tasks[3]) == 6 + 4
  with pytest.raises(ValueError, match='has 3 raters and 3 votes an item, and cannot shrink to --raters=2'):
    people.open_study(store.path, raters=2)


@pytest.mark.parametrize('change,message', [
    ({'settings': {'mode': 'likert'}}, "mode is 'pairwise' there, and 'likert' here"),
    ({'settings': {'checks': 1}}, 'checks is 4 there, and 1 here'),
    ({'systems': ('alpha', 'gamma')}, 'the systems are alpha, beta there, and alpha, gamma here'),
    ({'items': 5}, 'it has 6 items, of which these files have 5 by id'),
    ({'edit': True}, 'the prompt or a text of id i2 is different')])
def test_another_study_is_refused_and_nothing_is_changed(tmp_path, change, message):
  store = human_studies.new_study(tmp_path)
  store.add('vote-one', 1, 0, {'choice': 0})
  other = tmp_path / 'other'
  other.mkdir()
  outputs = human_studies.write_outputs(other, change.get('systems', ('alpha', 'beta')), change.get('items', 6))
  if 'edit' in change:
    path = pathlib.Path(outputs[1])
    path.write_text(path.read_text().replace('Aromi is', 'Aromi was'))
  with pytest.raises(ValueError, match=f'study.sqlite holds another study: {message}'):
    people.open_study(store.path, outputs, change.get('settings', {}))
  assert [vote.id for vote in people.open_study(store.path).votes()] == ['vote-one']


def test_files_that_are_no_study_are_refused_and_stay_as_they_are(tmp_path):
  with contextlib.closing(sqlite3.connect(tmp_path / 'songs')) as file:
    file.execute('CREATE TABLE study (x)')
  (tmp_path / 'text').write_text('notes')
  for name in ('songs', 'text'):
    before = (tmp_path / name).read_bytes()
    with pytest.raises(ValueError, match=f'{name} is not the database of a study; give another --database'):
      people.open_study(tmp_path / name)
    assert (tmp_path / name).read_bytes() == before
  with pytest.raises(ValueError, match='none has no study yet; give --outputs='):
    people.open_study(tmp_path / 'none')
  assert not (tmp_path / 'none').exists()
  with pytest.raises(OSError, match='no/folder/x cannot be opened'):
    people.open_study(tmp_path / 'no/folder/x', human_studies.write_outputs(tmp_path))


def test_a_study_that_cannot_begin_leaves_no_file(tmp_path):
  with pytest.raises(ValueError, match='--votes_per_item=3 needs as many raters'):
    human_studies.new_study(tmp_path, votes_per_item=3)
  assert not (tmp_path / 'study.sqlite').exists()


def test_a_kill_while_a_study_begins_leaves_a_file_in_which_it_can_begin(tmp_path, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(vote_store, '_insert', lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      human_studies.new_study(tmp_path)
  assert (tmp_path / 'study.sqlite').exists()
  assert human_studies.new_study(tmp_path).progress(1).answered == 0


def post(link, body):
  with urllib.request.urlopen(urllib.request.Request(f'{link}/vote', json.dumps(body).encode()), timeout=60) as reply:
    return json.load(reply)


def test_every_acknowledged_vote_survives_kill_9_of_a_real_server(tmp_path):
  """The server is killed while two raters vote as fast as they can."""
  outputs = ','.join(human_studies.write_outputs(tmp_path, items=8))
  process = subprocess.Popen([sys.executable, str(SCRIPT), f'--outputs={outputs}', '--database=study.sqlite',
                              '--port=0', '--raters=2'], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
  *raters, results = re.findall(r'http\S+', ''.join(process.stdout.readline() for _ in range(3)))
  acknowledged, enough = [], threading.Event()

  def vote(rater):
    for number in range(12):
      try:
        post(raters[rater], {'id': f'vote-{rater}-{number}', 'task': number, 'answer': {'choice': 'tie'}, 'comment': '',
                             'seconds': None})
      except (OSError, http.client.HTTPException):   # the server died before the reply, or amid it
        return
      acknowledged.append(f'vote-{rater}-{number}')
      if len(acknowledged) >= 7:
        enough.set()
  threads = [threading.Thread(target=vote, args=(rater,)) for rater in (0, 1)]
  for thread in threads:
    thread.start()
  assert enough.wait(60)
  os.kill(process.pid, signal.SIGKILL)
  for thread in threads:
    thread.join()
  process.stdout.close()
  process.wait()
  store = people.open_study(tmp_path / 'study.sqlite')
  stored = [vote.id for vote in store.votes()]
  assert set(acknowledged) <= set(stored) and len(stored) == len(set(stored)) >= 7
  assert [link.rsplit('/', 1)[1] for link in (*raters, results)] == [*store.raters.values(), store.results_token]
  assert sum(store.progress(rater).answered for rater in (1, 2)) == len(stored)


def test_a_study_for_nobody_is_refused(tmp_path):
  with pytest.raises(ValueError, match='--raters=0 is nobody'):
    people.open_study(tmp_path / 'study', human_studies.write_outputs(tmp_path), raters=0)
