"""Event files for TensorBoard, in which each record is shown once however often the run was killed.

TensorBoard reads the files of a folder in the order of their names. Where a session starts at a step, it drops what it
has read of this step and of later ones. It takes the first start of a session in a folder for the beginning of the run,
and drops nothing there.
"""
import os
import pathlib
import re
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any

from lm.workdir import atomic


class TensorBoard:
  """Writes scalars to a new file. A full disk raises OSError at the write, or at `flush`.

  Args:
    folder: the folder of the files.
    step: the records of this step, and of later ones, in earlier files are dropped: the run logs them again.
  """

  def __init__(self, folder: pathlib.Path, step: int):
    from tensorboardX import proto, record_writer, summary  # 0.2 s: not for --help
    self._event, self._scalar = proto.event_pb2.Event, summary.scalar
    with atomic.naming(folder):
      folder.mkdir(parents=True, exist_ok=True)
      # Also where the clock was set back, or a run starts twice in a second, the newest file has the last name.
      last = max((_number(path) for path in _files(folder)), default=-1)
      number = max(int(time.time()), last + 1)
      self._path = folder / f'events.out.tfevents.{number}.{socket.gethostname()}.{os.getpid()}'
      self._file = record_writer.RecordWriter(str(self._path))
    self._add(file_version='brain.Event:2')
    for _ in range(2):   # the first one in the folder has no effect
      self._add(step=step, session_log=proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START))

  def write(self, step: int, metrics: Mapping[str, float | None]) -> None:
    """Writes the metrics of a step. Those that are None, because they are not finite, are left out."""
    for name, value in metrics.items():
      if value is not None:
        self._add(step=step, summary=self._scalar(name, value))

  def flush(self) -> None:
    """Returns when all records are on disk."""
    with atomic.naming(self._path):
      self._file.flush()

  def close(self) -> None:
    with atomic.naming(self._path):
      self._file.close()

  def _add(self, **fields: Any) -> None:
    with atomic.naming(self._path):
      self._file.write(self._event(wall_time=time.time(), **fields).SerializeToString())


def read(folder: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
  """Returns {name: [(step, value), ...]} as TensorBoard shows the folder, without records that a kill cut short."""
  shown: dict[str, list[tuple[int, float]]] = {}
  is_restart = False
  for event in (event for path in _files(folder) for event in _events(path)):
    if event.HasField('session_log') and event.session_log.status == event.session_log.START:
      if is_restart:
        shown = {name: [row for row in rows if row[0] < event.step] for name, rows in shown.items()}
      is_restart = True
    for value in event.summary.value:
      shown.setdefault(value.tag, []).append((event.step, value.simple_value))
  return {name: rows for name, rows in shown.items() if rows}


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(folder.glob('events.out.tfevents.*'))


def _number(path: pathlib.Path) -> int:
  """Returns the number in the name of an event file, the seconds at which it was made; -1 for other names."""
  match = re.match(r'events\.out\.tfevents\.(\d+)', path.name)
  return int(match[1]) if match else -1


def _events(path: pathlib.Path) -> Iterator[Any]:
  """Yields the events of a file. A record is its length (8 bytes), a checksum (4), the event, and a checksum (4)."""
  from tensorboardX import proto
  data, start = path.read_bytes(), 0
  while start + 12 <= len(data):
    size, = struct.unpack_from('<Q', data, start)
    if start + size + 16 > len(data):
      return
    yield proto.event_pb2.Event.FromString(data[start + 12:start + 12 + size])
    start += size + 16
