"""Processes, often on several hosts, that train together."""
import contextlib
import functools
import importlib.util
import itertools
import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from lm import exits

HEARTBEAT = 100   # seconds, the default of JAX
_DAY = 86_400_000  # milliseconds to wait for another process, whose loss is noticed by the heartbeat
_PART = 2 ** 20   # characters that the coordination service is given at once
_GROUP = 100      # values that the coordination service forgets together
_ANSWER = 3       # seconds in which the processes of a cluster come to a barrier after an error
# Errors of collectives and of the coordination service. Errors of bad input are those of all processes at once.
_TRANSPORT = 'Gloo|NCCL|UNAVAILABLE|ABORTED|DEADLINE_EXCEEDED|[Cc]oordination service'


@contextlib.contextmanager
def process_0_first() -> Iterator[None]:
  """Runs a block in process 0 before the others run it, so that they find its files where they share a disk."""
  if jax.process_index() > 0:
    wait_for_all()
  try:
    yield
  finally:   # also after an error, which the other processes then raise too, instead of waiting for ever
    if jax.process_index() == 0:
      wait_for_all()


class Channel:
  """Values that all processes exchange through JAX's coordination service, in an order that is the same in all of them.

  They do not go through the devices, where they would have to keep their place among other programs. Threads that do
  not wait for one another need channels of different names.
  """

  def __init__(self, name: str):
    self._key, self._count = f'lm/{name}', 0

  def from_process_0(self, value: Any) -> Any:
    """Returns the value of process 0, which JSON can hold, in all processes; all of them must call it."""
    if jax.process_count() == 1:
      return value
    key = self._next()
    if jax.process_index() > 0:
      return _receive(key)
    _send(key, value)
    return json.loads(json.dumps(value))   # the same types as in the others

  def from_all(self, value: Any) -> list[Any]:
    """Returns the values of all processes, which JSON can hold, in all of them; each call waits for all others."""
    if jax.process_count() == 1:
      return [value]
    key = self._next()
    _send(f'{key}/{jax.process_index()}', value)
    return [_receive(f'{key}/{process}') for process in range(jax.process_count())]

  def close(self) -> None:
    """Removes the values. All processes must have received the last one."""
    if jax.process_count() > 1 and jax.process_index() == 0:
      _client().key_value_delete(self._key)

  def _next(self) -> str:
    """Returns the key of the next value. The service would otherwise keep all values of a run."""
    group, number = divmod(self._count, _GROUP)
    self._count += 1
    if group and number == 0:   # a process that comes here has received all values before
      _client().wait_at_barrier(f'{self._key}/received', _DAY)
      if jax.process_index() == 0:
        _client().key_value_delete(f'{self._key}/{group - 1}')
    return f'{self._key}/{group}/{number}'


_values = Channel('values')   # of the main thread


def from_process_0(value: Any) -> Any:
  """Returns the value of process 0, which JSON can hold, in all processes; all of them must call it.

  So they decide alike even where their clocks or the files on their disks differ.
  """
  return _values.from_process_0(value)


def from_all(value: Any) -> list[Any]:
  """Returns the values of all processes, which JSON can hold, in all of them; each call waits for all others."""
  return _values.from_all(value)


def wait_for_all() -> None:
  """Waits until all processes call it."""
  from_all(None)


def _send(key: str, value: Any) -> None:
  text = json.dumps(value)
  parts = [text[start:start + _PART] for start in range(0, len(text), _PART)]
  for number, part in enumerate(parts):
    _client().key_value_set(f'{key}/part/{number}', part)
  _client().key_value_set(f'{key}/parts', str(len(parts)))


def _receive(key: str) -> Any:
  read = lambda name: _client().blocking_key_value_get(f'{key}/{name}', _DAY)
  return json.loads(''.join(read(f'part/{number}') for number in range(int(read('parts')))))


