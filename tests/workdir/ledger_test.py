"""The ledger keeps the metrics of evaluations through kills, exactly, and only for the same parameters and settings."""
import math

import pytest

from lm.workdir.ledger import Ledger

METRICS = {'validation/loss': 0.1 + 0.2, 'validation/perplexity': math.inf, 'suite/score': math.nan}


@pytest.mark.parametrize('size', [0, 1, 40, 10 ** 6])
def test_an_entry_is_kept_whole_or_not_at_all(tmp_path, size):
  ledger = Ledger(tmp_path, 'as now')
  ledger.add(3, 'abc', METRICS)
  whole = (tmp_path / 'ledger.jsonl').read_bytes()
  ledger.add(6, 'def', METRICS)
  path = tmp_path / 'ledger.jsonl'
  path.write_bytes(path.read_bytes()[:len(whole) + size])   # killed here
  for _ in range(2):
    ledger = Ledger(tmp_path, 'as now')
    assert repr(ledger.metrics(3, 'abc')) == repr(METRICS)   # NaN is no equal of itself
    assert (ledger.metrics(6, 'def') is not None) == (size == 10 ** 6)
    assert ledger.metrics(3, 'def') is None and ledger.metrics(6, 'abc') is None
    assert Ledger(tmp_path, 'otherwise').metrics(3, 'abc') is None
  ledger.add(9, 'ghi', METRICS)
  assert Ledger(tmp_path, 'as now').metrics(9, 'ghi') and Ledger(tmp_path, 'as now').metrics(3, 'abc')
