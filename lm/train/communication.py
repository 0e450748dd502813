"""What the devices of a compiled program exchange, read from its HLO."""
import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ('all-gather', 'reduce-scatter', 'all-reduce', 'all-to-all', 'collective-permute')
_BYTES = {'pred': 1, 's8': 1, 'u8': 1, 'f8e4m3fn': 1, 'f8e5m2': 1, 's16': 2, 'u16': 2, 'f16': 2, 'bf16': 2, 's32': 4,
          'u32': 4, 'f32': 4, 's64': 8, 'u64': 8, 'f64': 8}
_INSTRUCTION = re.compile(rf'\s+(?:ROOT )?%?(\S+) = (.*?) ({"|".join(KINDS)})(-start)?\(')
_CALLED = re.compile(r'(?:body|condition|to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)')
_FUSED = re.compile(r' (?:fusion|async-start|async-update|async-done)\(.*calls=%?([\w.\-]+)')
_PRODUCT = re.compile(r' (?:dot|convolution)\(| custom_call_target="tpu_custom_call"')

Bodies = dict[str, list[str]]   # the lines of each computation of a program


class Exchange(NamedTuple):
  """An exchange between devices.

  Attributes:
    kind: one of KINDS.
    shapes: the shapes of the arrays that a device has afterwards, such as `('f32[4,8]',)`.
    bytes: the bytes of all parts together: what a device has after an all-gather, and before a reduce-scatter.
    devices: how many devices take part in one exchange.
    times: how often a run of the program does it.
    name: the path of the operation in the program.
    products: how many products of matrices, or fusions with one, are computed while it is under way. Devices wait for
      an exchange that has none; in a program for CPUs, all are so.
  """
  kind: str
  shapes: tuple[str, ...]
  bytes: int
  devices: int
  times: int
  name: str
  products: int = 0


def exchanges(program: str) -> list[Exchange]:
  """Returns the exchanges of a compiled program, given its text, `compiled.as_text()`.

  Exchanges of a single device are left out. An operation in a loop counts as often as the loop runs; where this number
  is not known, once.
  """
  bodies: Bodies = {}
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


def _exchanges(bodies: Bodies, name: str, times: int) -> Iterator[Exchange]:
  lines, chains = bodies.get(name, []), set()
  computed = [list(_computed(bodies, line)) for line in lines]   # the lines of operations, by line
  for i, line in enumerate(lines):
    for operation, exchange in ((each, _INSTRUCTION.match(each)) for each in computed[i]):
      chain = exchange and re.search(r'chain_id="\d+"', operation)   # XLA for TPUs spreads an exchange over fusions
      if not exchange or (chain and chain[0] in chains):
        continue
      chains.add(chain and chain[0])
      ends = f'-done(%{exchange[1]})', f'-done({exchange[1]})', *([chain[0]] if chain else [])
      end = max(j for j, texts in enumerate(computed) if j == i or any(end in text for text in texts for end in ends))
      products = sum(any(map(_PRODUCT.search, texts)) for texts in computed[i:end + 1])
      yield _read(operation, exchange, times, products)
    if not _INSTRUCTION.match(line) and not _FUSED.search(line):
      for called in _CALLED.findall(line):
        yield from _exchanges(bodies, called, times * _trips(bodies, line))


def _computed(bodies: Bodies, line: str) -> Iterator[str]:
  """Yields the line of an operation, and of those that are fused into it."""
  yield line
  fused = _FUSED.search(line)
  for inner in bodies.get(fused[1], ()) if fused else ():
    yield from _computed(bodies, inner)


def _trips(bodies: Bodies, line: str) -> int:
  """Returns how often the computations that a line calls run. XLA for TPUs says so in the condition of a loop alone."""
  count = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
  if count:
    return int(count[1])
  condition = re.search(r' while\(.*condition=%?([\w.\-]+)', line)
  text = '\n'.join(bodies.get(condition[1], ())) if condition else ''
  bounds = re.findall(r' constant\((\d+)\)', text)
  return int(bounds[0]) if len(bounds) == 1 and 'direction=LT' in text else 1


def _read(line: str, instruction: re.Match, times: int, products: int) -> Exchange:
  _, result, kind, start = instruction.groups()
  shapes, devices = tuple(re.findall(r'\w+\[[\d,]*\]', result)), _group_size(line)
  if start and kind != 'all-reduce':   # the operands come before the results, and counters of the transfer after them
    arrays = [shape for shape in shapes if shape not in ('u32[]', 's32[]')]
    shapes = tuple(arrays[len(arrays) // 2:])
  size = sum(map(_bytes, shapes)) * (devices if kind == 'reduce-scatter' else 1)
  path = re.search(r'op_name="([^"]*)"', line)
  return Exchange(kind, shapes, size, devices, times, path[1] if path else '', products)


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
