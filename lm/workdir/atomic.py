"""Atomic writes: a file has either its old content or its new content, never a part of it."""
import contextlib
import os
import pathlib
import re
from collections.abc import Iterator


def write(path: pathlib.Path, data: str | bytes) -> None:
  """Replaces the content of a file with `data`. After a kill or on a full disk, it has its old or its new content.

  Removes unfinished copies of the file that killed processes left. Raises OSError, which names the path, if the file
  cannot be written.
  """
  new = path.with_name(f'{path.name}.{os.getpid()}.new')
  with naming(path):
    _remove_stale(path)
    try:
      with open(new, 'wb') as f:
        f.write(data.encode() if isinstance(data, str) else data)
        f.flush()
        os.fsync(f.fileno())
      os.replace(new, path)
    except Exception:   # not BaseException, by which tests simulate a kill
      new.unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """Adds `path` to an OSError raised inside, because the error that Python raises for a full disk names no file."""
  try:
    yield
  except OSError as error:
    if error.errno is None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error


def _remove_stale(path: pathlib.Path) -> None:
  """Removes the unfinished copies of `path` by processes that no longer run on this machine."""
  for unfinished in path.parent.glob('*.new'):
    match = re.fullmatch(re.escape(path.name) + r'\.(\d+)\.new', unfinished.name)
    if match and os.name == 'posix' and not _is_running(int(match[1])):
      unfinished.unlink(missing_ok=True)


def _is_running(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except OSError:   # the process belongs to another user
    pass
  return True
