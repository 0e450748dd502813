"""The records of a workdir: `run.json`, with one record for each start of the run, and the lock of the workdir."""
import contextlib
import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from lm.workdir import atomic, parsing


def read(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Returns the records in `workdir/run.json`, oldest first; an empty list if there is no such file.

  Raises ValueError, which names the file, if it is damaged.
  """
  path = workdir / 'run.json'
  try:
    records = parsing.json_value(path.read_text()) if path.exists() else []
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
      raise ValueError('it is no list of records')
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error}); restore it from a copy, or choose another --workdir') from None
  return records


def with_stored_steps(knobs: Mapping[str, Any], earlier: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """Returns the knobs; if `steps` is None, it becomes the number that the newest record has.

  A run that was given a time instead of steps stores the number that fits this time when it starts.
  """
  if 'steps' not in knobs or knobs['steps'] is not None:
    return dict(knobs)
  steps = next((record['steps'] for record in reversed(earlier) if 'steps' in record), None)
  return {**knobs, 'steps': steps}


def make(workdir: pathlib.Path) -> None:
  """Makes the workdir. Raises OSError if it cannot be written."""
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    if not os.access(workdir, os.W_OK):
      raise PermissionError(None, 'permission denied')
  except OSError as error:
    raise OSError(f'cannot write to the workdir {workdir} ({error.strerror}); choose another --workdir') from error


@contextlib.contextmanager
def claim(workdir: pathlib.Path, script: str) -> Iterator[None]:
  """Makes the workdir, and locks it against other processes that would train in it.

  Raises:
    ValueError: the workdir holds a run of another script.
    OSError: the workdir cannot be written, or another process trains in it.
  """
  make(workdir)
  for earlier in read(workdir)[-1:]:
    if earlier.get('script', script) != script:
      raise ValueError(f'the workdir {workdir} holds a run of {earlier["script"]}, not of {script}; '
                       'choose another --workdir')
  if jax.process_index() > 0:
    yield
    return
  with (workdir / '.lock').open('w') as lock:
    try:
      import fcntl
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise OSError(f'another process is training in the workdir {workdir}; wait for it, stop it, or choose another '
                    '--workdir') from None
    except (ImportError, OSError):   # this platform or file system has no locks
      pass
    yield


def start(workdir: pathlib.Path, **facts: Any) -> None:
  """Appends the record of a run that starts now. Earlier records are kept."""
  if jax.process_index() == 0:
    _write(workdir, [*read(workdir), facts])


def add(workdir: pathlib.Path, **facts: Any) -> None:
  """Adds facts, such as the fingerprint of the data, to the record of the current run."""
  if jax.process_index() == 0:
    *earlier, current = read(workdir) or [{}]
    _write(workdir, [*earlier, {**current, **facts}])


@contextlib.contextmanager
def preserve(workdir: pathlib.Path) -> Iterator[None]:
  """Writes the records again, and prints so, if they were deleted in the meantime: a run cannot be opened without them.
  """
  before = read(workdir)
  try:
    yield
  finally:
    path = workdir / 'run.json'
    if before and jax.process_index() == 0 and workdir.is_dir() and not path.exists():
      _write(workdir, before)
      print(f'{path} was deleted while the run trained; it has been written again', file=sys.stderr, flush=True)


def _write(workdir: pathlib.Path, records: list[dict[str, Any]]) -> None:
  atomic.write(workdir / 'run.json', json.dumps(records, indent=2, default=str) + '\n')


def circumstances(script: pathlib.Path, mesh: Any) -> dict[str, Any]:
  """Returns what a result may depend on besides the flags: the time, host, revision, versions, devices and mesh."""
  versions = {'python': platform.python_version()}
  for package in ('lm', 'jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy'):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      versions[package] = importlib.metadata.version(package)
  device = mesh.devices.flat[0]
  return {
      'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'), 'host': socket.gethostname(),
      'revision': _revision(script.parent), 'versions': versions, 'platform': device.platform,
      'device': device.device_kind, 'devices': mesh.size, 'processes': jax.process_count(), 'mesh': dict(mesh.shape),
  }


def _revision(folder: pathlib.Path) -> str | None:
  """Returns the git commit, with `-dirty` if files differ from it; None without git or outside a repository."""
  command = ['git', '-C', str(folder), 'describe', '--always', '--dirty', '--exclude=*', '--abbrev=40']
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
  return None
