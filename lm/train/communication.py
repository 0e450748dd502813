"""What the devices of a compiled program exchange, read from its HLO."""
import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'f8e4m3fn': 1, 'f8e5m2': 1, 's16': 2, 'u16': 2, 'f16': 2, 'bf16': 2, 's32': 4,
          'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}
_INSTRUCTION = re.compile(rf'\s+(?:ROOT )?%?\S+ = (.*?) ({"|".join(KINDS)})(?:-start)?\(')
_CALLED = re.compile(r'(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)')


class Exchange(NamedTuple):
  """An exchange between devices.

  Attributes:
    kind: one of KINDS.
    shapes: the shapes of the arrays that a device has afterwards, such as `('f32[4,8]',)`.
    bytes: the bytes of all parts together: what a device has after an all-gather, and before a reduce-scatter.
    devices: how many devices take part in one exchange.
    times: how often a run of the program does it.
    name: the path of the operation in the program.
  """
  kind: str
  shapes: tuple[str, ...]
  bytes: int
  devices: int
  times: int
  name: str


def exchanges(program: str) -> list[Exchange]:
  """Returns the exchanges of a compiled program, given its text, `compiled.as_text()`.

  Exchanges of a single device are left out. An operation in a loop counts as often as the loop runs; where XLA does not
  know this number, once.
  """
  bodies: dict[str, list[str]] = {}
  entry, lines = '', []
  for line in program.splitlines():
    header = re.match(r'(ENTRY )?%?([\w.\-]+) .*\{$', line)
    if header:
      lines = bodies.setdefault(header[2], [])
      entry = header[2] if header[1] else entry
    else:
      lines.append(line)
  return [exchange for exchange in _exchanges(bodies, entry, 1) if exchange.devices > 1]


def totals(program: str) -> dict[str, tuple[int, int]]:
  """Returns how often a program exchanges arrays, and the bytes of these arrays, by the kind of exchange."""
  sums: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
  for exchange in exchanges(program):
    sums[exchange.kind][0] += exchange.times * len(exchange.shapes)
    sums[exchange.kind][1] += exchange.times * exchange.bytes
  return {kind: tuple(sums[kind]) for kind in KINDS if kind in sums}


def _exchanges(bodies: dict[str, list[str]], name: str, times: int) -> Iterator[Exchange]:
  for line in bodies.get(name, ()):
    exchange = _INSTRUCTION.match(line)
    if exchange:
      yield _read(line, *exchange.groups(), times)
      continue
    trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
    for called in _CALLED.findall(line):
      yield from _exchanges(bodies, called, times * int(trips[1]) if trips else times)


def _read(line: str, result: str, kind: str, times: int) -> Exchange:
  shapes, devices = tuple(re.findall(r'\w+\[[\d,]*\]', result)), _group_size(line)
  size = sum(map(_bytes, shapes)) * (devices if kind == 'reduce-scatter' else 1)
  path = re.search(r'op_name="([^"]*)"', line)
  return Exchange(kind, shapes, size, devices, times, path[1] if path else '')


def _bytes(shape: str) -> int:
  dtype, sizes = shape.rstrip(']').split('[')
  return _BYTES[dtype] * math.prod(int(size) for size in sizes.split(',') if size)


def _group_size(line: str) -> int:
  """Returns the number of devices in a group, which XLA writes as lists, as an iota, or as axes of a mesh."""
  if 'source_target_pairs' in line:
    return 2
  lists = re.search(r'replica_groups=\{\{([\d,]*)\}', line)
  if lists:
    return len(lists[1].split(','))
  iota = re.search(r'replica_groups=\[\d+,(\d+)\]', line)
  if iota:
    return int(iota[1])
  mesh = re.search(r"replica_groups=mesh\[(.*?)\][^{]*\{(.*?)\}", line)
  if mesh:
    sizes = {axis: int(size) for axis, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
    return math.prod(sizes[axis] for axis in re.findall(r"'(\w+)'", mesh[2]))
  return 1
