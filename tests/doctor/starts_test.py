"""The doctor at the start of a run: it stops a run with a fault, and examines an unchanged run once."""
import dataclasses
import functools
import json

import jax
import pytest
from helpers.every_run import CASES
from helpers.examined import examined, run_of
from helpers.meshes import mesh_of
from helpers.runs import RUN, logged

from lm import doctor, train
from lm.doctor import probes as names
from lm.doctor.findings import Finding, Verdict

pytestmark = pytest.mark.usefixtures('compiled_once')


def check(workdir, subject, probes, monkeypatch, examine=doctor.check_start):
  """Examines a subject as at the start of its run, with these probes."""
  monkeypatch.setattr(names, 'START', probes)
  monkeypatch.setattr(names, 'ALL', probes)
  examine(workdir, train.Start(subject.run, subject.data, subject.feed, subject.mesh, subject.state, {}, 0))


def test_faults_end_a_run_and_warnings_are_printed(tmp_path, monkeypatch, capsys):
  with examined(RUN) as subject:
    with pytest.raises(doctor.Fault, match='--nodoctor trains all the same\n  labels: they are wrong'):
      check(tmp_path, subject, {'labels': lambda subject: Finding(Verdict.FAULT, 'they are wrong')}, monkeypatch)
    probes = {'epochs': lambda subject: Finding(Verdict.WARNING, 'many'), 'broken': lambda subject: 1 / 0}
    check(tmp_path, subject, probes, monkeypatch)
  printed = capsys.readouterr().out
  assert 'doctor: warning  epochs            many' in printed
  assert 'could not be examined: ZeroDivisionError: division by zero' in printed


def test_a_run_is_examined_again_only_after_changes(tmp_path, monkeypatch):
  calls = []
  probes = {'counted': lambda subject: calls.append(1) or Finding(Verdict.OK, '')}
  with examined(RUN) as subject:
    check(tmp_path, subject, probes, monkeypatch)
    check(tmp_path, subject, probes, monkeypatch)
    assert len(calls) == 1 and json.loads((tmp_path / 'run.json').read_text())[-1]['doctor']
    changed = dataclasses.replace(subject, run=dataclasses.replace(RUN, accumulate=2))
    check(tmp_path, changed, probes, monkeypatch)
    assert len(calls) == 2


def test_diagnose_prints_all_findings_and_ends_the_program(tmp_path, monkeypatch, capsys):
  for verdict, code in ((Verdict.OK, 0), (Verdict.FAULT, 1)):
    probes = {'table': lambda subject, verdict=verdict: Finding(verdict, 'two', ('row 1', 'row 2'))}
    with examined(RUN) as subject, pytest.raises(SystemExit) as ended:
      check(tmp_path, subject, probes, monkeypatch, doctor.diagnose)
    assert ended.value.code == code
    printed = capsys.readouterr().out
    assert f'{verdict.value:8} table             two' in printed and 'row 2' in printed


def test_a_fault_ends_training_before_its_first_step(tmp_path):
  def examine(start):
    assert start.step == 0 and start.run.model is RUN.model
    raise doctor.Fault('wrong')
  with jax.set_mesh(mesh_of('fsdp:2')), pytest.raises(doctor.Fault):
    train.train(RUN, tmp_path, mesh_of('fsdp:2'), examine=examine)
  assert not list((tmp_path / 'checkpoints').glob('[0-9]*'))


@pytest.mark.slow
def test_the_probes_of_a_start_change_no_result(tmp_path):
  run, mesh = dataclasses.replace(RUN, steps=2), mesh_of('fsdp:2')
  with jax.set_mesh(mesh):
    train.train(run, tmp_path / 'plain', mesh)
    (tmp_path / 'examined').mkdir()
    train.train(run, tmp_path / 'examined', mesh, examine=functools.partial(doctor.check_start, tmp_path / 'examined'))
  assert logged(tmp_path / 'examined') == logged(tmp_path / 'plain')


SOUND = 'masked', 'spans', 'multi_token', 'dpo', 'distil'


@pytest.mark.slow
@pytest.mark.parametrize('name', SOUND)
def test_sound_runs_have_no_fault(name):
  assert name in CASES
  about = {'devices', 'host', 'settings', 'epochs', 'cut examples', 'padding share'}   # of the tests, not of the run
  with examined(run_of(name)) as subject:
    findings = names.examine(subject, {key: probe for key, probe in names.START.items() if key not in about})
  assert not {key: finding.text for key, finding in findings.items()
              if finding.verdict in (Verdict.WARNING, Verdict.FAULT)}
