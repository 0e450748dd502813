"""Clusters are detected from the variables that launchers set; JAX then reads each process's place from them."""
import os
import sys

import jax
import pytest
from helpers.clusters import Service
from jax._src import clusters
from jax._src.clusters import cloud_tpu_cluster

from lm.sharding import hosts

SLURM = {'SLURM_JOB_ID': '4097', 'SLURM_STEP_NODELIST': 'node[003-004],other', 'SLURM_NTASKS': '8',
         'SLURM_STEP_NUM_TASKS': '8', 'SLURM_PROCID': '5', 'SLURM_LOCALID': '1'}
OPEN_MPI = {'OMPI_COMM_WORLD_SIZE': '4', 'OMPI_COMM_WORLD_RANK': '3', 'OMPI_COMM_WORLD_LOCAL_RANK': '1',
            'OMPI_MCA_orte_hnp_uri': '8192.0;tcp://127.0.0.1,127.0.0.2:34911'}
TPU = {'TPU_ML_PLATFORM': 'JAX'}
GKE = {**TPU, 'TPU_SKIP_MDS_QUERY': 'true', 'TPU_WORKER_ID': '1', 'KUBERNETES_SERVICE_HOST': '127.0.0.1',
       'TPU_WORKER_HOSTNAMES': 'localhost,localhost', 'MEGASCALE_COORDINATOR_ADDRESS': '', 'MEGASCALE_NUM_SLICES': '1',
       'MEGASCALE_SLICE_ID': '0'}
MULTISLICE = {**GKE, 'MEGASCALE_COORDINATOR_ADDRESS': 'localhost:8080', 'MEGASCALE_NUM_SLICES': '3',
              'MEGASCALE_SLICE_ID': '2'}
XPK = {'JAX_COORDINATOR_ADDRESS': 'host-0', 'JAX_COORDINATOR_PORT': '6002', 'NNODES': '2', 'NODE_RANK': '1'}
NAMES = {*SLURM, *OPEN_MPI, *MULTISLICE, *XPK, 'TPU_PROCESS_ADDRESSES', 'TPU_PROCESS_ADDRESSES_PATH',
         'JOB_COMPLETION_INDEX'}


@pytest.fixture
def join(monkeypatch):
  """Returns a function that joins with these variables, and returns where JAX would join: (address, count, index)."""
  def joined(variables, *flags, **settings):
    places, service = [], Service()

    def initialize(*place, cluster_detection_method, heartbeat_timeout_seconds):
      # A single machine of one process per device would restrict the devices; that is JAX's part.
      detected = (*place, None) if place else clusters.ClusterEnv.auto_detect_unset_distributed_params(
          None, None, None, None, cluster_detection_method, 10)
      places.append((*detected[:3], heartbeat_timeout_seconds))
      patch.setattr(jax, 'process_count', lambda: detected[1])

    with monkeypatch.context() as patch:
      for name in NAMES:
        patch.delenv(name, raising=False)
      for name, value in variables.items():
        patch.setenv(name, value)
      patch.setattr(jax.distributed, 'initialize', initialize)
      patch.setattr(hosts, '_client', lambda: service)
      patch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', 'TPU_ML_PLATFORM' in variables)
      hosts.join(*(flags or (None,) * 3), **settings)
    return places
  return joined


@pytest.mark.parametrize('variables, place', [
    (SLURM, ('node003:61441', 8, 5)), (OPEN_MPI, ('127.0.0.1:61442', 4, 3)), (GKE, ('localhost:8482', 2, 1)),
    ({**GKE, 'TPU_PROCESS_ADDRESSES': 'localhost:8471,b:8471,c:8471'}, ('localhost:8482', 3, 1)),
    (MULTISLICE, ('localhost:8482', 6, 5)), (XPK, ('host-0:6002', 2, 1)),
    ({**XPK, 'JAX_COORDINATOR_ADDRESS': 'host-0:99'}, ('host-0:99', 2, 1))])
def test_a_cluster_is_detected(join, variables, place):
  assert join(variables) == [(*place, hosts.HEARTBEAT)]
  assert join(variables, heartbeat=17) == [(*place, 17)]


@pytest.mark.parametrize('variables', [
    {}, {**SLURM, 'SLURM_STEP_NUM_TASKS': '1'}, {**OPEN_MPI, 'OMPI_COMM_WORLD_SIZE': '1'},
    {**GKE, 'TPU_WORKER_HOSTNAMES': 'localhost'}, {**GKE, 'TPU_WORKER_HOSTNAMES': ''},
    {'KUBERNETES_SERVICE_HOST': '127.0.0.1'}, {**XPK, 'NNODES': '1', 'NODE_RANK': '0'},
    {'KUBERNETES_SERVICE_HOST': '127.0.0.1', 'JOB_COMPLETION_INDEX': '0'}])
