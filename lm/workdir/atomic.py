"""Files that are there whole, or as they were before."""
import contextlib
import os
import pathlib
import re
from collections.abc import Iterator


def write(path: pathlib.Path, data: str | bytes) -> None:
  """Puts `data` in place of a file, such that a kill or a full disk at any moment leaves the old one or the new one.

  What killed processes left behind of the same file is removed. OSError, with the path, if it cannot be written.
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
    except Exception:   # not what stands for a kill in tests
      new.unlink(missing_ok=True)
      raise


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """Gives an OSError the path of what is written inside: of a full disk, Python names none."""
  try:
    yield
  except OSError as error:
    if error.errno is None:
      raise
    raise OSError(error.errno, error.strerror, str(path)) from error


def _remove_stale(path: pathlib.Path) -> None:
  """Removes the unfinished files of processes that are gone, as far as this machine can tell."""
  for unfinished in path.parent.glob('*.new'):
    match = re.fullmatch(re.escape(path.name) + r'\.(\d+)\.new', unfinished.name)
    if match and os.name == 'posix' and not _lives(int(match[1])):
      unfinished.unlink(missing_ok=True)


def _lives(process: int) -> bool:
  try:
    os.kill(process, 0)
  except ProcessLookupError:
    return False
  except OSError:   # another user's
    pass
  return True
