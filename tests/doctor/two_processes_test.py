"""The doctor examines a run of two processes, each of which has its own rows and its own part of the parameters."""
import json

import pytest
from processes_test import ROOT, address, results, start

PROGRAM = f"""
import json, sys
sys.path[:0] = ['{ROOT / 'tests'}']
import jax
from lm import doctor
from lm.sharding import hosts
hosts.join(sys.argv[1], 2, int(sys.argv[2]))
jax.config.update('jax_disable_most_optimizations', True)
from helpers.examined import examined, run_of
with examined(run_of('next_token', accumulate=2), 'fsdp:2') as subject:
  findings = doctor.examine(subject, {{**doctor.START, 'compiles once': doctor.ALL['compiles once']}})
print('findings', json.dumps({{name: (finding.verdict.value, finding.text) for name, finding in findings.items()}}),
      file=sys.stderr)
"""


@pytest.mark.slow
@pytest.mark.long
def test_two_processes_find_the_same_and_no_fault(tmp_path):
  script, coordinator = tmp_path / 'program.py', address()
  script.write_text(PROGRAM)
  processes = [start([script, coordinator, i], tmp_path) for i in range(2)]
  ends = results(processes)
  assert [process.returncode for process in processes] == [0, 0], ends
  first, second = (json.loads(err.split('findings ')[1].splitlines()[0]) for _, err in ends)
  for name in ('host', 'compiles once'):   # have free memory, and seconds
    (verdict, _), (other, _) = first.pop(name), second.pop(name)
    assert verdict == other == 'ok'
  assert first == second
  assert {name: text for name, (verdict, text) in first.items() if verdict not in ('ok', 'skipped')} == {}
  assert {name for name, (verdict, _) in first.items() if verdict == 'skipped'} == {
      'answers hidden', 'chat mask', 'tokenizer'}
