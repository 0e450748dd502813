"""Compressed files, .gz and .zst, unpacked into the temporary folder."""
import gzip
import pathlib
import shutil
import tempfile
import weakref
from typing import BinaryIO

from lm.data.text import source

GIB = 1 << 30
SUFFIXES = '.gz', '.zst'


class Unpacked:
  """Plain versions of files, unpacked at most once each, which are deleted together with this object.

  Each file may unpack to at most `limit` GiB.
  """

  def __init__(self, limit: float):
    self._limit = limit
    self._paths: dict[pathlib.Path, pathlib.Path] = {}

  def path(self, file: pathlib.Path) -> pathlib.Path:
    """Returns the path of the unpacked file, or of the file itself if it is not compressed.

    Raises:
      ValueError: the file unpacks to more than the limit.
      OSError: the file is damaged.
      ImportError: zstandard, which .zst files need, is not installed.
    """
    if file.suffix not in SUFFIXES:
      return file
    if file not in self._paths:
      folder = tempfile.mkdtemp(prefix='lm-jsonl-')
      weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
      self._paths[file] = _unpack(file, pathlib.Path(folder, file.stem), self._limit)
    return self._paths[file]


def check_limit(gibibytes: float) -> None:
  """Raises ValueError if no compressed file could be unpacked."""
  if not gibibytes > 0:
    raise ValueError(f'--decompressed_limit={gibibytes} is not positive; give a number of GiB, by default 64')


def _unpack(file: pathlib.Path, path: pathlib.Path, limit: float) -> pathlib.Path:
  """Unpacks a file to `path`, and returns `path`."""
  try:
    with file.open('rb') as packed, path.open('wb') as plain:
      unpacked = _Limited(plain, file, limit)
      if file.suffix == '.gz':
        shutil.copyfileobj(gzip.GzipFile(fileobj=packed), unpacked, 1 << 20)
      else:
        _unpack_zst(packed, unpacked)
  except (ImportError, _TooLarge):
    path.unlink(missing_ok=True)   # the disk may be full
    raise
  except Exception as error:   # gzip and zstandard raise errors of their own classes, which do not name the file
    raise OSError(f'{file}: cannot be unpacked: {error}') from error
  return path


class _TooLarge(ValueError):
  pass


class _Limited:
  """A file that takes at most `limit` GiB. `packed` is the file that is unpacked into it."""

  def __init__(self, file: BinaryIO, packed: pathlib.Path, limit: float):
    self._file, self._packed, self._limit, self._free_bytes = file, packed, limit, limit * GIB

  def write(self, data: bytes) -> int:
    self._free_bytes -= len(data)
    if self._free_bytes < 0:
      raise _TooLarge(f'{self._packed} unpacks to more than {self._limit:g} GiB; if that is right, raise the limit '
                      'with --decompressed_limit')
    return self._file.write(data)


def _unpack_zst(packed: BinaryIO, unpacked: _Limited) -> None:
  """Raises EOFError if the file is incomplete, which zstandard's own stream reader does not."""
  zstandard = source.require('zstandard', 'zstd')
  frame = None
  while chunk := packed.read(1 << 13):   # small: a chunk may unpack to 30,000 times its size, in memory
    while chunk:
      frame = frame or zstandard.ZstdDecompressor().decompressobj()
      unpacked.write(frame.decompress(chunk))
      chunk, frame = (frame.unused_data, None) if frame.eof else (b'', frame)
  if frame:
    raise EOFError('it ends early')
