"""One function per corpus; each returns a `Source`: named splits of documents with random access (see `source`).

Files are opened, and arguments are checked, when the source is first used.
"""
import ast
import collections
import functools
import os
import pathlib
import re
import sysconfig
from typing import Any, Literal

from lm.data.text import source, source_files
from lm.data.text.compressed import Unpacked
from lm.data.text.prepared import prepared
from lm.data.text.source import Source
from lm.workdir.parsing import TextDecoder, json_value

Errors = Literal['strict', 'replace', 'drop']   # see `TextDecoder`


@source.deferred
def python_library(validation: float = 0.05) -> Source:
  """Returns Python's own standard library: about 10 MB of code and prose, on any machine.

  A document is a source file, a C header, a text file, or a topic of the language reference (from pydoc). Tests,
  installed packages, generated code, tables (character sets, HTML entities) and duplicates are omitted.
  """
  generated = re.compile(r'auto-?generated|automatically generated|generated from|file is generated', re.IGNORECASE)
  files = _python_files()
  names = list(files)

  decode = TextDecoder('replace')   # a few old files declare that they are Latin-1

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
                source_files.fingerprint(files, 'python_library', validation), 'PSF-2.0', counts)


def _python_files() -> dict[str, pathlib.Path]:
  """Returns the files of the standard library and of Python's headers, sorted, by 'stdlib/NAME' or 'include/NAME'."""
  skip_folders = re.compile(r'tests?|idle_test|(site|dist)-packages|__pycache__|encodings|config-.*')
  skip_files = re.compile(r'_sysconfigdata.*|sitecustomize\.py|entities\.py|pyconfig.*\.h')   # tables, and settings
  files = {}
  for part in ('stdlib', 'include'):   # of the base installation, also in a virtual environment
    root = sysconfig.get_paths()[part]
    for folder, folders, names in os.walk(root):
      folders[:] = [name for name in folders if not skip_folders.fullmatch(name)]
      for name in names:
        if name.endswith(('.py', '.h', '.txt', '.rst')) and not skip_files.fullmatch(name):
          path = pathlib.Path(folder, name)
          files[f'{part}/{path.relative_to(root).as_posix()}'] = path
  if not any(name.startswith('stdlib/') for name in files):
    raise FileNotFoundError(f"{sysconfig.get_paths()['stdlib']}: this Python has no standard library in files; "
                            'give a corpus of your own')
  return dict(sorted(files.items()))


@source.deferred
def text(pattern: str, validation: float = 0.05, separator: str | None = None,
         encoding_errors: Errors = 'strict') -> Source:
  r"""Returns text files as documents.

  Args:
    pattern: a path or a glob, with `**` for folders of any depth.
    validation: the share of documents that is held out. If there are so few documents that none would be, the last part
      of each document is held out, from the start of a line.
    separator: such as '\n\n', which divides a file into documents; None: a file is a document.
    encoding_errors: a file that is not UTF-8 raises ValueError with the byte ('strict'), is repaired with U+FFFD
      ('replace') or is omitted ('drop'). `counts` of the source has the number of such files.
  """
  decode, files = TextDecoder(encoding_errors), source_files.matching(pattern)

  def load(i, counts):
    document = decode(files[i].read_bytes(), str(files[i]), counts)
    if document is None:
      return []
    if not separator:
      return [document] if document.strip() else []
    return [part for part in document.replace('\r\n', '\n').split(separator) if part.strip()]

  counts, name = collections.Counter(), source_files.title(pattern)
  documents, read = source.shards(load, len(files), counts)
  splits = source.split(documents, read, validation, name, counts)
  return Source(name, splits, source_files.fingerprint(source_files.relative(files), 'text', validation, separator,
                                                 encoding_errors), counts=counts)


@source.deferred
def jsonl(pattern: str, key: str | None = 'text', validation: float = 0.05,
          encoding_errors: Errors = 'strict', decompressed_limit: float = 64.) -> Source:
  """Returns the lines of JSON-lines files, which may be compressed (.gz, .zst), as documents.

  Args:
    pattern: a path or a glob.
    key: each document is the string under this key of a line. None: it is the JSON of a line, a record of `dialogues`.
    validation: the share of documents that is held out.
    encoding_errors: see `TextDecoder`.
    decompressed_limit: the GiB that each compressed file may unpack to. Files are unpacked once, into the temporary
      folder ($TMPDIR), and deleted together with the source.

  Raises:
    ValueError: at first use, with file and line, if a line is not UTF-8 and `encoding_errors` is 'strict', is not JSON,
      or has no string under `key`; or with the file, if it unpacks to more than the limit.
  """
  decode, files, unpacked = TextDecoder(encoding_errors), source_files.matching(pattern), Unpacked(decompressed_limit)

  def parse(line, where, counts):
    text = decode(line, where, counts)
    if text is None:
      return None
    record = _record(text, key, where)
    if key is None:
      return decode.repair_json(text.strip(), record, where, counts)
    return decode.repair(record[key], counts)

  def documents():
    for i, file in enumerate(files):
      offset = 0
      with unpacked.path(file).open('rb') as lines:
        for number, line in enumerate(lines, 1):
          document = parse(line, f'{file}:{number}', counts) if line.strip() else None
          if document is not None:
            yield i, offset, document
          offset += len(line)

  def read(i, offset):
    with unpacked.path(files[i]).open('rb') as lines:
      lines.seek(offset)
      return parse(lines.readline(), f'{files[i]} at byte {offset}', collections.Counter())

  def where(i, offset):
    with unpacked.path(files[i]).open('rb') as lines:
      number = lines.read(offset).count(b'\n') + 1
    return f'{files[i]}:{number}'

  counts, name = collections.Counter(), source_files.title(pattern)
  splits = source.split(documents, read, validation, name, counts, divisible=key is not None, where=where)
  return Source(name, splits, source_files.fingerprint(source_files.relative(files), 'jsonl', validation, key,
                                                 *_if_not_strict(encoding_errors)), counts=counts)


