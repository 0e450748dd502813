"""Event files for TensorBoard, in which each record is shown once however often the run was killed.

TensorBoard reads the files of a folder in the order of their names. Where a session starts at a step, it drops what it
has read of this step and of later ones. It takes the first start of a session in a folder for the beginning of the run,
and drops nothing there.

A file is a sequence of records: the length of the data (8 bytes), its checksum (4), the data, and their checksum (4).
The data are an `Event` in the encoding of Protocol Buffers, of which the numbers of the fields are in `event.proto` and
`summary.proto` of TensorBoard. Libraries that write such files take up to seconds to import.
"""
import os
import pathlib
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping

from lm.workdir import atomic

# Types of fields in the encoding of Protocol Buffers.
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5
# Fields of an Event, of its Summary, of a Value of this, and of a SessionLog; and the status of one that starts.
_WALL_TIME, _STEP, _FILE_VERSION, _SUMMARY, _SESSION_LOG = 1, 2, 3, 5, 7
_VALUE, _TAG, _SIMPLE_VALUE, _STATUS, _START = 1, 1, 2, 1, 1


class TensorBoard:
  """Writes scalars to a new file. A full disk raises OSError at the write, or at `flush`.

  Args:
    folder: the folder of the files.
    step: the records of this step, and of later ones, in earlier files are dropped: the run logs them again.
  """

  def __init__(self, folder: pathlib.Path, step: int):
    with atomic.naming(folder):
      folder.mkdir(parents=True, exist_ok=True)
    # Also where the clock was set back, or a run starts twice in a second, the newest file has the last name.
    last = max((_number(path) for path in _files(folder)), default=-1)
    number = max(int(time.time()), last + 1)
    self._path = folder / f'events.out.tfevents.{number}.{socket.gethostname()}.{os.getpid()}'
    with atomic.naming(self._path):
      self._file = self._path.open('wb')
    self._add(_field(_FILE_VERSION, _BYTES, b'brain.Event:2'))
    for _ in range(2):   # the first one in the folder has no effect
      self._add(_field(_STEP, _VARINT, step), _field(_SESSION_LOG, _BYTES, _field(_STATUS, _VARINT, _START)))

  def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
    """Writes the metrics of a step. Those that are None, because they are not finite, are left out."""
    values = [_field(_TAG, _BYTES, name.encode()) + _field(_SIMPLE_VALUE, _FLOAT, value)
              for name, value in metrics.items() if value is not None]
    if values:
      summary = b''.join(_field(_VALUE, _BYTES, value) for value in values)
      self._add(_field(_STEP, _VARINT, step), _field(_SUMMARY, _BYTES, summary))

  def flush(self) -> None:
    """Shows all records to readers of the file. They outlive this process, but not the machine."""
    with atomic.naming(self._path):
      self._file.flush()

  def sync(self) -> None:
    """Returns when all records are on disk, which may take long on the file system of a network."""
    self.flush()
    with atomic.naming(self._path):
      os.fsync(self._file.fileno())

  def close(self) -> None:
    with atomic.naming(self._path):
      self._file.close()

  def _add(self, *fields: bytes) -> None:
    data = b''.join((_field(_WALL_TIME, _DOUBLE, time.time()), *fields))
    length = struct.pack('<Q', len(data))
    with atomic.naming(self._path):
      self._file.write(b''.join((length, _checksum(length), data, _checksum(data))))


def read(folder: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
  """Returns {name: [(step, value), ...]} as TensorBoard shows the folder, without records that a kill cut short."""
  shown: dict[str, list[tuple[int, float]]] = {}
  is_restart = False
  for event in (dict(_fields(data)) for path in _files(folder) for data in _events(path)):
    step = event.get(_STEP, 0)
    if dict(_fields(event.get(_SESSION_LOG, b''))).get(_STATUS) == _START:
      if is_restart:
        shown = {name: [row for row in rows if row[0] < step] for name, rows in shown.items()}
      is_restart = True
    for _, data in _fields(event.get(_SUMMARY, b'')):
      value = dict(_fields(data))
      shown.setdefault(value[_TAG].decode(), []).append((step, value.get(_SIMPLE_VALUE, 0.)))
  return {name: rows for name, rows in shown.items() if rows}


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(folder.glob('events.out.tfevents.*'))


def _number(path: pathlib.Path) -> int:
  """Returns the number in the name of an event file, the seconds at which it was made; -1 for other names."""
  match = re.match(r'events\.out\.tfevents\.(\d+)', path.name)
  return int(match[1]) if match else -1


def _events(path: pathlib.Path) -> Iterator[bytes]:
  data, start = path.read_bytes(), 0
  while start + 12 <= len(data):
    size, = struct.unpack_from('<Q', data, start)
    if start + size + 16 > len(data):
      return
    yield data[start + 12:start + 12 + size]
    start += size + 16


def _field(number: int, kind: int, value: bytes | float) -> bytes:
  """Returns a field in the encoding of Protocol Buffers, which leaves out a whole number that is 0."""
  if kind == _VARINT and not value:
    return b''
  key = _varint(number << 3 | kind)
  if kind == _BYTES:
    return key + _varint(len(value)) + value
  return key + (_varint(value) if kind == _VARINT else struct.pack('<d' if kind == _DOUBLE else '<f', value))


def _varint(value: int) -> bytes:
  """Returns a whole number in groups of 7 bits, the lowest first, of which all but the last have the high bit."""
  groups = bytearray()
  while value > 127:
    groups.append(value & 127 | 128)
    value >>= 7
  return bytes((*groups, value))


def _fields(data: bytes) -> Iterator[tuple[int, bytes | float]]:
  """Yields (number, value) of the fields in the encoding of Protocol Buffers."""
  start = 0

  def varint() -> int:
    nonlocal start
    value = shift = 0
    while data[start] > 127:
      value, shift, start = value | (data[start] & 127) << shift, shift + 7, start + 1
    value, start = value | data[start] << shift, start + 1
    return value

  while start < len(data):
    key = varint()
    value = varint() if key & 7 in (_VARINT, _BYTES) else 0
    if key & 7 != _VARINT:
      size = {_DOUBLE: 8, _FLOAT: 4}.get(key & 7, value)
      value, start = data[start:start + size], start + size
    if key & 7 in (_DOUBLE, _FLOAT):
      value, = struct.unpack('<d' if len(value) == 8 else '<f', value)
    yield key >> 3, value


def _crc_table() -> list[int]:
  table = []
  for value in range(256):
    for _ in range(8):
      value = value >> 1 ^ 0x82F63B78 * (value & 1)
    table.append(value)
  return table


_TABLE = _crc_table()


def _checksum(data: bytes) -> bytes:
  """Returns the CRC-32C (Castagnoli) of data, rotated and shifted as event files have it."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
  crc ^= 0xFFFFFFFF
  return struct.pack('<I', ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
