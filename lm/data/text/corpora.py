"""One function per corpus; each returns a `Source`: named splits of documents with random access (see `source`).

None touches a file, or checks what it is given, before the source is used.
"""
import ast
import collections
import functools
import gzip
import os
import pathlib
import re
import shutil
import sysconfig
import tempfile
import weakref
from typing import BinaryIO, Literal

from lm.data.text import source
from lm.data.text.prepared import prepared
from lm.data.text.source import Source
from lm.workdir.parsing import TextDecoder, json_value

Errors = Literal['strict', 'replace', 'drop']   # see `Decoder`
GIB = 1 << 30


@source.deferred
def python_library(validation: float = 0.05) -> Source:
  """Python's own standard library: some 10 MB of code and prose, wherever this runs.

  A document is a source file, a C header, a text file, or a topic of the language reference (pydoc's). Left out: tests,
  installed packages, code that another program wrote, tables (character sets, HTML entities) and duplicates.
  """
  skip_folders = re.compile(r'tests?|idle_test|(site|dist)-packages|__pycache__|encodings|config-.*')
  skip_files = re.compile(r'_sysconfigdata.*|sitecustomize\.py|entities\.py|pyconfig.*\.h')  # tables, machine's own
  generated = re.compile(r'auto-?generated|automatically generated|generated from|file is generated', re.IGNORECASE)
  files = {}
  for part in ('stdlib', 'include'):  # of the base installation, also in a virtual environment
    root = sysconfig.get_paths()[part]
    for folder, folders, names in os.walk(root):
      folders[:] = [f for f in folders if not skip_folders.fullmatch(f)]
      for name in names:
        if name.endswith(('.py', '.h', '.txt', '.rst')) and not skip_files.fullmatch(name):
          path = pathlib.Path(folder, name)
          files[f'{part}/{path.relative_to(root).as_posix()}'] = path
  if not any(name.startswith('stdlib/') for name in files):
    raise FileNotFoundError(f"{sysconfig.get_paths()['stdlib']}: this Python keeps no standard library as files; "
                            'give a corpus of your own')
  files = dict(sorted(files.items()))
  names = list(files)

  decode = TextDecoder('replace')   # a few files of old say that they are Latin-1

  def load(i, counts):
    document = decode(files[names[i]].read_bytes(), names[i], counts)
    if names[i] == 'stdlib/pydoc_data/topics.py':  # one dictionary {topic: text}, written by Sphinx
      topics = next(node.value for node in ast.parse(document).body if isinstance(node, ast.Assign))
      return [text for _, text in sorted(ast.literal_eval(topics).items())]
    if generated.search(document, 0, 600):
      counts['generated dropped'] += 1
      return []
    return [document] if document.strip() else []

  counts = collections.Counter()
  documents, read = source.shards(load, len(names), counts)
  return Source('python_library', source.split(documents, read, validation, 'python_library', counts, unique=True),
                source.fingerprint(files, 'python_library', validation), 'PSF-2.0', counts)


@source.deferred
def text(pattern: str, validation: float = 0.05, separator: str | None = None,
         encoding_errors: Errors = 'strict') -> Source:
  r"""Text files by glob, `**` for folders of any depth. A document is a file, or a part between `separator`s ('\n\n').

  Of a few documents, none of which falls into validation, the last part of each is held out, from the start of a line.

  A file that is not UTF-8 raises ValueError with the byte ('strict'), is repaired with U+FFFD ('replace') or left out
  ('drop'); `counts` of the source says how many.
  """
  decode, files = TextDecoder(encoding_errors), source.matching(pattern)

  def load(i, counts):
    document = decode(files[i].read_bytes(), str(files[i]), counts)
    if document is None:
      return []
    if not separator:
      return [document] if document.strip() else []
    return [part for part in document.replace('\r\n', '\n').split(separator) if part.strip()]

  counts, name = collections.Counter(), source.title(pattern)
  documents, read = source.shards(load, len(files), counts)
  splits = source.split(documents, read, validation, name, counts)
  return Source(name, splits, source.fingerprint(source.relative(files), 'text', validation, separator,
                                                 encoding_errors), counts=counts)


