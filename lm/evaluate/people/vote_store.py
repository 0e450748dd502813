"""A study and its votes in one SQLite file, which survives a kill at any moment.

A vote is one row, written in one transaction and synced to the disk before it is acknowledged (write-ahead log with
synchronous=FULL). Its id comes from the rater's browser, so that a vote sent twice counts once. A vote that was undone
stays in the file, marked.
"""
import dataclasses
import datetime
import json
import pathlib
import secrets
import sqlite3
import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from lm.evaluate.people import answers
from lm.evaluate.people.study import Study, Task, assign
from lm.evaluate.people.system_outputs import Item

_APPLICATION = 0x6C6D6865   # marks a file of ours
_SCHEMA = """
CREATE TABLE study (settings TEXT NOT NULL, items TEXT NOT NULL, results_token TEXT NOT NULL,
                    votes_per_item INTEGER NOT NULL);
CREATE TABLE raters (rater INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE);
CREATE TABLE tasks (rater INTEGER, number INTEGER, item INTEGER NOT NULL, shown TEXT NOT NULL, scrambled INTEGER,
                    repeats INTEGER, PRIMARY KEY (rater, number));
CREATE TABLE votes (id TEXT PRIMARY KEY, rater INTEGER NOT NULL, number INTEGER NOT NULL, shown TEXT NOT NULL,
                    answer TEXT NOT NULL, comment TEXT NOT NULL, seconds REAL, time TEXT NOT NULL, undone TEXT);
CREATE UNIQUE INDEX counted ON votes (rater, number) WHERE undone IS NULL;
CREATE TABLE skips (rater INTEGER, number INTEGER, turn INTEGER NOT NULL, PRIMARY KEY (rater, number));
"""


class Vote(NamedTuple):
  """One answer of a rater to the task with this number; `seconds` is how long it was on the screen."""
  id: str
  rater: int
  number: int
  task: Task
  answer: answers.Answer
  comment: str
  seconds: float | None
  time: str


class Progress(NamedTuple):
  """Where a rater is: the next task, or None at the end; `last` is the id of the vote that can be undone."""
  number: int | None
  answered: int
  total: int
  skipped: int
  last: str | None


class VoteStore:
  """The votes of a study. Safe for several threads, and for several processes with the same file."""

  def __init__(self, path: pathlib.Path, connection: sqlite3.Connection):
    self.path, self._connection, self._lock = path, connection, threading.RLock()
    self.close = weakref.finalize(self, connection.close)
    self._load()

  def _load(self) -> None:
    connection = self._connection
    row = connection.execute('SELECT settings, items, results_token, votes_per_item FROM study').fetchone()
    settings, items, self.results_token, self.votes_per_item = row
    self.study = _load_study(settings, items)
    self.raters = dict(connection.execute('SELECT rater, token FROM raters ORDER BY rater'))   # number -> token
    self.tasks = {rater: self._read_tasks(rater) for rater in self.raters}

  def _read_tasks(self, rater: int) -> list[Task]:
    rows = self._connection.execute('SELECT item, shown, scrambled, repeats FROM tasks WHERE rater=? ORDER BY number',
                                    (rater,))
    return [Task(item, tuple(json.loads(shown)), scrambled, repeats) for item, shown, scrambled, repeats in rows]

  @contextmanager
  def _transaction(self) -> Iterator[sqlite3.Connection]:
    with self._lock, _transaction(self._connection):
      yield self._connection

  def rater(self, token: str) -> int | None:
    """Returns the rater of a private link, None if there is none."""
    return next((rater for rater, own in self.raters.items() if secrets.compare_digest(own.encode(), token.encode())),
                None)

  def progress(self, rater: int) -> Progress:
    """Returns the next task of a rater: in order, then those that were skipped, the longest ago first."""
    with self._lock:
      answered = {number for number, in self._connection.execute(
          'SELECT number FROM votes WHERE rater=? AND undone IS NULL', (rater,))}
      turns = dict(self._connection.execute('SELECT number, turn FROM skips WHERE rater=?', (rater,)))
      last = self._connection.execute(
          'SELECT id FROM votes WHERE rater=? AND undone IS NULL ORDER BY rowid DESC LIMIT 1', (rater,)).fetchone()
    waiting = [number for number in range(len(self.tasks[rater])) if number not in answered]
    following = min(waiting, key=lambda number: (turns.get(number, 0), number), default=None)
    return Progress(following, len(answered), len(self.tasks[rater]), len(turns.keys() & set(waiting)),
                    last and last[0])

  def add(self, id: str, rater: int, number: int, answer: Any, comment: str = '', seconds: float | None = None) -> bool:
    """Stores a vote, and returns once it is on the disk. The same id again changes nothing.

    Returns whether the vote is stored: False where the task already has another vote, which stays.
    Raises ValueError if there is no such task, or the answer does not fit it.
    """
    if not 0 <= number < len(self.tasks[rater]):
      raise ValueError(f'there is no task {number}')
    task = self.tasks[rater][number]
    answer = answers.check(self.study, task, answer)
    with self._transaction() as connection:
      if connection.execute('SELECT 1 FROM votes WHERE id=? AND rater=?', (id, rater)).fetchone():
        return True
      try:
        connection.execute('INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)', (
            id, rater, number, json.dumps(task.shown), json.dumps(answer), comment, seconds, _now()))
      except sqlite3.IntegrityError:
        return False
    return True

  def undo(self, rater: int, id: str) -> Vote | None:
    """Marks a rater's vote as undone and returns it; None if there is no such vote. To repeat it changes nothing."""
    with self._transaction() as connection:
      connection.execute('UPDATE votes SET undone=? WHERE id=? AND rater=? AND undone IS NULL', (_now(), id, rater))
      return next(self._votes('WHERE id=? AND rater=?', (id, rater)), None)

  def skip(self, rater: int, number: int) -> None:
    """Moves a task to the end of those that a rater has not answered."""
    with self._transaction() as connection:
      connection.execute('INSERT OR REPLACE INTO skips SELECT ?, ?, coalesce(max(turn), 0) + 1 FROM skips '
                         'WHERE rater=?', (rater, number, rater))

  def votes(self) -> list[Vote]:
    """Returns all votes that count, those on attention checks included, in the order of their arrival."""
    with self._lock:
      return list(self._votes('WHERE undone IS NULL', ()))

  def _votes(self, condition: str, values: Sequence[Any]) -> Iterator[Vote]:
    for id, rater, number, answer, comment, seconds, time in self._connection.execute(
        f'SELECT id, rater, number, answer, comment, seconds, time FROM votes {condition} ORDER BY rowid', values):
      yield Vote(id, rater, number, self.tasks[rater][number], json.loads(answer), comment, seconds, time)

  def extend(self, raters: int | None, votes_per_item: int | None) -> None:
    """Adds raters, and tasks so that more raters answer each question. Existing tasks and votes stay.

    Raises ValueError where there would be fewer than there are.
    """
    raters = len(self.raters) if raters is None else raters
    votes_per_item = self.votes_per_item if votes_per_item is None else votes_per_item
    if raters < len(self.raters) or votes_per_item < self.votes_per_item:
      raise ValueError(f'{self.path} has {len(self.raters)} raters and {self.votes_per_item} votes an item, and cannot '
                       f'shrink to --raters={raters} and --votes_per_item={votes_per_item}')
    new = assign(self.study, raters, votes_per_item, self.tasks)
    with self._transaction() as connection:
      _insert(connection, new, self.tasks)
      connection.execute('UPDATE study SET votes_per_item=?', (votes_per_item,))
    self._load()