def join(coordinator_address: str | None, num_processes: int | None, process_id: int | None,
         heartbeat: int = HEARTBEAT) -> None:
  """Joins the cluster that the flags name, or else the one that is detected; does nothing where there is none.

  From then on, only process 0 prints to standard output.

  Args:
    coordinator_address: host:port of process 0.
    num_processes: the number of processes.
    process_id: the number of this process.
    heartbeat: the seconds after which a process that does not answer is lost, and all others end.

  Raises:
    ValueError: only some of the flags are given, the cluster that is detected does not say where process 0 is, or a
      heartbeat is given without a cluster.
  """
  if heartbeat < 2 * _ANSWER:
    raise ValueError(f'heartbeat={heartbeat} s is less than {2 * _ANSWER} s, in which a short pause of the network '
                     'would end the run; give more')
  settings = {'heartbeat_timeout_seconds': heartbeat}
  flags = (coordinator_address, num_processes, process_id)
  if any(value is not None for value in flags):
    if None in flags:
      raise ValueError('only some of --coordinator_address, --num_processes and --process_id are given; give all '
                       'three or none')
    kind = 'flags'
    jax.distributed.initialize(*flags, cluster_detection_method='deactivate', **settings)
  else:
    kind, method, place = _detect(os.environ)
    if kind is not None:
      # A Cloud TPU that is in no cluster has no coordinator address.
      with contextlib.suppress(ValueError) if kind == 'Cloud TPU' else contextlib.nullcontext():
        jax.distributed.initialize(*place, cluster_detection_method=method, **settings)
  if kind is None or jax.process_count() == 1:
    if heartbeat != HEARTBEAT:
      raise ValueError(f'heartbeat={heartbeat} s is given, and there is only one process, for which no other one '
                       'waits; leave it out')
  else:
    _client().key_value_set(f'lm/host/{jax.process_index()}', socket.gethostname())
    _print_from_process_0()
    print(f'{jax.process_count()} processes ({kind}); one that does not answer for {heartbeat} s ends the run')


def connect(mesh: jax.sharding.Mesh) -> None:
  """Opens the connections of a mesh on CPU while all processes wait for that; does nothing on other devices.

  Gloo opens those of a group of devices at its first exchange, and fails where a process comes to it 30 seconds late,
  as one does that compiles on a busy machine.
  """
  if jax.process_count() == 1 or mesh.devices.flat[0].platform != 'cpu':
    return
  axes = tuple(name for name, size in mesh.shape.items() if size > 1)
  layout = jax.sharding.NamedSharding(mesh, P(axes))
  zeros = jax.make_array_from_callback((mesh.size,), layout, lambda _: np.zeros(1, np.float32))
  for count in range(1, len(axes) + 1):
    for group in itertools.combinations(axes, count):
      others = tuple(axis for axis in axes if axis not in group)
      total = jax.shard_map(functools.partial(jax.lax.psum, axis_name=group), mesh=mesh, in_specs=P(axes),
                            out_specs=P(others))
      compiled = jax.jit(total).lower(zeros).compile()
      wait_for_all()
      jax.block_until_ready(compiled(zeros))


