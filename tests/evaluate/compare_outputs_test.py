"""compare_outputs.py: systems from files of texts in any order, and from folders of results; bad input in one line."""
import importlib
import json
import pathlib

import numpy as np
import pytest

from lm.evaluate import measures, report, stored_measures, texts

RNG = np.random.default_rng(0)
WORDS = [f'w{i}' for i in range(30)]


@pytest.fixture
def script(monkeypatch):
  monkeypatch.syspath_prepend(pathlib.Path(__file__).parents[2] / 'experiments')
  return importlib.import_module('compare_outputs')


def lines(path, records):
  path.write_text('\n'.join(map(json.dumps, records)))
  return str(path)


@pytest.fixture
def files(tmp_path):
  """References of 40 texts; a system that copies half of the words, one that copies most, and one as good as that."""
  references = [' '.join(RNG.choice(WORDS, 12)) for _ in range(40)]

  def noisy(share, name):
    records = [{'id': i, 'text': ' '.join('x' if RNG.random() < share else word for word in one.split())}
               for i, one in enumerate(references)]
    return lines(tmp_path / f'{name}.jsonl', RNG.permutation(records).tolist())
  path = lines(tmp_path / 'r.jsonl', [{'id': i, 'references': [one]} for i, one in enumerate(references)])
  return [noisy(share, name) for share, name in ((0.5, 'half'), (0.2, 'good'), (0.5, 'same'))], pathlib.Path(path)


def test_texts_are_matched_by_id_and_the_verdicts_fit(script, files, tmp_path, capsys):
  outputs, references = files
  script.compare_outputs(outputs=tuple(outputs), references=(references,), metrics=('edit_distance', 'rouge'),
                         out=tmp_path / 'out.json')
  stored = json.loads((tmp_path / 'out.json').read_text())
  verdicts = {name: {one['metric']: one['verdict'] for one in several}
              for name, several in stored['comparisons'].items()}
  assert stored['baseline'] == 'half' and set(verdicts['good'].values()) == {'better'}
  assert all(verdict.startswith('not distinguishable; a difference') for verdict in verdicts['same'].values())
  text = capsys.readouterr().out
  assert f'corrected for {2 * len(verdicts["good"])} comparisons' in text and 'rouge1' in text


def test_a_file_that_cannot_be_written_is_refused_before_work(script, files, tmp_path, capsys):
  (tmp_path / 'file').touch()
  with pytest.raises(OSError, match='file'):
    script.compare_outputs(outputs=tuple(files[0]), references=(files[1],), metrics=('edit_distance',),
                           out=tmp_path / 'file/out.json')
  assert not capsys.readouterr().out


def test_results_of_two_runs_are_compared_by_metric(script, tmp_path, capsys):
  for name, shift in ('a', 0.), ('b', 1.):
    folder = tmp_path / name / 'evaluation'
    folder.mkdir(parents=True)
    result = report.Result([measures.mean(metric, RNG.normal(shift, 1, 50), 'lower') for metric in ('loss', 'other')],
                           documents=[f'd{i}' for i in range(50)])
    stored_measures.write(stored_measures.file_of(folder, 'held'), result, {'evaluation': 1, 'model': 2})
    report.write(folder, {'evaluations': {'held': 1}, 'model': 2}, {'held': report.to_json(result)})
  folders = tuple(str(tmp_path / name / 'evaluation') for name in 'ab')
  script.compare_outputs(results=folders, metrics=('loss',))
  header, line, *_ = capsys.readouterr().out.splitlines()
  assert header.split()[:4] == ['metric', 'system', 'value', 'a']
  assert line.split()[:2] == ['held/loss', 'b'] and line.endswith('worse')
  with pytest.raises(ValueError, match="'los', which the results do not; they have held/loss, held/other"):
    script.compare_outputs(results=folders, metrics=('los',))


def test_bad_input_is_refused_in_one_line(script, files):
  (one, other, _), references = files
  with pytest.raises(ValueError, match='has 1 systems and --results 0'):
    script.compare_outputs(outputs=(one,))
  with pytest.raises(ValueError, match='no probability'):
    script.compare_outputs(outputs=(one, other), confidence=95.)
  with pytest.raises(ValueError, match="nearest is 'rouge'"):
    script.compare_outputs(outputs=(one, other), references=(references,), metrics=('rogue',))
  with pytest.raises(ValueError, match='settings of metrics are for --outputs'):
    script.compare_outputs(results=(one, other), settings=texts.Settings(stem=True))
  with pytest.raises(ValueError, match='the name .half., which is empty or of another system'):
    script.compare_outputs(outputs=(one, one))
