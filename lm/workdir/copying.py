"""Copies of a run, or of one of its checkpoints, in another folder or file system, compared by their checksums.

A copy is never mistaken for a finished one before it is: a checkpoint gets its name when all of its files are there,
or, where folders cannot be renamed, its file `commit_success.txt` is the last to be written; `run.json` comes after all
other files. A copy that was cut short is continued.
"""
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any

from lm.workdir import atomic, integrity

_MARK = '.unfinished-copy'   # lies in the folder until the copy is finished
_COMMIT = 'commit_success.txt'
_BLOCK = 1 << 22   # bytes copied at a time
# What belongs to a process, or was not finished: locks, probes, partial files.
_OMITTED = re.compile(r'\.lock|\.write-probe-\d+|.*\.new|.*\.copying|\.unfinished-copy')


def copy(source: str | os.PathLike, target: str | os.PathLike, step: int | None = None,
         progress: Callable[[str], Any] = print) -> None:
  """Copies a workdir, or the folder of an imported model, so that it opens in another place.

  Files that are there already, with the same bytes, are kept. Every byte is read back and compared.

  Args:
    source: the folder to copy.
    target: a folder that is missing, empty, or an earlier copy; on any file system that `etils.epath` knows.
    step: the only checkpoint to copy; None for all that are finished, the newest first.
    progress: is called with a line for each checkpoint, and with one for all other files.

  Raises:
    FileNotFoundError: the source has no such checkpoint, or a file of it was deleted meanwhile.
    ValueError: the target holds something else, or a file of the source is not as it was written.
    OSError: a file cannot be written, or has other bytes when it is read back.
  """
  from etils import epath  # here, not at the top, because it takes long
  source, target = (epath.Path(path) if '://' in str(path) else epath.Path(path).expanduser().resolve()
                    for path in (source, target))   # to resolve a URL would make it a local path
  steps = _steps(source)
  if not steps or step not in (None, *steps):
    missing = 'no checkpoint' if step is None else f'no checkpoint of step {step}'
    raise FileNotFoundError(f'{source} has {missing}; its steps are {steps}')
  _check_target(source, target)
  target.mkdir(parents=True, exist_ok=True)
  (target / _MARK).write_text(str(source))
  for number in reversed(steps) if step is None else [step]:
    progress(_copy_step(source / 'checkpoints' / str(number), target / 'checkpoints' / str(number)))
  names = [name for name in _names(source) if not name.startswith('checkpoints/')]
  sizes = [_copy_file(source / name, target / name) for name in sorted(names, key=lambda name: name == 'run.json')]
  progress(f'other files: {_summary(sizes)}')
  (target / _MARK).unlink()


def _steps(folder: Any) -> list[int]:
  """Returns the steps of the finished checkpoints in a folder, in order."""
  checkpoints = folder / 'checkpoints'
  paths = [path for path in checkpoints.iterdir() if path.name.isdigit()] if checkpoints.is_dir() else []
  return sorted(int(path.name) for path in paths if _can_rename(path) or (path / _COMMIT).exists())


def _check_target(source: Any, target: Any) -> None:
  """Raises ValueError where a copy would change a folder that is not an earlier copy of the source."""
  if source == target or source in target.parents or target in source.parents:
    raise ValueError(f'{target} and {source} are the same folder, or one is in the other; choose another folder')
  if not target.exists() or (target / _MARK).exists() or not any(target.iterdir()):
    return
  try:
    copied, original = (json.loads((folder / 'run.json').read_text()) for folder in (target, source))
    # The last record gets further facts while a run trains.
    is_copy = len(copied) <= len(original) and all(old.items() <= new.items() for old, new in zip(map(_flat, copied),
                                                                                             map(_flat, original)))
  except (OSError, ValueError, AttributeError):
    is_copy = False
  if not is_copy:
    raise ValueError(f'{target} is not empty, and is no earlier copy of {source}; choose another folder')


def _flat(record: dict[str, Any]) -> dict[str, str]:
  return {name: json.dumps(value) for name, value in record.items()}


def _copy_step(source: Any, target: Any) -> str:
  """Copies a checkpoint. Returns a line that says so."""
  try:
    stored = json.loads((source / integrity.FILE).read_text())
  except FileNotFoundError:   # an older version of lm wrote no checksums
    stored = {}
  # The file that makes a checkpoint a finished one is copied last.
  names = sorted(_names(source), key=lambda name: (name == _COMMIT, name.endswith(_COMMIT)))
  folder = target
  if not target.exists() and _can_rename(target):
    folder = target.with_name(f'{target.name}.copying')
  missing = [name for name in stored if name not in names]
  if missing:
    raise ValueError(f'{source} is damaged: {missing[0]} is missing; copy another checkpoint, by --step')
  sizes = [_copy_file(source / name, folder / name, stored.get(name)) for name in names]
  if folder != target:
    folder.rename(target)
  return f'checkpoint {target.name}: {_summary(sizes)}'


def _summary(sizes: list[int | None]) -> str:
  """Returns what was copied; `sizes` are those of `_copy_file`."""
  copied = [size for size in sizes if size is not None]
  return f'{len(sizes)} files, {len(copied)} of them copied ({sum(copied) / 1e6:,.1f} MB)'


def _copy_file(source: Any, target: Any, checksum: int | None = None) -> int | None:
  """Copies a file. Returns the number of its bytes; None where the target had the same ones already.

  Raises ValueError where the source does not have the checksum, and OSError where the copy does not have its bytes.
  """
  if target.exists() and target.stat().length == source.stat().length:
    expected = integrity.checksum(source) if checksum is None else checksum
    if integrity.checksum(target) == expected:
      return None
  target.parent.mkdir(parents=True, exist_ok=True)
  new = target.with_name(f'{target.name}.copying') if _can_rename(target) else target
  crc = size = 0
  with atomic.naming(new), source.open('rb') as f, new.open('wb') as g:
    while block := f.read(_BLOCK):
      crc, size = zlib.crc32(block, crc), size + len(block)
      g.write(block)
  if checksum not in (None, crc):
    new.unlink()
    raise ValueError(f'{source} is not as it was written; copy another checkpoint, by --step')
  if integrity.checksum(new) != crc:
    new.unlink()
    raise OSError(f'{target} has other bytes than were written to it; give the same command again')
  if new != target:
    new.replace(target)
  return size


def _names(folder: Any, prefix: str = '') -> Iterator[str]:
  """Yields the names of the files to copy under a folder, relative to it."""
  for path in folder.iterdir():
    if not _OMITTED.fullmatch(path.name):
      if path.is_dir():
        yield from _names(path, f'{prefix}{path.name}/')
      else:
        yield f'{prefix}{path.name}'


def _can_rename(path: Any) -> bool:
  """Whether a file system renames folders, rather than copies their files: all but object stores, such as gs://."""
  return '://' not in str(path)
