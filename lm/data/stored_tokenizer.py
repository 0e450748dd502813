"""The tokenizer of a data set, stored in its folder with the settings that it was made with and checksums."""
import contextlib
import pathlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lm.data import tokenizers
from lm.data.store_reader import OtherSettings
from lm.data.text import clean
from lm.sharding import hosts
from lm.workdir import atomic, integrity, locks
from lm.workdir.describe import describe, differences

_ADVICE = 'restore the original file'


def prepare(folder: pathlib.Path, tokenizer: tokenizers.Tokenizer | tokenizers.InFile | Callable,
            training_data: Mapping[str, Any], documents: Callable[[], Iterable[str | clean.Drop]],
            progress: Callable[[str], Any], check: Callable[[tokenizers.Tokenizer], Any], renew: bool = False
            ) -> tokenizers.Tokenizer:
  """Returns the tokenizer in `folder/tokenizer`. If there is none, it is trained, or copied, to that folder first.

  Args:
    folder: the folder of the data set.
    tokenizer: a tokenizer, or its file, or a function that trains one on documents.
    training_data: a description of the data that it is trained on, which is stored as a part of its settings.
    documents: returns the documents to train on.
    progress: is called with lines to print.
    check: is called with the tokenizer before it is written, and before it is returned; may raise an error.
    renew: whether to replace a stored tokenizer that has other settings.

  Raises:
    OtherSettings: the stored tokenizer has other settings, and `renew` is False.
    ValueError: the stored files are damaged.
  """
  if isinstance(tokenizer, tokenizers.InFile):
    tokenizer = tokenizer.load()
  path, trains = folder / 'tokenizer' / 'settings.json', callable(tokenizer)
  settings = {'tokenizer': describe(tokenizer) if trains else tokenizer.fingerprint, **training_data}

  def must_write() -> bool:
    lines = _differences(path, settings)
    return lines is None or renew and bool(lines)

  def write() -> None:
    if _differences(path, settings):
      progress(f'{folder} was made with other settings, and nothing was trained on it: it is made anew')
    new = tokenizer
    if trains:
      texts = [document for document in documents() if isinstance(document, str)]
      progress('training the tokenizer')
      new = tokenizer(texts)
    check(new)
    path.unlink(missing_ok=True)   # a tokenizer without settings counts as missing, until all files are written
    new.save(path.parent)
    _write_settings(path, settings, tokenizers.load(path.parent))

  with hosts.process_0_first():
    if must_write():
      folder.parent.mkdir(parents=True, exist_ok=True)
      with locks.hold(folder.parent, f'waiting for the process that makes {path.parent}', progress):
        if must_write():   # another process may have written it before this one had the lock
          write()
    elif not _differences(path, settings) and 'checksums' not in _read_settings(path):
      _add_checksums(path, settings, progress, check)
  if lines := _differences(path, settings):
    raise OtherSettings(f'{folder} was made with other settings; go back to them, or choose another --workdir\n  '
                        + '\n  '.join(lines))
  opened = load(path.parent)
  check(opened)
  return opened


def load(folder: pathlib.Path) -> tokenizers.Tokenizer:
  """Returns the tokenizer that `prepare` wrote to a folder. Raises ValueError if its files have changed since.

  Older versions wrote no checksums; then only the fingerprint is compared, if there is one.
  """
  settings = _read_settings(folder / 'settings.json') or {}
  integrity.compare({folder / name: number for name, number in settings.get('checksums', {}).items()}, _ADVICE)
  tokenizer = tokenizers.load(folder)
  if settings.get('fingerprint') not in (None, tokenizer.fingerprint):
    raise ValueError(f'{folder} is damaged: its tokenizer has the fingerprint {tokenizer.fingerprint}, and '
                     f'{settings["fingerprint"]} was written; {_ADVICE}')
  return tokenizer


def verify(folder: pathlib.Path) -> list[str]:
  """Compares the files of a tokenizer with their checksums. Returns [folder] if there are none, else [].

  Raises ValueError, with the paths, if files are not as they were written. A missing tokenizer is not compared.
  """
  settings = _read_settings(folder / 'settings.json')
  if not settings:
    return []
  load(folder)
  return [] if 'checksums' in settings else [str(folder)]


def _differences(path: pathlib.Path, settings: Mapping[str, Any]) -> list[str] | None:
  """Returns a line for each setting that differs from the stored one; None if no tokenizer is stored."""
  stored = _read_settings(path)
  if not stored:
    return None
  facts = {name: value for name, value in stored.items() if name not in ('fingerprint', 'checksums')}
  return differences(facts, settings)


def _add_checksums(path: pathlib.Path, settings: Mapping[str, Any], progress: Callable[[str], Any],
                   check: Callable[[tokenizers.Tokenizer], Any]) -> None:
  """Adds checksums to a tokenizer that an older version wrote."""
  tokenizer = load(path.parent)
  check(tokenizer)
  progress(f'{path.parent} was written without checksums; its tokenizer has the fingerprint {tokenizer.fingerprint}, '
           'which is stored now, together with checksums')
  with contextlib.suppress(OSError):   # the folder may belong to another user
    _write_settings(path, settings, tokenizer)


def _write_settings(path: pathlib.Path, settings: Mapping[str, Any], tokenizer: tokenizers.Tokenizer) -> None:
  checksums = {file.name: integrity.checksum(file) for file in sorted(path.parent.iterdir())
               if file.is_file() and file != path and file.suffix != '.new'}
  facts = {**settings, 'fingerprint': tokenizer.fingerprint, 'checksums': checksums}
  atomic.write(path, integrity.json_with_checksum(facts))


def _read_settings(path: pathlib.Path) -> dict[str, Any] | None:
  """Returns the stored settings, or None if the tokenizer is missing or incomplete. Raises ValueError if damaged."""
  try:
    return integrity.parse_json_with_checksum(path.read_text())[0]
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error}); {_ADVICE}') from None