def _record(text: str, key: str | None, where: str) -> dict[str, Any]:
  """Returns the record in a line, which has a string under `key` unless that is None; see `jsonl` for errors."""
  try:
    record = json_value(text)
  except ValueError as error:
    raise ValueError(f'{where}: not JSON: {error}') from None
  if not isinstance(record, dict):
    missing = 'no record {...}' if key is None else f'no string under key={key!r}'
    raise ValueError(f'{where}: {missing}; the line has {type(record).__name__}')
  if key is not None and not isinstance(record.get(key), str):
    raise ValueError(f'{where}: no string under key={key!r}; the line has keys {", ".join(record)}')
  return record


@source.deferred
def parquet(pattern: str, column: str = 'text', validation: float = 0.05, encoding_errors: Errors = 'strict') -> Source:
  """Returns the strings in a column of Parquet files; nulls are dropped and counted. One row group is read at a time.

  Raises:
    ValueError: at first use, if a file is not Parquet or has no such column of strings; or with file and row, counted
      from 0, if a string is not UTF-8 and `encoding_errors` is 'strict' (see `TextDecoder`).
  """
  import pyarrow as pa
  import pyarrow.parquet as pq
  decode, files = TextDecoder(encoding_errors), source_files.matching(pattern)
  groups = []   # (file, row group, number of its first row)
  for path in files:
    try:
      file = pq.ParquetFile(path)
    except ValueError as error:   # pyarrow's ArrowInvalid
      raise ValueError(f'{path} is not a Parquet file: {error}') from None
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

  counts, name = collections.Counter(), source_files.title(pattern)
  documents, read = source.shards(load, len(groups), counts)
  splits = source.split(documents, read, validation, name, counts)
  return Source(name, splits, source_files.fingerprint(source_files.relative(files), 'parquet', validation, column,
                                                 *_if_not_strict(encoding_errors)), counts=counts)


@source.deferred
def tfds(name: str, key: str = 'text', validation: float = 0.05, data_dir: str | None = None,
         encoding_errors: Errors = 'strict') -> Source:
  """Returns a corpus of TensorFlow Datasets, which is read without TensorFlow.

  The documents that are held out are its own validation split, or else its test split. `experiments/tfds_builder.py`
  shows how a corpus is added to TFDS.

  Args:
    name: a folder with a prepared corpus; or a name such as 'lm1b', which is downloaded and prepared if it is not in
      `data_dir`.
    key: the feature that holds the text.
    validation: the share of documents that is held out if the corpus has only a train split.
    data_dir: None: the default of TFDS.
    encoding_errors: see `TextDecoder`.

  Raises ValueError, at first use, if the corpus does not exist, cannot be read at random, or has no such feature.
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
      if isinstance(value, str):
        return value
      if not isinstance(value, bytes):
        raise ValueError(f'tfds: feature key={key!r} of {name} is {type(value).__name__}, not text')
      return decode(value, f'tfds: {name}, split {split}, row {i}', counts)

    def rows():
      numbers = range(len(examples()))
      if encoding_errors == 'strict':
        return numbers
      return [i for i in numbers if read(i, counts) is not None]   # all rows are read, to count repairs and drop rows

    return source.Documents(rows, lambda i: read(i, collections.Counter()))

  counts = collections.Counter()
  own_splits = {split: documents(split) for split in info.splits}
  train = own_splits['train']
  held_out = next((split for split in ('validation', 'valid', 'dev', 'test') if split in own_splits), None)
  if held_out:
    splits = {'train': train, 'validation': own_splits[held_out]}
  else:
    rows = lambda: ((0, i, document) for i, document in enumerate(train))
    splits = source.split(rows, lambda _, i: train[i], validation, name, counts)
  files = {path.name: path for path in sorted(builder.data_path.iterdir()) if path.is_file()}
  fingerprint = source_files.fingerprint(files, 'tfds', validation, key, *_if_not_strict(encoding_errors))
  return Source(info.name, splits, fingerprint,
                info.as_proto.redistribution_info.license or 'unknown', counts)


def _if_not_strict(encoding_errors: Errors) -> tuple[str, ...]:
  """Returns what a fingerprint includes of `encoding_errors`: nothing for 'strict', which changes no text."""
  return () if encoding_errors == 'strict' else (encoding_errors,)


def check_validation(share: float) -> None:
  """Raises ValueError if there would be no text to train on, or none to validate on."""
  if not 0 < share < 1:
    raise ValueError(f'--validation={share} is not a share between 0 and 1; every run is validated, so hold out a '
                     'little, such as --validation=0.01')