@source.deferred
def jsonl(pattern: str, key: str | None = 'text', validation: float = 0.05,
          encoding_errors: Errors = 'strict', decompressed_limit: float = 64.) -> Source:
  """JSON-lines files by glob, also .gz and .zst: the string under `key` of each line is a document.

  Without a key, a document is the JSON of the line itself: a record, as `dialogues` reads them.

  Compressed files are unpacked once into the temporary folder ($TMPDIR), for as long as the source lives; each of them
  to `decompressed_limit` GiB at most.

  Raises:
    ValueError: at first use, naming file and line, where a line is not UTF-8 (but see `Decoder`), is not JSON or has no
      string under `key`; or naming a file that unpacks to more than the limit.
  """
  decode, files = TextDecoder(encoding_errors), source.matching(pattern)

  @functools.cache
  def plain(i):
    if files[i].suffix not in ('.gz', '.zst'):
      return files[i]
    folder = tempfile.mkdtemp(prefix='lm-jsonl-')
    weakref.finalize(read, shutil.rmtree, folder, ignore_errors=True)
    path = pathlib.Path(folder, files[i].stem)
    try:
      with files[i].open('rb') as packed, path.open('wb') as file:
        unpacked = _Limited(file, files[i], decompressed_limit)
        if files[i].suffix == '.gz':
          shutil.copyfileobj(gzip.GzipFile(fileobj=packed), unpacked, 1 << 20)
        else:
          _unzst(packed, unpacked)
    except (ImportError, _TooLarge):
      path.unlink(missing_ok=True)   # what was unpacked may fill the disk
      raise
    except Exception as error:  # gzip and zstandard have their own kinds, none of which names the file
      raise OSError(f'{files[i]}: cannot be unpacked: {error}') from error
    return path

  def documents():
    for i in range(len(files)):
      offset = 0
      with plain(i).open('rb') as lines:
        for number, line in enumerate(lines, 1):
          if line.strip() and (document := parse(line, f'{files[i]}:{number}', counts)) is not None:
            yield i, offset, document
          offset += len(line)

  def parse(line, where, counts):
    if (text := decode(line, where, counts)) is None:
      return None
    try:
      row = json_value(text)
    except ValueError as error:
      raise ValueError(f'{where}: not JSON: {error}') from None
    if key is None and isinstance(row, dict):
      return decode.repair_json(text.strip(), row, where, counts)
    if not isinstance(row, dict) or not isinstance(row.get(key), str):
      has = f'keys {", ".join(row)}' if isinstance(row, dict) else type(row).__name__
      raise ValueError(f'{where}: ' + ('no record {...}' if key is None else f'no string under key={key!r}')
                       + f'; the line has {has}')
    return decode.repair(row[key], counts)

  def read(i, offset):
    with plain(i).open('rb') as lines:
      lines.seek(offset)
      return parse(lines.readline(), f'{files[i]} at byte {offset}', collections.Counter())

  def where(i, offset):
    with plain(i).open('rb') as lines:
      number = lines.read(offset).count(b'\n') + 1
    return f'{files[i]}:{number}'

  counts, name = collections.Counter(), source.title(pattern)
  return Source(name, source.split(documents, read, validation, name, counts, divisible=key is not None, where=where),
                source.fingerprint(source.relative(files), 'jsonl', validation, key,
                                   *_besides(encoding_errors)), counts=counts)


@source.deferred
def parquet(pattern: str, column: str = 'text', validation: float = 0.05, encoding_errors: Errors = 'strict') -> Source:
  """Parquet files by glob, read a row group at a time: the strings of `column`. Nulls are dropped and counted.

  ValueError, at first use, names file and row, counted from 0, where a string is not UTF-8; but see `Decoder`.
  """
  import pyarrow as pa
  import pyarrow.parquet as pq
  decode, files = TextDecoder(encoding_errors), source.matching(pattern)
  groups = []   # (file, row group, its first row)
  for path in files:
    try:
      file = pq.ParquetFile(path)
    except ValueError as error:   # pyarrow's ArrowInvalid
      raise ValueError(f'{path} is no Parquet file: {error}') from None
    with file:
      if column not in file.schema_arrow.names:
        raise ValueError(f'{path}: no column={column!r}; it has {", ".join(file.schema_arrow.names)}')
      sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
      groups += [(path, group, sum(sizes[:group])) for group in range(len(sizes))]

  def load(i, counts):
    path, group, first = groups[i]
    with pq.ParquetFile(path) as file:
      values = file.read_row_group(group, [column]).column(column)
    counts['null dropped'] += values.null_count
    kind = values.type.value_type if pa.types.is_dictionary(values.type) else values.type
    if values.null_count == len(values):
      return []
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
      raise ValueError(f'{path}: column={column!r} holds {kind}, not strings')
    rows = enumerate(values.cast(kind).cast(pa.large_binary()).to_pylist(), first)   # pyarrow's own decoding is strict
    decoded = [decode(data, f'{path}: row {row}', counts) for row, data in rows if data is not None]
    return [text for text in decoded if text is not None]

  counts, name = collections.Counter(), source.title(pattern)
  documents, read = source.shards(load, len(groups), counts)
  return Source(name, source.split(documents, read, validation, name, counts),
                source.fingerprint(source.relative(files), 'parquet', validation, column,
                                   *_besides(encoding_errors)), counts=counts)


