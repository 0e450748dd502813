"""Scripts refuse what cannot work before they open a model or train."""
import importlib
import runpy
import sys

import pytest
from helpers.experiment_scripts import SCRIPTS

from lm import signature
from lm.sharding import hosts


@pytest.mark.parametrize('name, module, arguments', [
    ('summarise', 'rouge_score.rouge_scorer', ['--workdir={folder}/run']),
    ('learned_metric', 'sacrebleu.metrics', ['--workdir={folder}/run']),
    ('learned_metric', 'rouge_score.rouge_scorer', ['--workdir={folder}/run']),
    ('score_texts', 'rouge_score.rouge_scorer', ['--candidates=no.txt', '--metrics=exact_match,rouge']),
    ('compare_outputs', 'sacrebleu.metrics', ['--outputs=no.txt,none.txt', '--metrics=exact_match,ter']),
    ('evaluate', 'lm_eval.api.model', ['--model={folder}/none', '--tasks=some']),
    ('evaluate', 'sacrebleu.metrics', ['--model={folder}/none', '--suite={folder}/suite.json']),
    ('serve', 'prometheus_client', ['--model={folder}/none', '--port=0'])])
def test_a_missing_package_is_named_first(name, module, arguments, monkeypatch, capsys, tmp_path):
  monkeypatch.setattr('lm.launch.program._cache_compilations', lambda: None)
  monkeypatch.setitem(sys.modules, module, None)   # so that it cannot be imported
  (tmp_path / 'suite.json').write_text('{"generation": {"a": {"text": "no.txt", "metrics": ["bleu"]}}}')
  monkeypatch.setattr(sys, 'argv', [f'{name}.py', *(argument.format(folder=tmp_path) for argument in arguments)])
  with pytest.raises(SystemExit) as stop:
    runpy.run_path(str(SCRIPTS[name]), run_name='__main__')
  assert stop.value.code == 1 and f'{module} is needed: pip install' in capsys.readouterr().err
  assert [path.name for path in tmp_path.iterdir()] == ['suite.json']


@pytest.mark.parametrize('name, function', [('proof', 'proof'), ('doctor', 'examine')])
def test_a_tool_of_many_processes_joins_the_cluster_of_its_flags(name, function, monkeypatch):
  class Joined(Exception):
    """Ends the tool where it joins."""

  def join(*place):
    raise Joined(*place)

  monkeypatch.setattr(hosts, 'join', join)
  flags = {'coordinator_address': 'host:1', 'num_processes': 2, 'process_id': 1, 'heartbeat': 9}
  with pytest.raises(Joined) as joined:
    signature.call(getattr(importlib.import_module(name), function), flags)
  assert joined.value.args == ('host:1', 2, 1, 9)
