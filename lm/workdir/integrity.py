"""Integrity of stored files: checksums show that files are as they were written, and parameters are finite.

CRC-32 (zlib) detects every burst of errors of up to 32 bits, and all other errors but one in 4 billion. It is the
fastest checksum in the standard library. It does not protect against deliberate changes, nor does any checksum that is
stored beside the file.
"""
import errno
import json
import os
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from lm.workdir import parsing

FILE = 'checksums.json'
_FIELD = 'checksum'   # the field of a JSON file that holds the checksum of all other fields
_BLOCK = 1 << 22   # bytes read at a time


def write_checksums(folder: Any, parts: Sequence[str]) -> None:
  """Writes the checksums of all files in the subfolders `parts` of a folder (a path of pathlib or of etils)."""
  names = sorted(str(path.relative_to(folder)) for part in parts for path in _files(folder / part))
  with ThreadPoolExecutor(8) as pool:   # zlib releases the GIL
    sums = pool.map(lambda name: checksum(folder / name), names)
    (folder / FILE).write_text(json.dumps(dict(zip(names, sums)), indent=1))


def changed(folder: Any, parts: tuple[str, ...] = ('',), share: slice = slice(None)) -> list[str]:
  """Returns the names of the files that are missing or changed, of those whose names begin with one of `parts`.

  Only the slice `share` of the list of files is checked. If the folder has no checksums, no file counts as changed.
  Raises ValueError if the file of checksums is damaged itself.
  """
  path = folder / FILE
  if not path.exists():
    return []
  stored = parsing.read_object(path)
  names = [name for name in stored if name.startswith(parts)][share]

  def intact(name):
    return (folder / name).exists() and checksum(folder / name) == stored[name]

  with ThreadPoolExecutor(8) as pool:
    return [name for name, is_intact in zip(names, pool.map(intact, names)) if not is_intact]


def checksum(path: Any) -> int:
  """Returns the CRC-32 of a file."""
  crc = 0
  with path.open('rb') as f:
    while block := f.read(_BLOCK):
      crc = zlib.crc32(block, crc)
  return crc


def json_with_checksum(values: Mapping[str, Any]) -> str:
  """Returns `values` as JSON with a checksum of them, which `parse_json_with_checksum` compares."""
  return json.dumps({**values, _FIELD: _checksum_of(values)}, indent=1)


def parse_json_with_checksum(text: str) -> tuple[dict[str, Any], bool]:
  """Returns the values in JSON text, and whether the text has a checksum. Older files have none.

  Raises ValueError if the values do not match the checksum, or if the text is no JSON object.
  """
  values = json.loads(text)
  if not isinstance(values, dict):
    raise ValueError('it is no JSON object')
  stored = values.pop(_FIELD, None)
  if stored not in (None, _checksum_of(values)):
    raise ValueError('it is not as it was written')
  return values, stored is not None


def has_checksum(path: Any) -> bool:
  """Returns whether a JSON file exists and has a checksum. Raises ValueError, which names it, if it is damaged."""
  try:
    return path.exists() and parse_json_with_checksum(path.read_text())[1]
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error})') from None


def compare(checksums: Mapping[Any, int], advice: str) -> None:
  """Raises ValueError, with their paths and `advice`, if files are missing or do not match their checksums."""
  with ThreadPoolExecutor(8) as pool:
    intact = pool.map(lambda path: path.exists() and checksum(path) == checksums[path], checksums)
    names = [str(path) for path, is_intact in zip(checksums, intact) if not is_intact]
    if names:
      problem = 'is not as it was written' if len(names) == 1 else 'are not as they were written'
      raise ValueError(f'{", ".join(names)} {problem}: {advice}')


def _checksum_of(values: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(values).encode())


def check_arrays(folder: Any, prefixes: tuple[str, ...]) -> None:
  """Raises an error if the metadata or the index of the arrays is damaged, or if a chunk is missing or cut short.

  It checks the arrays whose names begin with one of the prefixes, and reads only the last byte of each chunk. Orbax
  detects the same damage, but in parallel reads, which it abandons at the first error and each of which prints a
  traceback.
  """
  import tensorstore
  for path in [folder / '_METADATA', *folder.glob('array_metadatas/*')]:
    json.loads(path.read_text())
  base = str(folder) if '://' in str(folder) else f'file://{folder}'
  store = tensorstore.KvStore.open({'driver': 'ocdbt', 'base': f'{base}/'}).result()
  keys = [key for key in store.list().result() if key.decode().startswith(prefixes)]
  if not keys:
    raise FileNotFoundError('the index of the arrays is missing')
  for key, read in [(key, store.read(key, byte_range=slice(-1, None))) for key in keys]:
    if not read.result().value:
      raise FileNotFoundError(f'a file that holds {key.decode()} is missing')


def check_writable(folder: Any) -> None:
  """Makes a folder. Raises OSError, which names it, if it cannot be made or cannot be written to."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.write-probe-{os.getpid()}'
    probe.write_text('')
    probe.unlink()
  except OSError as error:
    raise OSError(f'checkpoints cannot be written to {folder}: {error}') from error


def all_finite(tree: Any) -> bool:
  """Returns whether the norm of each array is finite in float32: no number is infinite, NaN, or above about 1e19.

  Parameters of that size are finite, but useless: the next loss is not.
  """
  return bool(_all_finite(tree))


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
  squares = [jnp.sum(jnp.square(x.astype(jnp.float32)))
             for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.all(jnp.isfinite(jnp.array(squares)))


def _files(folder: Any) -> Iterator[Any]:
  """Yields all files under a folder. Paths of etils have no `rglob`."""
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


def reason(error: Exception) -> str:
  """Returns the message of an error as one short line, without the specification that TensorStore appends.

  A long message keeps its end, where TensorStore puts the cause.
  """
  text = re.split(r' \[(?:tensorstore_spec|source locations)=', str(error))[0]
  text = ' '.join(text.split()) or type(error).__name__
  text = f'the disk is full: {text}' if os.strerror(errno.ENOSPC) in text else text
  return text if len(text) < 300 else f'{text[:80]} ... {text[-200:]}'