def create(path: pathlib.Path, study: Study, raters: int, votes_per_item: int) -> VoteStore:
  """Makes the file of a new study, with a private link for each rater; ValueError as for `study.assign`."""
  tasks = assign(study, raters, votes_per_item, {})   # may be refused: before there is a file
  settings = dataclasses.asdict(study)
  items = settings.pop('items')
  connection = _connect(path)
  try:
    with _transaction(connection):
      for statement in _SCHEMA.split(';')[:-1]:
        connection.execute(statement)
      connection.execute('INSERT INTO study VALUES (?, ?, ?, ?)', (json.dumps(settings), json.dumps(items),
                                                                  secrets.token_urlsafe(16), votes_per_item))
      _insert(connection, tasks, {})
  except BaseException:
    connection.close()
    raise
  return VoteStore(path, connection)


def open_existing(path: pathlib.Path) -> VoteStore | None:
  """Opens the study in a file; None if there is none yet.

  Raises ValueError if the file is something else. Such a file is not changed.
  """
  if not path.exists() or not path.stat().st_size:
    return None
  with open(path, 'rb') as f:
    header = f.read(100)
  if not header.startswith(b'SQLite format 3\0') or header[68:72] != _APPLICATION.to_bytes(4, 'big'):
    raise ValueError(f'{path} is not the database of a study; give another --database')
  connection = _connect(path)
  try:
    if connection.execute("SELECT 1 FROM sqlite_master WHERE name='study'").fetchone():
      return VoteStore(path, connection)
  except sqlite3.DatabaseError as error:
    connection.close()
    raise ValueError(f'{path} is damaged: {error}') from None
  connection.close()   # a process was killed before it had written anything
  return None


def _connect(path: pathlib.Path) -> sqlite3.Connection:
  try:
    connection = sqlite3.connect(path, timeout=30, isolation_level=None, check_same_thread=False)
  except sqlite3.Error as error:
    raise OSError(f'{path} cannot be opened: {error}') from None
  try:
    if not path.stat().st_size:   # before the write-ahead log is used, so that the mark is in the file itself
      connection.execute(f'PRAGMA application_id={_APPLICATION}')
    connection.execute('PRAGMA journal_mode=WAL')
    connection.execute('PRAGMA synchronous=FULL')
  except sqlite3.Error as error:
    connection.close()
    raise OSError(f'{path} cannot be written: {error}') from None
  return connection


def _insert(connection: sqlite3.Connection, new: Mapping[int, Sequence[Task]], existing: Mapping[int, Sequence[Task]]
            ) -> None:
  """Inserts new tasks after the existing ones of each rater, and the raters who are new."""
  for rater, tasks in new.items():
    connection.execute('INSERT OR IGNORE INTO raters VALUES (?, ?)', (rater, secrets.token_urlsafe(16)))
    connection.executemany('INSERT INTO tasks VALUES (?, ?, ?, ?, ?, ?)', (
        (rater, number, task.item, json.dumps(task.shown), task.scrambled, task.repeats)
        for number, task in enumerate(tasks, len(existing.get(rater, ())))))


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
  connection.execute('BEGIN IMMEDIATE')
  try:
    yield
    connection.execute('COMMIT')
  except BaseException:
    if connection.in_transaction:
      connection.execute('ROLLBACK')
    raise


def _load_study(settings: str, items: str) -> Study:
  values = {name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(settings).items()}
  return Study(**values, items=tuple(Item(id, prompt, tuple(texts)) for id, prompt, texts in json.loads(items)))


def _now() -> str:
  return datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds')
