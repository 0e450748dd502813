"""The table of the optimizer names parameters that are treated otherwise than their role says."""
import dataclasses

import pytest
from helpers.examined import examined, run_of

from lm import optim
from lm.doctor.findings import Verdict
from lm.doctor.optimizer_table import optimizer_table
from lm.optim import groups

pytestmark = pytest.mark.usefixtures('compiled_once')
RUN = run_of('next_token')


def table(optimizer):
  with examined(dataclasses.replace(RUN, optimizer=optimizer)) as subject:
    finding = optimizer_table(subject)
  rows = {row.split()[0]: row.split()[1:] for row in finding.table[1:]}
  return finding, {name: (shape, role, *map(float, numbers)) for name, (shape, role, *numbers) in rows.items()}


def test_decay_and_rates_are_measured():
  finding, rows = table(optim.adamw(groups.Rates(1e-3, (('embedding', 3.),)), weight_decay=0.1))
  assert finding.verdict is Verdict.OK
  shape, role, update, decay = rows['embedding']
  assert (shape, role) == ('64x8', 'embedding')
  assert update == pytest.approx(3, rel=1e-2) and decay == pytest.approx(0.3, rel=1e-2)   # the factor is of both
  assert rows['norm/scale'][1:] == ('vector', pytest.approx(1, rel=1e-2), 0)


def test_decay_on_norms_and_parameters_at_rest_are_named():
  everything = optim.adamw(groups.Rates(1e-3, (('embedding', 0.),)), decays=groups.matching('*'))
  finding, _ = table(everything)
  assert finding.verdict is Verdict.WARNING
  assert 'vectors decay' in finding.text and 'norm/scale' in finding.text and 'never updated: embedding' in finding.text