def test_a_process_that_is_alone_joins_nothing(join, variables):
  assert join(variables) == []


@pytest.mark.filterwarnings('ignore:.*maxsplit.*:DeprecationWarning')   # in JAX, from Python 3.13 on
def test_a_cloud_tpu_is_detected_by_its_metadata_server(join, monkeypatch):
  metadata = {'agent-worker-number': '1', 'worker-network-endpoints': 'a:0:127.0.0.1,b:1:127.0.0.2',
              'tpu-env': "ACCELERATOR_TYPE: 'v4-16'\n"}
  monkeypatch.setattr(cloud_tpu_cluster, 'get_metadata', lambda key: (metadata[key], 200))
  with monkeypatch.context() as patch:
    patch.delenv('TPU_SKIP_MDS_QUERY', raising=False)   # JAX sets it where there is no TPU
    assert join(TPU) == [('127.0.0.1:8482', 2, 1, hosts.HEARTBEAT)]
    metadata.update({'agent-worker-number': '0', 'worker-network-endpoints': 'a:0:127.0.0.1'})
    with pytest.raises(ValueError, match='heartbeat=17 s is given, and there is only one process'):
      join(TPU, heartbeat=17)


def test_flags_come_before_what_is_detected(join):
  assert join(SLURM, 'host:1', 2, 0, heartbeat=9) == [('host:1', 2, 0, 9)]


@pytest.mark.parametrize('variables, flags, named', [
    ({}, ('host:1', None, None), 'only some of --coordinator_address'),
    ({name: OPEN_MPI[name] for name in OPEN_MPI if 'orte' not in name}, (), 'this version of Open MPI.*mpi4py'),
    ({'KUBERNETES_SERVICE_HOST': '127.0.0.1', 'JOB_COMPLETION_INDEX': '3'}, (), 'pod 3 of a Kubernetes job.*k8s')])
def test_what_cannot_be_joined_is_refused(join, monkeypatch, variables, flags, named):
  for module in ('mpi4py', 'kubernetes'):
    assert module not in sys.modules
  with pytest.raises(ValueError, match=named):
    join(variables, *flags)


def test_a_heartbeat_that_the_network_misses_is_refused(join):
  with pytest.raises(ValueError, match='heartbeat=1 s is less than 6 s'):
    join({}, heartbeat=1)
  for variables, flags in (({}, ()), ({}, ('host:1', 1, 0))):
    with pytest.raises(ValueError, match='heartbeat=17 s is given, and there is only one process'):
      join(variables, *flags, heartbeat=17)
  assert 'SLURM_PROCID' not in os.environ


def test_a_value_of_process_0_arrives_in_parts_that_the_service_takes(monkeypatch):
  service, value = Service(), {'text': 'é"' * 700_000, 'numbers': [1, None, 2.5]}
  monkeypatch.setattr(hosts, '_client', lambda: service)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  for index, own in ((0, value), (1, 'something else')):
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    monkeypatch.setattr(hosts, '_values', hosts.Channel('test'))
    assert hosts.from_process_0(own) == value
    if index == 0:
      assert len(service.values) > 3 and max(map(len, service.values.values())) <= 2 ** 20
  assert not service.values


def test_each_process_has_the_values_of_all_in_their_order(monkeypatch):
  """Process 0 waits for the value of process 1, which is there, as that for process 0 is when process 1 reads."""
  service = Service()
  monkeypatch.setattr(hosts, '_client', lambda: service)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  service.key_value_set('lm/test/0/0/1/part/0', '"late"')
  service.key_value_set('lm/test/0/0/1/parts', '1')
  monkeypatch.setattr(jax, 'process_index', lambda: 0)
  monkeypatch.setattr(hosts, '_values', hosts.Channel('test'))
  assert hosts.from_all(['first']) == [['first'], 'late'] and not service.values


def test_the_service_forgets_values_that_all_have_received(monkeypatch):
  """Of a run's values, it has those since the last point to which all processes have come, and those before it."""
  class Forgetful(Service):
    barriers = 0

    def wait_at_barrier(self, name, milliseconds):
      self.barriers += 1

    def key_value_delete(self, key):
      self.values = {name: value for name, value in self.values.items() if not name.startswith(f'{key}/')}

  service, channel = Forgetful(), hosts.Channel('test')
  monkeypatch.setattr(hosts, '_client', lambda: service)
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  for i in range(350):
    assert channel.from_process_0(i) == i
    assert len(service.values) <= 2 * 100   # two keys for each value
  assert service.barriers == 3 and {f'lm/test/3/{i}/parts' for i in range(50)} < service.values.keys()
  channel.close()
  assert not service.values
