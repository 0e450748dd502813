"""The files of a corpus: those that match a pattern, and their fingerprint."""
import glob
import hashlib
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from lm import paths

# The fingerprint of up to _WHOLE bytes covers all of them; that of more, the first and last _END bytes of each file.
_WHOLE, _END = 64 << 20, 64 << 10


def matching(pattern: str) -> list[pathlib.Path]:
  """Returns the file of this name or, if there is none, the files that match it as a glob pattern, sorted.

  A file that several links lead to is returned once, by the shortest path.

  Raises:
    FileNotFoundError: there is none.
    paths.Remote: the pattern is a URL.
  """
  name = str(paths.local(pattern))
  names = [name] if os.path.isfile(name) else filter(os.path.isfile, glob.glob(name, recursive=True))
  by_file = {}
  for path in sorted(names, key=lambda path: (len(path), path)):
    by_file.setdefault(os.path.realpath(path), pathlib.Path(path))
  files = sorted(by_file.values())
  if not files:
    below = '' if os.path.isabs(name) else f' in {os.getcwd()}'
    raise FileNotFoundError(f'no file matches {pattern!r}{below}; ** stands for folders of any depth')
  return files


def title(pattern: str) -> str:
  """Returns the last part of a pattern without wildcards: 'data/books/**/*.txt' -> 'books'."""
  parts = reversed(pathlib.Path(pattern).parts)
  return next((pathlib.Path(part).stem for part in parts if not glob.has_magic(part)), 'files')


def relative(files: Sequence[pathlib.Path]) -> dict[str, pathlib.Path]:
  """Returns the files by their path relative to the folder that holds all of them."""
  root = os.path.commonpath([path.absolute().parent for path in files])
  return {path.absolute().relative_to(root).as_posix(): path for path in files}


def fingerprint(files: Mapping[str, Any], *options: Any) -> str:
  """Returns the fingerprint of names, sizes, contents and options. `files`: name -> path of pathlib or etils."""
  state = hashlib.blake2b(repr(options).encode(), digest_size=16)
  sizes = {}
  for name, path in files.items():
    with path.open('rb') as f:
      sizes[name] = f.seek(0, os.SEEK_END)
  total = sum(sizes.values())
  for name, path in files.items():
    state.update(f'\0{name}\0{sizes[name]}\0'.encode('utf-8', 'surrogateescape'))
    with path.open('rb') as f:
      state.update(f.read(_END if total > _WHOLE else -1))
      if total > _WHOLE:
        f.seek(max(0, sizes[name] - _END))
        state.update(f.read(_END))
  return state.hexdigest()
