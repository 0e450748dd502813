"""Examines a trained run: whether it does what it says. Prints a line for each check, with a number and a verdict.

  python experiments/doctor.py --workdir=runs/quickstart

A run that has not been trained is examined by its own command with the flag `diagnose`, which also prints how the
optimizer treats each parameter; see docs/doctor.md.

The exit code is 1 where there is a fault.
"""
import pathlib
import sys
import time

import jax

from lm import doctor, launch, sharding


def examine(*, workdir: pathlib.Path = pathlib.Path('runs/quickstart'), best: bool = False, mesh: str | None = None,
            cluster: launch.Cluster = launch.Cluster()) -> None:
  """Examines the run of a workdir.

  Args:
    workdir: of the run.
    best: take the best checkpoint, not the newest.
    mesh: the size of each mesh axis; none for the mesh that fits the devices.
  """
  cluster.join()   # the same command runs in each process
  began = time.monotonic()
  devices = sharding.make_mesh(mesh)
  with jax.set_mesh(devices), doctor.opened(workdir, devices, best) as subject:
    findings = doctor.examine(subject, doctor.ALL)
  doctor.show(findings, time.monotonic() - began)
  sys.exit(int(doctor.has_fault(findings)))


if __name__ == '__main__':
  launch.tool(examine)
