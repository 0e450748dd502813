"""Whether what is stored can be relied on: files are as they were written, by checksums, and numbers are finite.

CRC-32 (zlib) finds every error of up to 32 bits in a row, and of others all but one in 4 billion. It is the fastest
checksum of the standard library; against someone who changes a file on purpose there is no defence in any checksum that
lies beside it.
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

FILE = 'checksums.json'
_SEAL = 'checksum'   # of what else a sealed JSON file says
_BLOCK = 1 << 22   # bytes read at a time


def write_checksums(folder: Any, parts: Sequence[str]) -> None:
  """Writes the checksums of all files in the folders `parts` of a folder (a path of pathlib, or of etils)."""
  names = sorted(str(path.relative_to(folder)) for part in parts for path in _files(folder / part))
  with ThreadPoolExecutor(8) as pool:   # zlib works outside of Python's lock
    sums = pool.map(lambda name: checksum(folder / name), names)
    (folder / FILE).write_text(json.dumps(dict(zip(names, sums)), indent=1))


def changed(folder: Any, part: str = '', share: slice = slice(None)) -> list[str]:
  """The files under the folder `part` of a folder that are missing or changed; of its files only a `share`.

  Where there are no checksums, no file counts as changed. ValueError if the checksums are damaged themselves.
  """
  path = folder / FILE
  if not path.exists():
    return []
  stored = json.loads(path.read_text())
  if not isinstance(stored, dict):
    raise ValueError(f'{FILE} is damaged')
  names = [name for name in stored if name.startswith(part)][share]

  def intact(name):
    return (folder / name).exists() and checksum(folder / name) == stored[name]

  with ThreadPoolExecutor(8) as pool:
    return [name for name, good in zip(names, pool.map(intact, names)) if not good]


def checksum(path: Any) -> int:
  """The CRC-32 of a file."""
  number = 0
  with path.open('rb') as f:
    while block := f.read(_BLOCK):
      number = zlib.crc32(block, number)
  return number


def sealed(values: Mapping[str, Any]) -> str:
  """JSON with a checksum of what it says, for `unsealed`."""
  return json.dumps({**values, _SEAL: _checksum_of(values)}, indent=1)


def unsealed(text: str) -> tuple[dict[str, Any], bool]:
  """What JSON says, and whether it is sealed; ValueError where that is not what was sealed, or no JSON object."""
  values = json.loads(text)
  if not isinstance(values, dict):
    raise ValueError('it is no JSON object')
  seal = values.pop(_SEAL, None)
  if seal not in (None, _checksum_of(values)):
    raise ValueError('it is not as it was written')
  return values, seal is not None


def is_sealed(path: Any) -> bool:
  """Whether a JSON file is there and sealed; ValueError, with its path, where it is damaged."""
  try:
    return path.exists() and unsealed(path.read_text())[1]
  except ValueError as error:
    raise ValueError(f'{path} is damaged ({error})') from None


def compare(checksums: Mapping[Any, int], advice: str) -> None:
  """ValueError, with all their paths and advice, where files are missing, or have other checksums than these."""
  with ThreadPoolExecutor(8) as pool:
    intact = pool.map(lambda path: path.exists() and checksum(path) == checksums[path], checksums)
    if names := [str(path) for path, good in zip(checksums, intact) if not good]:
      said = 'is not as it was written' if len(names) == 1 else 'are not as they were written'
      raise ValueError(f'{", ".join(names)} {said}: {advice}')


def _checksum_of(values: Mapping[str, Any]) -> int:
  return zlib.crc32(json.dumps(values).encode())


def check_arrays(folder: Any, prefixes: tuple[str, ...]) -> None:
  """Raises if metadata, the index of the arrays or the end of a chunk is bad: of each chunk it reads one byte.

  It looks at the arrays whose names begin with one of the prefixes.

  Orbax finds the same, but in parallel reads, which it abandons at the first error and which print a trace each.
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
  """Makes a folder; OSError, with its path, where that or writing to it is not possible."""
  try:
    folder.mkdir(parents=True, exist_ok=True)
    probe = folder / f'.write-probe-{os.getpid()}'
    probe.write_text('')
    probe.unlink()
  except OSError as error:
    raise OSError(f'checkpoints cannot be written to {folder}: {error}') from error


def all_finite(tree: Any) -> bool:
  """Whether the norm of each array is finite in float32: no number is infinite, NaN, or beyond some 1e19.

  Parameters of that size are ruined as well: the next loss is not finite, though they are.
  """
  return bool(_all_finite(tree))


@jax.jit
def _all_finite(tree: Any) -> jax.Array:
  squares = [jnp.sum(jnp.square(x.astype(jnp.float32)))
             for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
  return jnp.all(jnp.isfinite(jnp.array(squares)))


def _files(folder: Any) -> Iterator[Any]:
  """All files under a folder; etils has no `rglob`."""
  for path in folder.iterdir():
    if path.is_dir():
      yield from _files(path)
    else:
      yield path


def reason(error: Exception) -> str:
  """One line of an error: TensorStore appends its whole specification, and puts the cause last."""
  text = re.split(r' \[(?:tensorstore_spec|source locations)=', str(error))[0]
  text = ' '.join(text.split()) or type(error).__name__
  text = f'the disk is full: {text}' if os.strerror(errno.ENOSPC) in text else text
  return text if len(text) < 300 else f'{text[:80]} ... {text[-200:]}'
