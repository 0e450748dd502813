"""Scripts refuse what cannot work before they open a model or train."""
import runpy
import sys

import pytest
from helpers.experiment_scripts import SCRIPTS


@pytest.mark.parametrize('name, module, arguments', [
    ('summarise', 'rouge_score.rouge_scorer', ['--workdir={folder}/run']),
    ('learned_metric', 'sacrebleu.metrics', ['--workdir={folder}/run']),
    ('learned_metric', 'rouge_score.rouge_scorer', ['--workdir={folder}/run']),
    ('score_texts', 'rouge_score.rouge_scorer', ['--candidates=no.txt', '--metrics=exact_match,rouge']),
    ('compare_outputs', 'sacrebleu.metrics', ['--outputs=no.txt,none.txt', '--metrics=exact_match,ter']),
    ('serve', 'prometheus_client', ['--model={folder}/none', '--port=0'])])
def test_a_missing_package_is_named_first(name, module, arguments, monkeypatch, capsys, tmp_path):
  monkeypatch.setattr('lm.launch.program._cache_compilations', lambda: None)
  monkeypatch.setitem(sys.modules, module, None)   # so that it cannot be imported
  monkeypatch.setattr(sys, 'argv', [f'{name}.py', *(argument.format(folder=tmp_path) for argument in arguments)])
  with pytest.raises(SystemExit) as stop:
    runpy.run_path(str(SCRIPTS[name]), run_name='__main__')
  assert stop.value.code == 1 and f'{module} is needed: pip install' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())