@source.deferred
def tfds(name: str, key: str = 'text', validation: float = 0.05, data_dir: str | None = None,
         encoding_errors: Errors = 'strict') -> Source:
  """A TensorFlow Datasets corpus, read without TensorFlow: a folder that holds one, or a name such as 'lm1b', which is
  downloaded and prepared if it is not yet in `data_dir` (tfds's own, if None).

  Its own validation (else test) split is used; `validation` cuts a set that has a train split alone, by hash.
  `experiments/tfds_builder.py` shows how a corpus is added to TFDS.
  """
  builder, decode = prepared(name, data_dir), TextDecoder(encoding_errors)
  info = builder.info
  if info.file_format not in type(info.file_format).with_random_access():
    raise ValueError(f'tfds: {name} was prepared as {info.file_format.value}, which cannot be read at random; delete '
                     f"{builder.data_path}, or prepare it elsewhere with file_format='array_record'")
  if key not in info.features:
    raise ValueError(f'tfds: {name} has no feature key={key!r}; it has {", ".join(info.features)}')
  if 'train' not in info.splits:
    raise ValueError(f'tfds: {name} has no train split; it has {", ".join(info.splits)}')

  def documents(split):
    examples = functools.cache(functools.partial(builder.as_data_source, split))

    def read(i, counts):
      value = examples()[i][key]
      if not isinstance(value, bytes | str):
        raise ValueError(f'tfds: feature key={key!r} of {name} is {type(value).__name__}, not text')
      return value if isinstance(value, str) else decode(value, f'tfds: {name}, split {split}, row {i}', counts)

    def rows():   # read before their time only where one may be left out or repaired
      everything = range(len(examples()))
      return everything if encoding_errors == 'strict' else [i for i in everything if read(i, counts) is not None]

    return source.Documents(rows, lambda i: read(i, collections.Counter()))

  counts = collections.Counter()
  own = {split: documents(split) for split in info.splits}
  held_out = next((split for split in ('validation', 'valid', 'dev', 'test') if split in own), None)
  if held_out:
    splits = {'train': own['train'], 'validation': own[held_out]}
  else:
    rows = lambda: ((0, i, document) for i, document in enumerate(own['train']))
    splits = source.split(rows, lambda _, i: own['train'][i], validation, name, counts)
  files = {path.name: path for path in sorted(builder.data_path.iterdir()) if path.is_file()}
  return Source(info.name, splits, source.fingerprint(files, 'tfds', validation, key, *_besides(encoding_errors)),
                info.as_proto.redistribution_info.license or 'unknown', counts)


def _besides(encoding_errors: Errors) -> tuple[str, ...]:
  """What a fingerprint has of it: nothing where it changes nothing."""
  return () if encoding_errors == 'strict' else (encoding_errors,)


def check_validation(share: float) -> None:
  """ValueError where there would be no text to train on, or none to be validated on."""
  if not 0 < share < 1:
    raise ValueError(f'--validation={share} is not a share between 0 and 1; every run is validated, so hold out a '
                     'little, such as --validation=0.01')


def check_limit(gibibytes: float) -> None:
  """ValueError where no compressed file could be unpacked."""
  if not gibibytes > 0:
    raise ValueError(f'--decompressed_limit={gibibytes} is not positive; give a number of GiB, by default 64')


class _TooLarge(ValueError):
  pass


class _Limited:
  """A file that takes no more than so many GiB; `source` is what is unpacked into it."""

  def __init__(self, file: BinaryIO, source: pathlib.Path, limit: float):
    self._file, self._source, self._limit, self._room = file, source, limit, limit * GIB

  def write(self, data: bytes) -> int:
    self._room -= len(data)
    if self._room < 0:
      raise _TooLarge(f'{self._source} unpacks to more than {self._limit:g} GiB; if that is right, raise the limit '
                      'with --decompressed_limit')
    return self._file.write(data)


def _unzst(packed: BinaryIO, unpacked: _Limited) -> None:
  """zstandard's own stream reader takes a file that was cut short for a whole one; this raises EOFError."""
  zstandard = source.require('zstandard', 'zstd')
  frame = None
  while chunk := packed.read(1 << 13):   # which may unpack to 30,000 times as much, in memory
    while chunk:
      frame = frame or zstandard.ZstdDecompressor().decompressobj()
      unpacked.write(frame.decompress(chunk))
      chunk, frame = (frame.unused_data, None) if frame.eof else (b'', frame)
  if frame:
    raise EOFError('it ends early')
