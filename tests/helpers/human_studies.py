"""Small studies for tests: files of outputs, a server in a thread, raters who answer by a rule."""
import contextlib
import json
import pathlib
import socket
import threading
import warnings

from lm.evaluate import people

TEXTS = ('Near the river {} serves cheap coffee and welcomes children of all ages.',
         '{} is a family friendly coffee shop near the river, and it is cheap.',
         'Coffee at {}: low prices, a river view and a warm welcome for families.')
NAMES = ['The Eagle', 'Blue Spice', 'Aromi', 'Zizzi', 'The Vaults', 'Cotto', 'Giraffe', 'Loch Fyne']


def write_outputs(folder: pathlib.Path, systems=('alpha', 'beta'), items: int = 6) -> list[str]:
  """Writes a file for each system, and returns the paths. A system is named by its file."""
  for system, text in zip(systems, TEXTS):
    lines = [json.dumps({'id': f'i{i}', 'prompt': f'Describe {NAMES[i]}, a coffee shop.',
                         'text': text.format(NAMES[i])}) for i in range(items)]
    (folder / f'{system}.jsonl').write_text('\n'.join(lines) + '\n')
  return [str(folder / f'{system}.jsonl') for system in systems]


def new_study(folder: pathlib.Path, systems=('alpha', 'beta'), items: int = 6, raters: int = 2,
              votes_per_item: int | None = None, **settings):
  return people.open_study(folder / 'study.sqlite', write_outputs(folder, systems, items), settings, raters,
                           votes_per_item)


def client(store):
  """A client of the application, without a socket."""
  with warnings.catch_warnings():   # newer versions of Starlette prefer a package that older ones do not know
    warnings.simplefilter('ignore')
    from starlette.testclient import TestClient
  return TestClient(people.application(store))


@contextlib.contextmanager
def served(store):
  """Serves a study in a thread; gives its address."""
  import uvicorn
  with socket.create_server(('127.0.0.1', 0)) as listener:
    server = uvicorn.Server(uvicorn.Config(people.application(store), log_level='warning', lifespan='off', ws='none',
                                           timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={'sockets': [listener]})
    thread.start()
    try:
      yield f'http://127.0.0.1:{listener.getsockname()[1]}'
    finally:
      server.should_exit = True
      thread.join()


def preferred(order):
  """A rule: the text whose system comes first in `order` wins, and a scrambled text loses to all."""
  def rank(task, position):
    return order.index(task.shown[position]) + 100 * (position == task.scrambled)

  def answer(study, task):
    ranks = [rank(task, position) for position in range(len(task.shown))]
    best, worst = ranks.index(min(ranks)), ranks.index(max(ranks))
    if study.mode == 'pairwise':
      return {'choice': best}
    if study.mode == 'best_worst':
      return {'best': best, 'worst': worst}
    return {'ratings': [[max(1, study.scale - value)] * len(study.criteria) for value in ranks]}
  return answer


def answer_all(store, rater: int, rule, until: int | None = None) -> None:
  """Answers the tasks of a rater by a rule: (study, task) -> answer."""
  for number, task in enumerate(store.tasks[rater][:until]):
    assert store.add(f'vote-{rater}-{number}', rater, number, rule(store.study, task), seconds=2.)
