"""Where the doctor gets a run from: the start of training, or the workdir of a trained run."""
import contextlib
import dataclasses
import hashlib
import json
import pathlib
import sys
import time
from collections.abc import Iterator

import jax

from lm import load, train
from lm.doctor import probes
from lm.doctor.findings import Verdict
from lm.doctor.subject import Subject
from lm.sharding import hosts
from lm.workdir import records

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


class Fault(ValueError):
  """A run has a fault: it would train something else than it says."""


def check_start(workdir: pathlib.Path, start: train.Start) -> None:
  """Runs the probes of `probes.START`, and prints its warnings, unless the run was examined before as it is now.

  The record of the start in `run.json` keeps what was examined.

  Raises:
    Fault: the message has the lines of all faults.
  """
  examined = _digest(workdir, start)
  # All processes decide alike, although one of them may write the records while another one reads them.
  if hosts.from_process_0(any(record.get('doctor') == examined for record in records.read(workdir))):
    return
  began = time.monotonic()
  findings = probes.examine(subject_of(start), probes.START)
  faults = [f'{name}: {finding.text}' for name, finding in findings.items() if finding.verdict is Verdict.FAULT]
  if faults:
    raise Fault('the doctor found a fault, and nothing was trained; --nodoctor trains all the same\n  '
                + '\n  '.join(faults))
  warnings = {name: finding for name, finding in findings.items() if finding.verdict is Verdict.WARNING}
  records.add(workdir, doctor=examined)
  if jax.process_index():
    return
  for name, finding in warnings.items():
    print(f'doctor: {probes.line(name, finding)}')
  applied = sum(finding.verdict is not Verdict.SKIPPED for finding in findings.values())
  print(f'doctor: {applied - len(warnings)} of {applied} checks found nothing wrong, in '
        f'{time.monotonic() - began:.1f} s (--diagnose shows all of them)')


def diagnose(workdir: pathlib.Path, start: train.Start) -> None:
  """Prints the findings of all probes, and ends the program: with exit code 1 where there is a fault, 0 elsewhere."""
  del workdir
  began = time.monotonic()
  findings = probes.examine(subject_of(start), probes.ALL)
  probes.show(findings, time.monotonic() - began)
  sys.exit(int(probes.has_fault(findings)))


def subject_of(start: train.Start) -> Subject:
  """Returns the run that starts, to examine it."""
  is_new = start.step == 0 and start.run.start is None and 'base' not in start.constants
  return Subject(start.run, start.data, start.mesh, start.state.params, start.constants, start.feed, start.state,
                 is_new)


def _digest(workdir: pathlib.Path, start: train.Start) -> str:
  """Returns a digest of all that the probes of a start depend on: parts of the run, versions, devices and code."""
  newest = (records.read(workdir) or [{}])[-1]
  names = 'versions', 'platform', 'device', 'devices', 'processes', 'mesh'
  circumstances = {name: newest.get(name) for name in names}
  code = hashlib.sha256(b''.join(path.read_bytes() for path in sorted(_PACKAGE.rglob('*.py')))).hexdigest()
  facts = train.identity(start.run, start.data.fingerprint, start.data.tokenizer.fingerprint)
  whole = json.dumps([facts, start.run.accumulate, circumstances, code], default=str, sort_keys=True)
  return hashlib.sha256(whole.encode()).hexdigest()[:16]


@contextlib.contextmanager
def opened(workdir: pathlib.Path, mesh: jax.sharding.Mesh, best: bool = False) -> Iterator[Subject]:
  """Opens the result of a trained run, to examine it in a block. Adapters are merged into their model.

  Raises: as `load.open_trained`.
  """
  trained = load.open_trained(workdir, best)
  data = trained.open_data(trained.run.objective.control)
  names = [constant.name for constant in trained.run.constants if constant.name != 'base']
  run = dataclasses.replace(trained.run, model=trained.model, start=None, start_tokenizer=None, constants=tuple(
      constant for constant in trained.run.constants if constant.name in names))
  params = {name: tree for name, tree in trained.params.items() if name not in names}
  with contextlib.closing(train.DataFeed(run, data, mesh)) as feed:
    yield Subject(run, data, mesh, params, {name: trained.params[name] for name in names}, feed)