def _detect(variables: Mapping[str, str]) -> tuple[str | None, str | None, tuple[str, int, int] | tuple[()]]:
  """Returns the kind of the cluster that environment variables describe, JAX's method for it, and this process's place.

  The kind is None where they describe none, or one of a single process. The place is (coordinator address, number of
  processes, process id); it is empty where JAX reads it.

  Raises:
    ValueError: the variables do not say where process 0 is.
  """
  if {'JAX_COORDINATOR_ADDRESS', 'NNODES', 'NODE_RANK'} <= variables.keys():   # XPK on GPU
    address = variables['JAX_COORDINATOR_ADDRESS']
    address = address if ':' in address else f'{address}:{variables.get("JAX_COORDINATOR_PORT", 6002)}'
    place = address, int(variables['NNODES']), int(variables['NODE_RANK'])
    return ('NNODES', 'deactivate', place) if place[1] > 1 else (None, None, ())
  if int(variables.get('OMPI_COMM_WORLD_SIZE', 1)) > 1:
    if 'OMPI_MCA_orte_hnp_uri' in variables:
      return 'Open MPI', None, ()
    if importlib.util.find_spec('mpi4py') is None:   # Open MPI 5
      raise ValueError('this version of Open MPI does not say on which host process 0 is; install mpi4py, or give '
                       '--coordinator_address, --num_processes and --process_id')
    return 'Open MPI', 'mpi4py', ()
  if int(variables.get('SLURM_STEP_NUM_TASKS', 1)) > 1:
    return 'SLURM', None, ()
  if variables.get('TPU_ML_PLATFORM') == 'JAX':   # JAX sets it on a host with a TPU
    names = 'TPU_PROCESS_ADDRESSES_PATH', 'TPU_PROCESS_ADDRESSES', 'TPU_WORKER_HOSTNAMES'
    hosts = next((variables[name] for name in names if variables.get(name)), None)
    if hosts is not None:
      is_one = ',' not in hosts and not hosts.startswith('/') and int(variables.get('MEGASCALE_NUM_SLICES') or 1) == 1
      return (None, None, ()) if is_one else ('GKE', None, ())
    # The variable is set where no metadata server can be queried.
    return (None if 'TPU_SKIP_MDS_QUERY' in variables else 'Cloud TPU'), None, ()
  if {'KUBERNETES_SERVICE_HOST', 'JOB_COMPLETION_INDEX'} <= variables.keys():   # a Job or JobSet
    if importlib.util.find_spec('kubernetes') is not None:
      return 'Kubernetes', None, ()
    index = int(variables['JOB_COMPLETION_INDEX'])
    if index:   # pod 0 may be the only one
      raise ValueError(f'this is pod {index} of a Kubernetes job, and the package kubernetes, by which it would find '
                       'pod 0, is missing; install jax[k8s], or give --coordinator_address, --num_processes and '
                       '--process_id')
  return None, None, ()


def _print_from_process_0() -> None:
  """Discards the standard output of all other processes, also what C++ prints."""
  if jax.process_index() > 0:
    sys.stdout.flush()
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.close(nothing)


@contextlib.contextmanager
def ending_with_peers() -> Iterator[None]:
  """Ends this process, with a line that names the lost ones, where a block fails because another process is lost.

  An exception would not do: what waits for a save in progress, and the ordinary exit of a process, wait for all
  processes of the cluster.
  """
  try:
    yield
  except Exception as error:
    if jax.process_count() == 1 or not re.search(_TRANSPORT, str(error)):
      raise
    names = ' and '.join(f'process {number} ({_host(number)})' for number in _silent_processes())
    print(f'error: {names or "another process"} does not answer: it has ended, or its host cannot be reached. This '
          'process ends too; start all of them again, and they continue from the last checkpoint '
          f'({" ".join(str(error).split())[:200]})', file=sys.stderr, flush=True)
    exits.at_once(1)


def _silent_processes() -> list[int]:
  """Returns the numbers of the processes that do not come to a barrier within a few seconds."""
  try:
    _client().wait_at_barrier('lm/lost', timeout_in_ms=1000 * _ANSWER)
  except Exception as error:
    names = re.search(r'task names:\n(.*?)\n\n', f'{error}\n\n', re.DOTALL)
    if names:
      return [int(number) for number in re.findall(r'(\d+)$', names[1], re.MULTILINE)]
    return [0] if jax.process_index() else []   # process 0 keeps the barrier
  return []


def _host(process: int) -> str:
  try:
    return f'on host {_client().key_value_try_get(f"lm/host/{process}")}'
  except Exception:   # process 0 keeps the names
    return 'which coordinates the others' if process == 0 else 'on an unknown host'


def _client() -> Any:
  """Returns the client of JAX's coordination service."""
  from jax._src import distributed  # nothing public has the barrier with a timeout
  return distributed.global_state.client
