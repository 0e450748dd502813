"""The flags by which the processes of a program find one another."""
import dataclasses


@dataclasses.dataclass(frozen=True)
class Cluster:
  """Processes on several hosts.

  Args:
    coordinator_address: host:port of process 0, in a cluster that JAX does not detect by itself.
    num_processes: the number of processes in that cluster.
    process_id: the number of this process, from 0.
    heartbeat: in a cluster, the seconds after which a process that does not answer is lost, and the program ends;
      refused where there is one process.
  """
  coordinator_address: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  heartbeat: int = 100

  def join(self) -> None:
    """Joins the cluster, or the one that is detected, see `hosts.join`. Call it before anything else of JAX."""
    from lm.sharding import hosts
    hosts.join(self.coordinator_address, self.num_processes, self.process_id, self.heartbeat)
